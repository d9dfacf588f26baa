// The blocks of product.cpp: panels of the right matrix, packed so that one row of a panel is two
// vectors; strips of the left one; and the tile of both, whose sums stay in registers.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/product.h"
#include "cpu/simd.h"

namespace torchext::cpu {

// Inner steps that are summed one after another: short sums lose less. Such parts are added in
// their order. Fixed, so that the order of a sum is.
inline constexpr int64_t kPart = 256;
// Parts between two visits of out: a packed strip and panel of so many are in the second cache, and
// out is read and written a quarter as often. 4096 x 1024 x 1024: 389 GFLOP/s with one, 470 with
// four.
template <typename scalar_t>
inline constexpr int kPartsOf = 16 / static_cast<int>(sizeof(scalar_t));

inline int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Block `index` of `blocks` that share `total` as evenly as they can.
inline int64_t share(int64_t total, int64_t blocks, int64_t index) {
  return total * index / blocks;
}

// The parts of an inner dimension, and the visits of out that share them.
template <typename scalar_t>
struct Parts {
  int64_t inner, count, visits;

  explicit Parts(int64_t inner)
      : inner(inner),
        count(std::max<int64_t>(1, divide_up(inner, kPart))),
        visits(divide_up(count, kPartsOf<scalar_t>)) {}
  // The first part of a visit, and where a part begins.
  int64_t first_of(int64_t visit) const { return share(count, visits, visit); }
  int64_t begin_of(int64_t part) const { return share(inner, count, part); }
  int64_t begin_of_visit(int64_t visit) const { return begin_of(first_of(visit)); }
  // The most inner steps of a visit.
  int64_t longest() const { return std::min(inner, int64_t{kPart} * kPartsOf<scalar_t>); }
};

// Columns of a panel, and of a tile: two vectors.
template <class Isa, typename scalar_t>
inline constexpr int kPanelOf = 2 * simd::kLanesOf<Isa, scalar_t>;

// Rows of a strip, at the most: two sums each, beside the panel's two vectors and one of the strip
// in AVX-512's 32 registers, or in the others' 16.
template <class Isa>
inline constexpr int kStripOf = Isa::kBytes == 64 ? 12 : 6;

// One block of a product: rows [row_begin, row_end) and panels [panel_begin, panel_end), summed
// over the inner steps of one visit.
template <typename scalar_t>
struct ProductBlock {
  const Product<scalar_t>* product;
  int64_t row_begin, row_end, panel_begin, panel_end, visit;
  const scalar_t* packed;  // panel_begin and what follows, packed; null where they are not yet
  bool pack_left, pack_right;
};

// A tile: a strip times a panel, into the first `columns` columns of out's rows.
template <typename scalar_t>
struct ProductTile {
  Matrix<const scalar_t> strip, panel;
  int64_t parts, steps[kPartsOf<scalar_t>];  // inner steps of each
  Matrix<scalar_t> out;
  int64_t columns;
  bool accumulate;
  const scalar_t* bias;
  bool relu;
};

// kUnit: the strip's rows are one element apart (packed, or a transposed matrix).
template <class Isa, typename scalar_t, int kRows, bool kUnit>
TORCHEXT_INLINE void product_tile(const ProductTile<scalar_t>& tile) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = simd::Vector<scalar_t, kLanes>;
  Value sum[kRows][2], total[kRows][2];
  // Out's lines come while the sums are made: a store waits for its line, and those behind it for
  // the store. 4096 x 64 by 64 x 784 2.6 ms, 3.0 without (2 cores of Zen 4, float32).
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    __builtin_prefetch(tile.out.at(i, 0), 1);
    __builtin_prefetch(tile.out.at(i, std::min<int64_t>(kLanes, tile.columns - 1)), 1);
  }
  const scalar_t *x = tile.strip.data, *y = tile.panel.data;
  const int64_t step = kUnit ? 1 : tile.strip.row_stride;
  const int64_t x_step = tile.strip.column_stride, y_step = tile.panel.row_stride;
  for (int64_t part = 0; part < tile.parts; ++part) {
    if (part > 0) {
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        total[i][0] = part == 1 ? sum[i][0] : total[i][0] + sum[i][0];
        total[i][1] = part == 1 ? sum[i][1] : total[i][1] + sum[i][1];
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) sum[i][0] = sum[i][1] = Value{};
    for (int64_t k = tile.steps[part]; k > 0; --k, x += x_step, y += y_step) {
      const Value left = simd::load<kLanes>(y), right = simd::load<kLanes>(y + kLanes);
      // Four rows from one address: x86 adds once, twice or three times a register for nothing.
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto value = simd::broadcast<Value>((x + i / 4 * 4 * step) + i % 4 * step);
        sum[i][0] += value * left;
        sum[i][1] += value * right;
      }
    }
  }
  const bool accumulate = tile.accumulate, relu = tile.relu;
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    const int64_t count = tile.columns - part * kLanes;
    if (count <= 0) break;
    const bool whole = count >= kLanes;
    Value bias{};
    if (tile.bias) {
      const scalar_t* from = tile.bias + part * kLanes;
      bias = whole ? simd::load<kLanes>(from) : simd::load_tail<kLanes>(from, count, 0);
    }
    scalar_t* to = tile.out.at(0, part * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i, to += tile.out.row_stride) {
      Value value = sum[i][part] + bias;
      if (tile.parts > 1) value += total[i][part];
      if (accumulate) {
        value += whole ? simd::load<kLanes>(to) : simd::load_tail<kLanes>(to, count, 0);
      }
      if (relu) value = value <= 0 ? Value{} : value;  // NaN stays NaN
      if (whole) {
        simd::store<kLanes>(to, value);
      } else {
        simd::store_tail<kLanes>(to, value, count);
      }
    }
  }
}

// A tile is a function of its own: inlined into its callers, its sums would not stay in registers.
template <class Isa, typename scalar_t, int kRows, bool kUnit>
struct ProductTileOf {
  [[gnu::noinline]] static void run(const ProductTile<scalar_t>& tile) {
    product_tile<Isa, scalar_t, kRows, kUnit>(tile);
  }
};
#if defined(__x86_64__)
template <typename scalar_t, int kRows, bool kUnit>
struct ProductTileOf<simd::Avx2, scalar_t, kRows, kUnit> {
  [[gnu::target("arch=x86-64-v3"), gnu::noinline]] static void run(
      const ProductTile<scalar_t>& tile) {
    product_tile<simd::Avx2, scalar_t, kRows, kUnit>(tile);
  }
};
template <typename scalar_t, int kRows, bool kUnit>
struct ProductTileOf<simd::Avx512, scalar_t, kRows, kUnit> {
  [[gnu::target("arch=x86-64-v4"), gnu::noinline]] static void run(
      const ProductTile<scalar_t>& tile) {
    product_tile<simd::Avx512, scalar_t, kRows, kUnit>(tile);
  }
};
#endif

template <class Isa, typename scalar_t, bool kUnit, int... kIndex>
TORCHEXT_INLINE void run_product_tile(const ProductTile<scalar_t>& tile, int64_t rows,
                                      std::integer_sequence<int, kIndex...>) {
  static constexpr void (*kTiles[])(const ProductTile<scalar_t>&) = {
      ProductTileOf<Isa, scalar_t, kIndex + 1, kUnit>::run...};
  kTiles[rows - 1](tile);
}

// Lanes of two vectors, by numbers that go on from the first to the second.
template <int... kLane, typename T, int kLanes = sizeof...(kLane)>
TORCHEXT_INLINE simd::Vector<T, kLanes> chosen_lanes(const T*, simd::Vector<T, kLanes> a,
                                                     simd::Vector<T, kLanes> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kLane...);
#else
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, simd::Vector<Index, kLanes>{kLane...});
#endif
}

// Lane `i` of the result is lane pick(i, kLanes) of a, or of b from kLanes on.
template <typename Pick, typename Value, int... kLane>
TORCHEXT_INLINE Value picked(Pick, Value a, Value b, std::integer_sequence<int, kLane...>) {
  using T = std::remove_reference_t<decltype(Value{}[0])>;
  constexpr const T* kType = nullptr;
  return chosen_lanes<Pick{}(kLane, int{sizeof...(kLane)})...>(kType, a, b);
}

// Turns a square of kLanes vectors: 16 bytes of each at a time, and then the squares of those. Made
// of what x86 shuffles in one step without indices (unpack, shuf, shuff32x4), twice as fast as what
// takes lanes by index.
template <int kLanes, typename Value>
TORCHEXT_INLINE void transpose_square(Value (&rows)[kLanes]) {
  constexpr int kSmall = 16 / static_cast<int>(sizeof(rows[0][0])), kBlocks = kLanes / kSmall;
  constexpr auto kLanesOfAll = std::make_integer_sequence<int, kLanes>{};
  const auto pick = [&](auto how, Value a, Value b)
                        __attribute__((always_inline)) { return picked(how, a, b, kLanesOfAll); };
  // Of two vectors a and b, in each 16 bytes: a0 b0 a1 b1 and the other halves; a0 a1 b0 b1 and so.
  constexpr auto kFirst = [](int i, int lanes) {
    return i / kSmall * kSmall + i % kSmall / 2 + i % 2 * lanes;
  };
  constexpr auto kSecond = [](int i, int lanes) {
    return i / kSmall * kSmall + kSmall / 2 + i % kSmall / 2 + i % 2 * lanes;
  };
  constexpr auto kLow = [](int i, int lanes) { return i / 4 * 4 + i % 2 + i % 4 / 2 * lanes; };
  constexpr auto kHigh = [](int i, int lanes) { return i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * lanes; };
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; r += kSmall) {
    if constexpr (kSmall == 2) {
      const Value a = rows[r], b = rows[r + 1];
      rows[r] = pick(kFirst, a, b);
      rows[r + 1] = pick(kSecond, a, b);
    } else {
      const Value a = pick(kFirst, rows[r], rows[r + 1]), b = pick(kSecond, rows[r], rows[r + 1]);
      const Value c = pick(kFirst, rows[r + 2], rows[r + 3]),
                  d = pick(kSecond, rows[r + 2], rows[r + 3]);
      rows[r] = pick(kLow, a, c);
      rows[r + 1] = pick(kHigh, a, c);
      rows[r + 2] = pick(kLow, b, d);
      rows[r + 3] = pick(kHigh, b, d);
    }
  }
  // Blocks of 16 bytes: of two vectors both lower halves and both upper ones; or the even blocks
  // and the odd ones.
  constexpr auto kLower = [](int i, int lanes) { return i < lanes / 2 ? i : i + lanes / 2; };
  constexpr auto kUpper = [](int i, int lanes) {
    return i < lanes / 2 ? i + lanes / 2 : i + lanes;
  };
  constexpr auto kEven = [](int i, int lanes) { return 2 * i - i % kSmall; };
  constexpr auto kOdd = [](int i, int lanes) { return 2 * i - i % kSmall + kSmall; };
#pragma GCC unroll 16
  for (int r = 0; r < kSmall; ++r) {
    if constexpr (kBlocks == 2) {
      const Value a = rows[r], b = rows[r + kSmall];
      rows[r] = pick(kLower, a, b);
      rows[r + kSmall] = pick(kUpper, a, b);
    } else if constexpr (kBlocks == 4) {
      const Value a = rows[r], b = rows[r + kSmall], c = rows[r + 2 * kSmall],
                  d = rows[r + 3 * kSmall];
      const Value e = pick(kLower, a, b), f = pick(kUpper, a, b);
      const Value g = pick(kLower, c, d), h = pick(kUpper, c, d);
      rows[r] = pick(kEven, e, g);
      rows[r + kSmall] = pick(kOdd, e, g);
      rows[r + 2 * kSmall] = pick(kEven, f, h);
      rows[r + 3 * kSmall] = pick(kOdd, f, h);
    }
  }
}

// Copies rows [0, rows) and columns [0, columns) of a matrix to `to`, element (i, j) to
// to[j * to_stride + i]: the matrix's own rows are contiguous, those of the copy are its columns.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void copy_transposed(Matrix<const scalar_t> from, int64_t rows, int64_t columns,
                                     scalar_t* to, int64_t to_stride) {
  using Value = simd::Vector<scalar_t, kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      Value square[kLanes];
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) square[l] = simd::load<kLanes>(from.at(i + l, j));
      transpose_square(square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) simd::store<kLanes>(to + (j + l) * to_stride + i, square[l]);
    }
    for (; j < columns; ++j) {
      for (int l = 0; l < kLanes; ++l) to[j * to_stride + i + l] = *from.at(i + l, j);
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = *from.at(i, j);
  }
}

// A panel (inner, kPanel) of `count` columns, zeros past them.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_panel(Matrix<const scalar_t> from, int64_t inner, int64_t count,
                                scalar_t* to) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = 2 * kLanes;
  if (count < kPanel) std::fill_n(to, inner * kPanel, scalar_t{0});
  if (from.column_stride != 1 && from.row_stride == 1) {
    const Matrix<const scalar_t> turned{from.data, from.column_stride, 1};
    return copy_transposed<kLanes>(turned, count, inner, to, kPanel);
  }
  for (int64_t k = 0; k < inner; ++k, to += kPanel) {
    if (count == kPanel && from.column_stride == 1) {
      simd::store<kLanes>(to, simd::load<kLanes>(from.at(k, 0)));
      simd::store<kLanes>(to + kLanes, simd::load<kLanes>(from.at(k, kLanes)));
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = *from.at(k, j);
    }
  }
}

// A strip (inner, rows): what a tile reads stands side by side.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_strip(Matrix<const scalar_t> from, int64_t rows, int64_t inner,
                                scalar_t* to) {
  constexpr int kLanes = 16 / sizeof(scalar_t);  // strips are short
  if (from.column_stride == 1) return copy_transposed<kLanes>(from, rows, inner, to, rows);
  if (from.row_stride == 1 && rows >= kLanes) {
    for (int64_t k = 0; k < inner; ++k, to += rows) {
      const scalar_t* column = from.at(0, k);
      for (int64_t i = 0; i + kLanes <= rows; i += kLanes) {
        simd::store<kLanes>(to + i, simd::load<kLanes>(column + i));
      }
      // The last ones, some of them again.
      simd::store<kLanes>(to + rows - kLanes, simd::load<kLanes>(column + rows - kLanes));
    }
    return;
  }
  for (int64_t k = 0; k < inner; ++k) {
    for (int64_t i = 0; i < rows; ++i) to[k * rows + i] = *from.at(i, k);
  }
}

// Rows of strip `index` of `strips` that share `rows` rows as evenly as they can.
inline std::pair<int64_t, int64_t> strip_rows(int64_t rows, int64_t strips, int64_t index) {
  return {rows * index / strips, rows * (index + 1) / strips};
}

// Memory of the thread that it keeps: a strip, a panel, and the panels that all threads read
// (`which`). At most 4 MiB.
template <typename scalar_t>
scalar_t* scratch(int which, int64_t size) {
  static thread_local std::vector<scalar_t> buffers[3];
  if (static_cast<int64_t>(buffers[which].size()) < size) buffers[which].resize(size);
  return buffers[which].data();
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void product_block(const ProductBlock<scalar_t>& block) {
  constexpr int kPanel = kPanelOf<Isa, scalar_t>, kStrip = kStripOf<Isa>;
  const Product<scalar_t>& p = *block.product;
  const Parts<scalar_t> parts(p.inner);
  const int64_t first_part = parts.first_of(block.visit), end = parts.first_of(block.visit + 1);
  const int64_t begin = parts.begin_of(first_part), inner = parts.begin_of(end) - begin;
  const int64_t rows = block.row_end - block.row_begin;
  const int64_t strips = (rows + kStrip - 1) / kStrip;
  const Matrix<const scalar_t> left{p.left.at(block.row_begin, begin), p.left.row_stride,
                                    p.left.column_stride};
  scalar_t* packed_left = nullptr;
  if (block.pack_left) {
    packed_left = scratch<scalar_t>(0, rows * inner);
    for (int64_t s = 0; s < strips; ++s) {
      const auto [first, last] = strip_rows(rows, strips, s);
      pack_strip<Isa>({left.at(first, 0), left.row_stride, left.column_stride}, last - first, inner,
                      packed_left + first * inner);
    }
  }
  const bool accumulate = p.accumulate || first_part > 0, ends = end == parts.count;
  for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
    const int64_t column = panel * kPanel, count = std::min<int64_t>(kPanel, p.columns - column);
    Matrix<const scalar_t> right{p.right.at(begin, column), p.right.row_stride, 1};
    if (block.packed) {
      right = {block.packed + (panel - block.panel_begin) * inner * kPanel, kPanel, 1};
    } else if (block.pack_right || count < kPanel) {
      scalar_t* packed = scratch<scalar_t>(1, inner * kPanel);
      pack_panel<Isa>({right.data, right.row_stride, p.right.column_stride}, inner, count, packed);
      right = {packed, kPanel, 1};
    }
    ProductTile<scalar_t> tile{};
    tile.panel = right;
    tile.parts = end - first_part;
    for (int64_t i = 0; i < tile.parts; ++i) {
      tile.steps[i] = parts.begin_of(first_part + i + 1) - parts.begin_of(first_part + i);
    }
    tile.columns = count;
    tile.accumulate = accumulate;
    tile.bias = p.bias && ends ? p.bias + column : nullptr;
    tile.relu = p.relu && ends;
    for (int64_t s = 0; s < strips; ++s) {
      const auto [first, last] = strip_rows(rows, strips, s);
      const int64_t height = last - first;
      constexpr auto kHeights = std::make_integer_sequence<int, kStrip>{};
      tile.out = {p.out.at(block.row_begin + first, column), p.out.row_stride, 1};
      tile.strip = {left.at(first, 0), left.row_stride, left.column_stride};
      if (packed_left) tile.strip = {packed_left + first * inner, 1, height};
      if (tile.strip.row_stride == 1) {
        run_product_tile<Isa, scalar_t, true>(tile, height, kHeights);
      } else {
        run_product_tile<Isa, scalar_t, false>(tile, height, kHeights);
      }
    }
  }
}

}  // namespace torchext::cpu
