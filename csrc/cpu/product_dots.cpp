// Products by a matrix whose columns are contiguous, as a weight's are forward: each element is the
// dot product of two stretches of memory, and nothing is packed or turned. A vector holds the sums
// of inner steps a vector apart, which are added up in the end. Those are not the bits of
// product_tile: which of the two serves is a matter of `inner` and of the right matrix, and where
// only small products are always our own, of whether this one is (`dots_serve`). Columns of 16-bit
// numbers are widened once for all rows of a block.
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/product.h"
#include "cpu/product_kernel.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace torchext::cpu {
namespace {

// Columns and rows of a block: what is summed is in the first cache, what it comes to as well.
constexpr int kMostColumns = 8;
constexpr int64_t kBlockRows = 64;
// Inner steps that are gone through at a time: a block's columns stay in the first cache, of which
// as many as 4 KiB each are all on Zen 4.
template <typename scalar_t>
constexpr int64_t kStretch = 3328 / sizeof(acc_type<scalar_t>);
// Rows from which on a block's columns that begin anywhere are copied, to begin at cache lines, and
// not all in one set of the cache; numbers from one to the next. Columns that begin so are not: of
// 100 x 784 x 64 forward takes 0.92 of the time with copies, of 300 x 784 x 64 0.90 (2 cores of an
// Intel Xeon of family 6, model 207, float32).
constexpr int64_t kRowsForCopy = 16;
// Bytes of a left matrix, beyond the second cache, from which on the rows after these are fetched
// ahead: 4096 x 784 x 10 takes 750 to 780 us so and 940 to 1100, 4096 x 256 x 8 240 and 286 (Zen 4,
// float32). By two columns no thread has time for it: 4096 x 512 x 2 330 and 290 to 315.
constexpr int64_t kFarBytes = int64_t{1} << 20;
template <typename scalar_t>
constexpr int64_t kPadding = 64 / sizeof(acc_type<scalar_t>);
template <typename scalar_t>
constexpr int64_t kCopied = kStretch<scalar_t> + kPadding<scalar_t>;
// Bytes of multiplications, and of the right matrix, for which another thread saves what it costs,
// on Intel's processors and elsewhere: 100 x 200 x 32 takes 12.6 us by two and 19.0 by one, 1 x 784
// x 256 9.0 and 13.0, with AVX2 12 x 1024 x 32 8.9 and 11.7 (Zen 4, float32).
constexpr int64_t kGrainIntel = int64_t{1280} << 10;
constexpr int64_t kReadGrainIntel = int64_t{600} << 10;
constexpr int64_t kGrain = int64_t{600} << 10;
constexpr int64_t kReadGrain = int64_t{300} << 10;

// A part of a product: columns [column, column + kColumns), rows [row, row_end) and what comes of
// them, `kColumns` numbers a row.
template <typename scalar_t>
struct DotBlock {
  const Product<scalar_t>* product;
  int64_t row, row_end, column;
  acc_type<scalar_t>*sums, *copy;
};

// The sums of the lanes of as many vectors as one has lanes, each in its lane: what turns a square
// (transpose_square), with half of the vectors left after each step.
template <int kLanes, typename Value>
TORCHEXT_INLINE Value sums_of_lanes(const Value (&rows)[kLanes]) {
  constexpr int kSmall = kSmallOf<Value>, kBlocks = kLanes / kSmall;
  static_assert(kBlocks == 2 || kBlocks == 4);
  constexpr auto kLanesOfAll = std::make_integer_sequence<int, kLanes>{};
  const auto add = [&](auto one, auto other, Value a, Value b) __attribute__((always_inline)) {
    return picked(one, a, b, kLanesOfAll) + picked(other, a, b, kLanesOfAll);
  };
  Value block[kBlocks];
#pragma GCC unroll 4
  for (int b = 0; b < kBlocks; ++b) {
    const Value* row = rows + b * kSmall;
    block[b] = add(kFirst<kSmall>, kSecond<kSmall>, row[0], row[1]);
    if constexpr (kSmall == 4) {
      block[b] = add(kLow, kHigh, block[b], add(kFirst<kSmall>, kSecond<kSmall>, row[2], row[3]));
    }
  }
  const Value first = add(kLower, kUpper, block[0], block[1]);
  if constexpr (kBlocks == 2) {
    return first;
  } else {
    return add(kEven<kSmall>, kOdd<kSmall>, first, add(kLower, kUpper, block[2], block[3]));
  }
}

// `steps` inner steps of kRows rows, `left` being the first of them, and kColumns columns: into
// `sums`, or added to what stands there.
template <int kLanes, int kRows, int kColumns, typename scalar_t>
TORCHEXT_INLINE void dot_tile(Matrix<const scalar_t> left, Matrix<const acc_type<scalar_t>> right,
                              int64_t steps, bool first, bool far, acc_type<scalar_t>* sums) {
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  constexpr int kSums = (kRows * kColumns + kLanes - 1) / kLanes * kLanes;
  const scalar_t* x = left.data;
  const acc_type<scalar_t>* y = right.data;
  const int64_t x_stride = left.row_stride, y_stride = right.column_stride;
  Value sum[kSums] = {};
  const auto add = [&](auto load) __attribute__((always_inline)) {
    Value column[kColumns];
    // Four from one address: see product_tile.
#pragma GCC unroll 8
    for (int j = 0; j < kColumns; ++j) {
      Value value = load((y + j / 4 * 4 * y_stride) + j % 4 * y_stride);
      // In a register: GCC would load it again for every row.
      if (kRows > 1) asm("" : "+v"(value));
      column[j] = value;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Value row = load((x + i / 4 * 4 * x_stride) + i % 4 * x_stride);
#pragma GCC unroll 8
      for (int j = 0; j < kColumns; ++j) sum[i * kColumns + j] += row * column[j];
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= steps; k += kLanes) {
    if (far) {
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) __builtin_prefetch(x + (kRows + i) * x_stride + k);
    }
    add([&](const auto* from)
            __attribute__((always_inline)) { return simd::load<kLanes>(from + k); });
  }
  if (k < steps) {
    add([&](const auto* from) __attribute__((always_inline)) {
      return simd::load_tail<kLanes>(from + k, steps - k, 0);
    });
  }
#pragma GCC unroll 2
  for (int at = 0; at < kSums; at += kLanes) {
    Value lanes[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) lanes[l] = sum[at + l];
    Value value = sums_of_lanes(lanes);
    if (!first) value += simd::load<kLanes>(sums + at);
    simd::store<kLanes>(sums + at, value);
  }
}

template <int kLanes, int kColumns, typename scalar_t>
TORCHEXT_INLINE void dot_columns(const DotBlock<scalar_t>& block) {
  static_assert(kColumns <= kLanes);  // the bias and ReLU of a row are a vector's
  using acc_t = acc_type<scalar_t>;
  using Value = simd::Vector<acc_t, kLanes>;
  constexpr bool kSame = std::is_same_v<scalar_t, acc_t>;
  // Of 32 registers half are sums, of AVX2's 16 as well.
  constexpr bool kWide = kLanes * sizeof(acc_t) == simd::Avx512::kBytes;
  constexpr int kNarrowRows = kColumns == 1 ? 8 : kColumns == 2 ? 4 : kColumns <= 4 ? 2 : 1;
  constexpr int kRows = !kWide ? kNarrowRows : kColumns <= 2 ? 8 : kColumns <= 4 ? 4 : 2;
  const Product<scalar_t>& p = *block.product;
  const int64_t rows = block.row_end - block.row;
  const int64_t stretches = divide_up(p.inner, kStretch<scalar_t>);
  const int64_t length = divide_up(divide_up(p.inner, stretches), kLanes) * kLanes;
  const auto first = reinterpret_cast<uintptr_t>(p.right.at(0, block.column));
  const bool anywhere =
      (p.right.column_stride * int64_t{sizeof(scalar_t)}) % 64 != 0 || first % 64 != 0;
  const bool copies = anywhere && rows >= kRowsForCopy;
  const bool far = kColumns > 2 && p.rows * p.inner * int64_t{sizeof(scalar_t)} > kFarBytes;
  for (int64_t begin = 0; begin < p.inner; begin += length) {
    const int64_t steps = std::min(p.inner - begin, length);
    const Matrix<const scalar_t> stands{p.right.at(begin, block.column), 1, p.right.column_stride};
    Matrix<const acc_t> right{block.copy, 1, kCopied<scalar_t>};
    if constexpr (kSame) {
      if (copies) {
        for (int j = 0; j < kColumns; ++j) {
          std::copy_n(stands.at(0, j), steps, block.copy + j * kCopied<scalar_t>);
        }
      } else {
        right = stands;
      }
    } else {
      for (int j = 0; j < kColumns; ++j) {
        const scalar_t* from = stands.at(0, j);
        acc_t* to = block.copy + j * kCopied<scalar_t>;
        int64_t k = 0;
        for (; k + kLanes <= steps; k += kLanes) {
          simd::store<kLanes>(to + k, simd::load<kLanes>(from + k));
        }
        if (k < steps) {
          simd::store<kLanes>(to + k, simd::load_tail<kLanes>(from + k, steps - k, 0));
        }
      }
    }
    int64_t row = 0;
    const auto run = [&](auto height) __attribute__((always_inline)) {
      for (; row + height <= rows; row += height) {
        dot_tile<kLanes, height, kColumns, scalar_t>(
            {p.left.at(block.row + row, begin), p.left.row_stride, 1}, right, steps, begin == 0,
            far, block.sums + row * kColumns);
      }
    };
    run(std::integral_constant<int, kRows>{});
    run(std::integral_constant<int, 1>{});
  }
  // Whole rows that a vector holds at a time, or one.
  constexpr int kAtOnce = kLanes % kColumns == 0 ? kLanes / kColumns : 1;
  scalar_t buffer[kLanes] = {};
  for (int l = 0; p.bias && l < kAtOnce * kColumns; ++l) {
    buffer[l] = p.bias[block.column + l % kColumns];
  }
  const Value bias = simd::load<kLanes>(buffer);
  for (int64_t row = 0; row < rows; row += kAtOnce) {
    Value value = simd::load<kLanes>(block.sums + row * kColumns) + bias;
    const int64_t count = std::min<int64_t>(rows - row, kAtOnce);
    const auto out = [&](int64_t i) __attribute__((always_inline)) {
      return p.out.at(block.row + row + i, block.column);
    };
    if (p.accumulate) {
      for (int64_t i = 0; i < count; ++i) std::copy_n(out(i), kColumns, buffer + i * kColumns);
      value += simd::load<kLanes>(buffer);
    }
    if (p.relu) value = value <= 0 ? Value{} : value;  // NaN stays NaN
    simd::store<kLanes>(buffer, value);
    for (int64_t i = 0; i < count; ++i) std::copy_n(buffer + i * kColumns, kColumns, out(i));
  }
}

#if defined(__x86_64__)
template <typename scalar_t, int kColumns>
[[gnu::target("arch=x86-64-v4"), gnu::noinline]] void block_avx512(
    const DotBlock<scalar_t>& block) {
  dot_columns<simd::kLanesOf<simd::Avx512, scalar_t>, kColumns>(block);
}

template <typename scalar_t, int kColumns>
[[gnu::target("arch=x86-64-v3"), gnu::noinline]] void block_avx2(const DotBlock<scalar_t>& block) {
  dot_columns<simd::kLanesOf<simd::Avx2, scalar_t>, kColumns>(block);
}

template <typename scalar_t, int... kIndex>
void run_columns(const DotBlock<scalar_t>& block, int64_t columns,
                 std::integer_sequence<int, kIndex...>) {
  using Function = void (*)(const DotBlock<scalar_t>&);
  static constexpr Function kWide[] = {block_avx512<scalar_t, kIndex + 1>...};
  constexpr int kLanes = simd::kLanesOf<simd::Avx2, scalar_t>;
  static constexpr Function kNarrow[] = {block_avx2<scalar_t, std::min(kIndex + 1, kLanes)>...};
  const bool wide = simd::level() == simd::Level::kAvx512;
  (wide ? kWide : kNarrow)[columns - 1](block);
}
#endif

}  // namespace

template <typename scalar_t>
void Product<scalar_t>::run_dots() const {
#if defined(__x86_64__)
  if (left.column_stride != 1) {
    Product copied = *this;
    std::vector<scalar_t> copy(rows * inner);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < inner; ++k) copy[i * inner + k] = *left.at(i, k);
    }
    copied.left = {copy.data(), inner, 1};
    return copied.run_dots();
  }
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  // As float32, and as much again to widen them.
  const int64_t bytes = sizeof(scalar_t) == 2 ? 8 : sizeof(scalar_t);
  const int64_t read = inner * columns * bytes;
  const int64_t grain = is_intel() ? kGrainIntel : kGrain;
  const int64_t read_grain = is_intel() ? kReadGrainIntel : kReadGrain;
  const int64_t shares =
      std::clamp<int64_t>(std::max(read / read_grain, rows * read / grain), 1, threads);
  const int64_t row_blocks = divide_up(rows, kBlockRows);
  // With AVX2 half as many sums fit: 4 columns of 2 rows are less to load than 8 of one. Never more
  // than a vector has lanes.
  const bool half =
      simd::level() != simd::Level::kAvx512 && (rows > 1 || std::is_same_v<scalar_t, double>);
  const int64_t most = half ? kMostColumns / 2 : kMostColumns;
  const int64_t column_blocks = divide_up(columns, most);
  const int64_t count = row_blocks * column_blocks;
  for_each_block(count, divide_up(count, shares), [&](int64_t begin, int64_t end) {
    using acc_t = acc_type<scalar_t>;
    // A vector's stores may go past the last row.
    acc_t* sums = scratch<acc_t>(0, kBlockRows * kMostColumns + kPadding<scalar_t>);
    acc_t* copy = scratch<acc_t>(1, kMostColumns * kCopied<scalar_t>);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t across = i % column_blocks, down = i / column_blocks;
      const int64_t column = across * most;
      run_columns<scalar_t>({this, share(rows, row_blocks, down), share(rows, row_blocks, down + 1),
                             column, sums, copy},
                            std::min(columns - column, most),
                            std::make_integer_sequence<int, kMostColumns>{});
    }
  });
#endif
}

template void Product<float>::run_dots() const;
template void Product<double>::run_dots() const;
template void Product<simd::BFloat16>::run_dots() const;
template void Product<simd::Half>::run_dots() const;

}  // namespace torchext::cpu
