// Products of few rows by a matrix whose columns are contiguous, as a weight's are forward. Packing
// would cost more than the product: squares are turned in registers and multiplied there. The sums
// are those of product_tile, in the same order: a row's bits do not depend on the rows beside it.
// Of the time with packed panels forward takes, for 2, 4 and 8 rows by 1024 x 128 weights, 0.60,
// 0.69 and 0.80 in float32, 0.49, 0.61 and 0.79 in float64, and with AVX2 0.52 and 0.58 for 2 and 4
// (a core of an Intel Xeon of family 6, model 207).
#include "cpu/dispatch.h"
#include "cpu/product_row.h"

namespace torchext::cpu {
namespace {

// Steps from which on a single row is one of few with AVX-512, too, not of product_row.h, which has
// two vectors of columns at a time: 1 x 2047 x 32 takes 12.1 us so and 20.4, 1 x 1024 x 200 16.5
// and 22.5, in float64 1 x 2047 x 256 48 and 87, but 1 x 784 x 512 39 and 35 (2 cores of Zen 4).
constexpr int64_t kLongRow = 1000;
// So is one by a matrix of more bytes, beyond the second cache: 1 x 784 x 1000 takes 108 us so and
// 164, 1 x 784 x 512 66 and 85, in float16 1 x 784 x 1000 91 and 130.
constexpr int64_t kFarBytes = int64_t{1} << 20;
// Steps of such a matrix of 16-bit numbers that are fetched ahead, where a square has half a line
// of each column: float16 2 x 784 x 1000 takes 98 us so and 117, 1 x 1024 x 1024 110 and 132. In
// float32 it makes no difference.
constexpr int64_t kAhead = 64;
// The fewest rows.
template <class Isa>
inline constexpr int kFewest = Isa::kBytes == 64 ? 1 : 2;

// Rows up to which the sums of a vector of columns stay in registers, beside a square.
template <class Isa>
inline constexpr int kFewOf = Isa::kBytes == 64   ? 8
                              : Isa::kBytes == 32 ? 6
                                                  : 2;

template <typename scalar_t>
bool is_far(const Product<scalar_t>& p) {
  return p.inner * p.columns * int64_t{sizeof(scalar_t)} > kFarBytes;
}

// The columns of kVectors vectors from `column` on, of which only the first ones are out's where
// not kWhole.
template <class Isa, typename scalar_t, int kRows, int kVectors, bool kWhole>
TORCHEXT_INLINE void few_columns(const RowProduct<scalar_t>& few, int64_t column) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = simd::Vector<acc_t, kLanes>;
  const Product<scalar_t>& p = *few.product;
  const Parts<acc_t> parts(p.inner);
  const int64_t stride = p.right.column_stride, step = few.left_stride;
  const int64_t last = std::min<int64_t>(kLanes, p.columns - column) - 1;
  const bool fetches = sizeof(scalar_t) == 2 && is_far(p);
  const auto turn = [&](int64_t k, int v, Value(&square)[kLanes]) __attribute__((always_inline)) {
    const scalar_t* first = p.right.at(k, column + v * kLanes);
    load_turned<kLanes, scalar_t>(
        [&](int l) __attribute__((always_inline)) {
          // Four from one address: see product_tile.
          return kWhole ? (first + l / 4 * 4 * stride) + l % 4 * stride
                        : first + std::min<int64_t>(l, last) * stride;
        },
        square);
  };
  const auto for_all = [&](auto use) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) use(i, v);
    }
  };
  Value carried[kRows][kVectors];
  if (p.accumulate) {
    for_all([&](int i, int v) __attribute__((always_inline)) {
      carried[i][v] = read_out<kLanes>(p, i, column + v * kLanes);
    });
  }
  for (int64_t visit = 0; visit < parts.visits; ++visit) {
    Value sum[kRows][kVectors], total[kRows][kVectors];
    const int64_t first_part = parts.first_of(visit), end_part = parts.first_of(visit + 1);
    for (int64_t part = first_part; part < end_part; ++part) {
      if (part > first_part) {
        for_all([&](int i, int v) __attribute__((always_inline)) {
          total[i][v] = part == first_part + 1 ? sum[i][v] : total[i][v] + sum[i][v];
        });
      }
      for_all([&](int i, int v) __attribute__((always_inline)) { sum[i][v] = Value{}; });
      int64_t k = parts.begin_of(part);
      const int64_t end = parts.begin_of(part + 1);
      for (; k + kLanes <= end; k += kLanes) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          Value square[kLanes];
          if (fetches) {
            const scalar_t* ahead = p.right.at(k + kAhead, column + v * kLanes);
            for (int l = 0; l < kLanes; ++l) __builtin_prefetch(ahead + l * stride);
          }
          turn(k, v, square);
#pragma GCC unroll 16
          for (int l = 0; l < kLanes; ++l) {
            const acc_t* x = few.left + k + l;
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
              sum[i][v] +=
                  simd::broadcast<Value>((x + i / 4 * 4 * step) + i % 4 * step) * square[l];
            }
          }
        }
      }
      if (k == end) continue;
      // A square that ends here, for its last steps.
      for (int v = 0; v < kVectors; ++v) {
        Value square[kLanes];
        turn(end - kLanes, v, square);
        for (int64_t at = k; at < end; ++at) {
          const Value value = square[kLanes - (end - at)];
          for (int i = 0; i < kRows; ++i) {
            sum[i][v] += simd::broadcast<Value>(few.left + i * step + at) * value;
          }
        }
      }
    }
    const bool accumulate = p.accumulate || visit > 0, ends = visit + 1 == parts.visits;
    for_all([&](int i, int v) __attribute__((always_inline)) {
      finish_row<kLanes>(p, i, column + v * kLanes, sum[i][v],
                         end_part - first_part > 1 ? &total[i][v] : nullptr, carried[i][v],
                         accumulate, ends);
    });
  }
}

// Vectors [begin, end) of columns. Of few rows several at a time, as a sum waits for the one
// before, but not with AVX-512: 2 x 100 x 1024 takes 16.5 us by one and 22.7 by two (Zen 4,
// float32).
template <class Isa, typename scalar_t, int kRows>
TORCHEXT_INLINE void few_vectors(const RowProduct<scalar_t>& few, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>,
                kVectors = Isa::kBytes < 64 && (kRows == 2 || (kRows == 3 && kLanes <= 4)) ? 2 : 1;
  const int64_t whole = std::min(end, few.product->columns / kLanes);
  int64_t v = begin;
  for (; v + kVectors <= whole; v += kVectors) {
    few_columns<Isa, scalar_t, kRows, kVectors, true>(few, v * kLanes);
  }
  if constexpr (kVectors > 1) {
    for (; v < whole; ++v) few_columns<Isa, scalar_t, kRows, 1, true>(few, v * kLanes);
  }
  if (v < end) few_columns<Isa, scalar_t, kRows, 1, false>(few, v * kLanes);
}

// A function for every number of rows: inlined into one, sums would not stay in registers.
template <class Isa, typename scalar_t, int kRows>
struct FewRowsOf {
  [[gnu::noinline]] static void run(const RowProduct<scalar_t>& few, int64_t begin, int64_t end) {
    few_vectors<Isa, scalar_t, kRows>(few, begin, end);
  }
};
#if defined(__x86_64__)
template <typename scalar_t, int kRows>
struct FewRowsOf<simd::Avx2, scalar_t, kRows> {
  [[gnu::target("arch=x86-64-v3"), gnu::noinline]] static void run(const RowProduct<scalar_t>& few,
                                                                   int64_t begin, int64_t end) {
    few_vectors<simd::Avx2, scalar_t, kRows>(few, begin, end);
  }
};
template <typename scalar_t, int kRows>
struct FewRowsOf<simd::Avx512, scalar_t, kRows> {
  [[gnu::target("arch=x86-64-v4"), gnu::noinline]] static void run(const RowProduct<scalar_t>& few,
                                                                   int64_t begin, int64_t end) {
    few_vectors<simd::Avx512, scalar_t, kRows>(few, begin, end);
  }
};
#endif

template <class Isa, typename scalar_t, int... kIndex>
TORCHEXT_INLINE void few_rows_of(const RowProduct<scalar_t>& few, int64_t begin, int64_t end,
                                 std::integer_sequence<int, kIndex...>) {
  static constexpr void (*kFunctions[])(const RowProduct<scalar_t>&, int64_t, int64_t) = {
      FewRowsOf<Isa, scalar_t, kIndex + kFewest<Isa>>::run...};
  kFunctions[few.product->rows - kFewest<Isa>](few, begin, end);
}

// Vectors [begin, end) of columns.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void few_rows(const RowProduct<scalar_t>& few, int64_t begin, int64_t end) {
  few_rows_of<Isa>(few, begin, end,
                   std::make_integer_sequence<int, kFewOf<Isa> - kFewest<Isa> + 1>{});
}
TORCHEXT_SIMD_FUNCTION(run_few, few_rows, RowProduct)

// The baseline has no products of ours (`product_may_serve`).
template <class Isa, typename scalar_t>
bool serves(const Product<scalar_t>& p) {
  const int64_t shortest = p.rows == 1 && !is_far(p) ? kLongRow : simd::kLanesOf<Isa, scalar_t>;
  return p.rows >= kFewest<Isa> && p.rows <= kFewOf<Isa> && p.inner >= shortest;
}

}  // namespace

template <typename scalar_t>
bool Product<scalar_t>::has_few_rows() const {
  if (right.row_stride != 1 || right.column_stride == 1) return false;
  switch (simd::level()) {
    case simd::Level::kAvx512:
      return serves<simd::Avx512>(*this);
    case simd::Level::kAvx2:
      return serves<simd::Avx2>(*this);
    default:
      return false;
  }
}

template <typename scalar_t>
void Product<scalar_t>::run_few_rows() const {
  const int64_t bytes = simd::level() == simd::Level::kAvx512 ? 64 : 32;
  const int64_t vectors = divide_up(columns, bytes / int64_t{sizeof(acc_type<scalar_t>)});
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t shares =
      std::clamp<int64_t>((rows + 3) / 4 * inner * columns / turned_grain(), 1, threads);
  const RowProduct<scalar_t> few = row_product(*this);
  for_each_block(vectors, divide_up(vectors, shares),
                 [&](int64_t begin, int64_t end) { run_few<scalar_t>(few, begin, end); });
}

template bool Product<float>::has_few_rows() const;
template bool Product<double>::has_few_rows() const;
template bool Product<simd::BFloat16>::has_few_rows() const;
template bool Product<simd::Half>::has_few_rows() const;
template void Product<float>::run_few_rows() const;
template void Product<double>::run_few_rows() const;
template void Product<simd::BFloat16>::run_few_rows() const;
template void Product<simd::Half>::run_few_rows() const;

}  // namespace torchext::cpu
