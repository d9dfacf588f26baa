// The blocks of product.cpp: panels of the right matrix, packed so that one row of a panel is two
// vectors; strips of the left one; and the tile of both, whose sums stay in registers.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/memory.h"
#include "cpu/product_pack.h"

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
  // The most inner steps of a visit; of none, as an empty batch's weight's gradient has, 1.
  int64_t longest() const {
    return std::clamp<int64_t>(inner, 1, int64_t{kPart} * kPartsOf<scalar_t>);
  }
};

// Columns of a panel, and of a tile: two vectors.
template <class Isa, typename scalar_t>
inline constexpr int kPanelOf = 2 * simd::kLanesOf<Isa, scalar_t>;

// Bytes of packed panels that stay in the second cache while strips come and go.
inline constexpr int64_t kCachedPanels = int64_t{512} << 10;

// Bytes between rows, or a multiple of them, that let all of a strip's begin in one set of the
// first cache.
inline constexpr int64_t kCrowdedBytes = 4096;

// Rows of a strip, at the most: two sums each, beside the panel's two vectors and one of the strip
// in AVX-512's 32 registers, or in the others' 16.
template <class Isa>
inline constexpr int kStripOf = Isa::kBytes == 64 ? 12 : 6;

// One block of a product: rows [row_begin, row_end) and panels [panel_begin, panel_end), summed
// over the inner steps of one visit.
template <typename scalar_t>
struct ProductBlock {
  using acc_t = acc_type<scalar_t>;
  const Product<scalar_t>* product;
  int64_t row_begin, row_end, panel_begin, panel_end, visit;
  const acc_t* packed;  // panel_begin and what follows, packed; null where they are not yet
  Matrix<acc_t> sums;   // bfloat16 and float16: as out, what visits before the last one leave
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

// What ends a tile's sums: bias, the parts before the last one, what stands in out, and ReLU. Each
// is asked for once a tile, not once a vector, and nothing is read from `tile` between stores,
// which might have changed it: the gradient of 784 x 256 weights from 2 rows takes 80 us so, 170
// without (a core of Zen 3, float32).
template <int kLanes, typename scalar_t, int kRows, int kVectors>
TORCHEXT_INLINE void finish_tile(const ProductTile<scalar_t>& tile,
                                 simd::Vector<scalar_t, kLanes> (&sum)[kRows][kVectors],
                                 const simd::Vector<scalar_t, kLanes> (&total)[kRows][kVectors]) {
  using Value = simd::Vector<scalar_t, kLanes>;
  const int64_t columns = tile.columns, stride = tile.out.row_stride;
  scalar_t* const out = tile.out.data;
  const auto for_all = [&](auto use) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) use(i, v);
    }
  };
  const auto read = [&](const scalar_t* from, int v) __attribute__((always_inline)) {
    const int64_t count = columns - v * kLanes;
    if (count <= 0) __builtin_unreachable();  // then the tile is of one vector
    return count >= kLanes ? simd::load<kLanes>(from + v * kLanes)
                           : simd::load_tail<kLanes>(from + v * kLanes, count, 0);
  };
  if (tile.bias) {
    Value bias[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) bias[v] = read(tile.bias, v);
    for_all([&](int i, int v) __attribute__((always_inline)) { sum[i][v] += bias[v]; });
  }
  if (tile.parts > 1) {
    for_all([&](int i, int v) __attribute__((always_inline)) { sum[i][v] += total[i][v]; });
  }
  if (tile.accumulate) {
    for_all([&](int i, int v)
                __attribute__((always_inline)) { sum[i][v] += read(out + i * stride, v); });
  }
  if (tile.relu) {
    for_all([&](int i, int v) __attribute__((always_inline)) {
      sum[i][v] = sum[i][v] <= 0 ? Value{} : sum[i][v];  // NaN stays NaN
    });
  }
  if (columns == kVectors * kLanes) {
    for_all([&](int i, int v) __attribute__((always_inline)) {
      simd::store<kLanes>(out + i * stride + v * kLanes, sum[i][v]);
    });
    return;
  }
  for_all([&](int i, int v) __attribute__((always_inline)) {
    const int64_t count = columns - v * kLanes;
    if (count <= 0) __builtin_unreachable();
    scalar_t* to = out + i * stride + v * kLanes;
    if (count >= kLanes) {
      simd::store<kLanes>(to, sum[i][v]);
    } else {
      simd::store_tail<kLanes>(to, sum[i][v], count);
    }
  });
}

// sum += value * vector. Assembly: of some heights of a tile GCC 12 keeps `vector` on the stack,
// and reads it back for every row. 96 x 2000 by 2000 x 16 takes 88 us so and 142 (a core of Zen 4,
// float32).
template <typename Value>
TORCHEXT_INLINE void add_product(Value& sum, Value value, Value vector) {
#if defined(__x86_64__)
  if constexpr (sizeof(Value) > 16) {
    if constexpr (sizeof(sum[0]) == 4) {
      asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(value), "v"(vector));
    } else {
      asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(value), "v"(vector));
    }
    return;
  }
#endif
  sum += value * vector;
}

// kUnit: the strip's rows are one element apart (packed, or a transposed matrix). kVectors: of the
// panel's two, those that columns of out stand in.
template <class Isa, typename scalar_t, int kRows, bool kUnit, int kVectors>
TORCHEXT_INLINE void product_tile(const ProductTile<scalar_t>& tile) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = simd::Vector<scalar_t, kLanes>;
  Value sum[kRows][kVectors], total[kRows][kVectors];
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
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          total[i][v] = part == 1 ? sum[i][v] : total[i][v] + sum[i][v];
        }
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Value{};
    }
    for (int64_t k = tile.steps[part]; k > 0; --k, x += x_step, y += y_step) {
      Value vectors[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) vectors[v] = simd::load<kLanes>(y + v * kLanes);
      // From the second cache. 4096 x 1024 x 1024 26.3 ms, 28.9 without (2 cores of an Intel Xeon
      // of family 6, model 207, float32).
      if (kUnit) __builtin_prefetch(x + 16 * x_step);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(y + 16 * y_step + v * kLanes);
      // Four rows from one address: x86 adds once, twice or three times a register for nothing.
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const auto value = simd::broadcast<Value>((x + i / 4 * 4 * step) + i % 4 * step);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) add_product(sum[i][v], value, vectors[v]);
      }
    }
  }
  finish_tile<kLanes, scalar_t, kRows, kVectors>(tile, sum, total);
}

// A tile is a function of its own: inlined into its callers, its sums would not stay in registers.
template <class Isa, typename scalar_t, int kRows, bool kUnit, int kVectors>
struct ProductTileOf {
  [[gnu::noinline]] static void run(const ProductTile<scalar_t>& tile) {
    product_tile<Isa, scalar_t, kRows, kUnit, kVectors>(tile);
  }
};
#if defined(__x86_64__)
template <typename scalar_t, int kRows, bool kUnit, int kVectors>
struct ProductTileOf<simd::Avx2, scalar_t, kRows, kUnit, kVectors> {
  [[gnu::target("arch=x86-64-v3"), gnu::noinline]] static void run(
      const ProductTile<scalar_t>& tile) {
    product_tile<simd::Avx2, scalar_t, kRows, kUnit, kVectors>(tile);
  }
};
template <typename scalar_t, int kRows, bool kUnit, int kVectors>
struct ProductTileOf<simd::Avx512, scalar_t, kRows, kUnit, kVectors> {
  [[gnu::target("arch=x86-64-v4"), gnu::noinline]] static void run(
      const ProductTile<scalar_t>& tile) {
    product_tile<simd::Avx512, scalar_t, kRows, kUnit, kVectors>(tile);
  }
};
#endif

template <class Isa, typename scalar_t, bool kUnit, int... kIndex>
TORCHEXT_INLINE void run_product_tile(const ProductTile<scalar_t>& tile, int64_t rows,
                                      std::integer_sequence<int, kIndex...>) {
  static constexpr void (*kTiles[2][sizeof...(kIndex)])(const ProductTile<scalar_t>&) = {
      {ProductTileOf<Isa, scalar_t, kIndex + 1, kUnit, 1>::run...},
      {ProductTileOf<Isa, scalar_t, kIndex + 1, kUnit, 2>::run...}};
  kTiles[tile.columns > simd::kLanesOf<Isa, scalar_t>][rows - 1](tile);
}

// Rows of strip `index` of `strips` that share `rows` rows as evenly as they can.
inline std::pair<int64_t, int64_t> strip_rows(int64_t rows, int64_t strips, int64_t index) {
  return {share(rows, strips, index), share(rows, strips, index + 1)};
}

// Memory of the thread that it keeps (`which`): strips, a panel, and the panels that are packed
// together, for all threads or for itself. At most 4 MiB of those.
template <typename scalar_t>
scalar_t* scratch(int which, int64_t size) {
  static thread_local AlignedBuffer<scalar_t> buffers[3];
  return buffers[which].of_size(size);
}

// What a strip's tile left in `from`, as out's numbers: they are rounded once.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void round_rows(Matrix<const acc_type<scalar_t>> from, Matrix<scalar_t> to,
                                int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      simd::store<kLanes>(to.at(i, j), simd::load<kLanes>(from.at(i, j)));
    }
    if (j < columns) {
      simd::store_tail<kLanes>(to.at(i, j), simd::load_tail<kLanes>(from.at(i, j), columns - j, 0),
                               columns - j);
    }
  }
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void product_block(const ProductBlock<scalar_t>& block) {
  using acc_t = acc_type<scalar_t>;
  constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
  constexpr int kPanel = kPanelOf<Isa, scalar_t>, kStrip = kStripOf<Isa>;
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  const Product<scalar_t>& p = *block.product;
  const Parts<acc_t> parts(p.inner);
  const int64_t first_part = parts.first_of(block.visit), end = parts.first_of(block.visit + 1);
  const int64_t begin = parts.begin_of(first_part), inner = parts.begin_of(end) - begin;
  const int64_t rows = block.row_end - block.row_begin;
  // Of one vector of columns a strip is read where it stands. Half of AVX-512's rows stay in the
  // first cache where all begin in one set of it; the others' are no more than that.
  const bool crowded = !kNarrow && Isa::kBytes == 64 && p.columns <= kLanes &&
                       p.left.row_stride * int64_t{sizeof(scalar_t)} % kCrowdedBytes == 0;
  const int64_t strips = divide_up(rows, crowded ? kStrip / 2 : kStrip);
  const Matrix<const scalar_t> left{p.left.at(block.row_begin, begin), p.left.row_stride,
                                    p.left.column_stride};
  acc_t* packed_left = nullptr;
  Matrix<const acc_t> left_rows{};  // the left matrix as it stands
  if constexpr (!kNarrow) left_rows = left;
  if (kNarrow && left.column_stride == 1) {
    // Rows in rows: no set of the first cache has all their beginnings.
    const int64_t stride = inner + 2 * kLanes;
    acc_t* copy = scratch<acc_t>(0, rows * stride);
    copy_rows<Isa>(left, rows, inner, copy, stride);
    left_rows = {copy, stride, 1};
  } else if (kNarrow || block.pack_left) {
    packed_left = scratch<acc_t>(0, rows * inner);
    for (int64_t s = 0; s < strips; ++s) {
      const auto [first, last] = strip_rows(rows, strips, s);
      pack_strip<Isa, scalar_t>({left.at(first, 0), left.row_stride, left.column_stride},
                                last - first, inner, packed_left + first * inner);
    }
  }
  const bool accumulate = p.accumulate || first_part > 0, ends = end == parts.count;
  ProductTile<acc_t> tile{};
  tile.parts = end - first_part;
  for (int64_t i = 0; i < tile.parts; ++i) {
    tile.steps[i] = parts.begin_of(first_part + i + 1) - parts.begin_of(first_part + i);
  }
  tile.accumulate = accumulate;
  tile.relu = p.relu && ends;
  [[maybe_unused]] acc_t bias[kPanel], values[kStrip * kPanel];
  const auto set_panel = [&](int64_t panel) __attribute__((always_inline)) {
    const int64_t column = panel * kPanel;
    tile.columns = std::min<int64_t>(kPanel, p.columns - column);
    const Matrix<const scalar_t> from{p.right.at(begin, column), p.right.row_stride,
                                      p.right.column_stride};
    if constexpr (!kNarrow) tile.panel = {from.data, from.row_stride, 1};
    if (block.packed) {
      tile.panel = {block.packed + (panel - block.panel_begin) * inner * kPanel, kPanel, 1};
    } else if (kNarrow || block.pack_right || tile.columns < kPanel) {
      acc_t* packed = scratch<acc_t>(1, inner * kPanel);
      pack_panel<Isa>(from, inner, tile.columns, packed);
      tile.panel = {packed, kPanel, 1};
    }
    if (!p.bias || !ends) return;
    if constexpr (kNarrow) {
      for (int64_t j = 0; j < tile.columns; ++j) bias[j] = wide(p.bias[column + j]);
      tile.bias = bias;
    } else {
      tile.bias = p.bias + column;
    }
  };
  const auto run_strip = [&](int64_t panel, int64_t s) __attribute__((always_inline)) {
    const auto [first, last] = strip_rows(rows, strips, s);
    const int64_t height = last - first, row = block.row_begin + first, column = panel * kPanel;
    constexpr auto kHeights = std::make_integer_sequence<int, kStrip>{};
    const Matrix<scalar_t> out{p.out.at(row, column), p.out.row_stride, 1};
    if constexpr (!kNarrow) {
      tile.out = out;
    } else if (block.sums.data) {
      tile.out = {block.sums.at(row, column), block.sums.row_stride, 1};
    } else {
      tile.out = {values, kPanel, 1};
    }
    if (packed_left) {
      tile.strip = {packed_left + first * inner, 1, height};
    } else {
      tile.strip = {left_rows.at(first, 0), left_rows.row_stride, left_rows.column_stride};
    }
    if (tile.strip.row_stride == 1) {
      run_product_tile<Isa, acc_t, true>(tile, height, kHeights);
    } else {
      run_product_tile<Isa, acc_t, false>(tile, height, kHeights);
    }
    if constexpr (kNarrow) {
      if (ends) {
        round_rows<kLanes, scalar_t>({tile.out.data, tile.out.row_stride, 1}, out, height,
                                     tile.columns);
      }
    }
  };
  const int64_t panels = block.panel_end - block.panel_begin;
  if (block.packed && panels * inner * kPanel * int64_t{sizeof(acc_t)} <= kCachedPanels) {
    // Short sums: what counts is the writing, so it goes along the rows.
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
        set_panel(panel);
        run_strip(panel, s);
      }
    }
    return;
  }
  for (int64_t panel = block.panel_begin; panel < block.panel_end; ++panel) {
    set_panel(panel);
    for (int64_t s = 0; s < strips; ++s) run_strip(panel, s);
  }
}

}  // namespace torchext::cpu
