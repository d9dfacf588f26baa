// Copies of matrices as product_kernel.h and product_pairs.h read them: panels of the right one and
// strips of the left one, of bfloat16 and float16 in float32.
#pragma once

#include <algorithm>
#include <utility>

#include "cpu/product.h"
#include "cpu/simd.h"

namespace torchext::cpu {

using simd::acc_type;

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

// In each 16 bytes of as many vectors as numbers fit into them: those of one vector become the same
// place of all. Made of what x86 shuffles in one step without indices (unpack, shuf), twice as fast
// as what takes lanes by index.
template <int kLanes, typename Value>
TORCHEXT_INLINE void transpose_blocks(Value* rows) {
  constexpr int kSmall = 16 / static_cast<int>(sizeof(rows[0][0]));
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
  if constexpr (kSmall == 2) {
    const Value a = rows[0], b = rows[1];
    rows[0] = pick(kFirst, a, b);
    rows[1] = pick(kSecond, a, b);
  } else {
    const Value a = pick(kFirst, rows[0], rows[1]), b = pick(kSecond, rows[0], rows[1]);
    const Value c = pick(kFirst, rows[2], rows[3]), d = pick(kSecond, rows[2], rows[3]);
    rows[0] = pick(kLow, a, c);
    rows[1] = pick(kHigh, a, c);
    rows[2] = pick(kLow, b, d);
    rows[3] = pick(kHigh, b, d);
  }
}

// Turns a square of kLanes vectors: 16 bytes of each at a time, and then the squares of those
// (shuff32x4).
template <int kLanes, typename Value>
TORCHEXT_INLINE void transpose_square(Value (&rows)[kLanes]) {
  constexpr int kSmall = 16 / static_cast<int>(sizeof(rows[0][0])), kBlocks = kLanes / kSmall;
  constexpr auto kLanesOfAll = std::make_integer_sequence<int, kLanes>{};
  const auto pick = [&](auto how, Value a, Value b)
                        __attribute__((always_inline)) { return picked(how, a, b, kLanesOfAll); };
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; r += kSmall) transpose_blocks<kLanes>(rows + r);
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

// A square, turned, of kLanes rows in memory: `row(l)` is where kLanes numbers of row l stand.
template <int kLanes, typename scalar_t, typename Row>
TORCHEXT_INLINE void load_turned(Row row,
                                 simd::Vector<acc_type<scalar_t>, kLanes> (&turned)[kLanes]) {
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) turned[l] = simd::load<kLanes>(row(l));
  transpose_square(turned);
}

// The same of float32 in AVX-512, where the blocks of 16 bytes are put where they belong as they
// are loaded: half the shuffles are left, for which Intel's processors have one port. linear_relu
// forward of 4 x 784 x 64 takes 14 us so and 18, of 4 x 300 x 256 20 and 26 (2 cores of a Xeon of
// family 6, model 207). Each line is read four times, so the rows must not all begin in one set of
// the first cache.
template <typename Row>
TORCHEXT_INLINE void load_turned_blocks(Row row, simd::Vector<float, 16> (&turned)[16]) {
#if defined(__x86_64__)
  using Block = const char (*)[16];
#pragma GCC unroll 4
  for (int q = 0; q < 16; q += 4) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      asm("vmovups %1, %x0\n\t"
          "vinsertf32x4 $1, %2, %0, %0\n\t"
          "vinsertf32x4 $2, %3, %0, %0\n\t"
          "vinsertf32x4 $3, %4, %0, %0"
          : "=&v"(turned[q + r])
          : "m"(*reinterpret_cast<Block>(row(r) + q)),
            "m"(*reinterpret_cast<Block>(row(r + 4) + q)),
            "m"(*reinterpret_cast<Block>(row(r + 8) + q)),
            "m"(*reinterpret_cast<Block>(row(r + 12) + q)));
    }
    transpose_blocks<16>(turned + q);
  }
#endif
}

// Whether they are faster here for rows so many numbers apart.
template <typename scalar_t, int kLanes>
bool turns_blocks(int64_t stride) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<scalar_t, float> && kLanes == 16) {
    static const bool intel = __builtin_cpu_is("intel");
    return intel && stride % 1024 != 0;
  }
#endif
  return false;
}

template <typename scalar_t>
TORCHEXT_INLINE acc_type<scalar_t> wide(scalar_t value) {
  return static_cast<acc_type<scalar_t>>(value);
}

// Copies rows [0, rows) and columns [0, columns) of a matrix to `to`, element (i, j) to
// to[j * to_stride + i]: the matrix's own rows are contiguous, those of the copy are its columns.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void copy_transposed(Matrix<const scalar_t> from, int64_t rows, int64_t columns,
                                     acc_type<scalar_t>* to, int64_t to_stride) {
  using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
  int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      Value square[kLanes];
      const auto row = [&](int l) __attribute__((always_inline)) { return from.at(i + l, j); };
      load_turned<kLanes, scalar_t>(row, square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) simd::store<kLanes>(to + (j + l) * to_stride + i, square[l]);
    }
    for (; j < columns; ++j) {
      for (int l = 0; l < kLanes; ++l) to[j * to_stride + i + l] = wide(*from.at(i + l, j));
    }
  }
  for (; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) to[j * to_stride + i] = wide(*from.at(i, j));
  }
}

// Inner steps of a panel of `count` contiguous columns at `from`, in rows `stride` apart, of which
// `width` columns can be read: past the panel's own stands the next row.
inline int64_t readable_steps(int64_t inner, int64_t stride, int64_t count, int64_t width) {
  if (count >= width) return inner;
  return stride == 0 ? 0 : std::max<int64_t>(0, inner - (width - count + stride - 1) / stride);
}

// A panel (inner, kPanel) of `count` columns; past them stands what no sum comes from.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_panel(Matrix<const scalar_t> from, int64_t inner, int64_t count,
                                acc_type<scalar_t>* to) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>, kPanel = 2 * kLanes;
  if (from.column_stride != 1 && from.row_stride == 1) {
    using Value = simd::Vector<acc_type<scalar_t>, kLanes>;
    const bool blocks = turns_blocks<scalar_t, kLanes>(from.column_stride);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t last = std::min<int64_t>(kLanes, count - i) - 1;  // again in the lanes past it
      int64_t k = 0;
      for (; k + kLanes <= inner; k += kLanes) {
        Value square[kLanes];
        const scalar_t* first = from.at(k, i);
        const int64_t stride = from.column_stride;
        // Four from one address: see product_tile.
        const auto row = [&](int l) __attribute__((always_inline)) {
          return (first + l / 4 * 4 * stride) + l % 4 * stride;
        };
        const auto row_or_last = [&](int l) __attribute__((always_inline)) {
          return first + std::min<int64_t>(l, last) * stride;
        };
        if (last == kLanes - 1 && blocks) {
          if constexpr (std::is_same_v<Value, simd::Vector<float, 16>> &&
                        std::is_same_v<scalar_t, float>) {
            load_turned_blocks(row, square);
          }
        } else if (last == kLanes - 1) {
          load_turned<kLanes, scalar_t>(row, square);
        } else {
          load_turned<kLanes, scalar_t>(row_or_last, square);
        }
#pragma GCC unroll 16
        for (int l = 0; l < kLanes; ++l) simd::store<kLanes>(to + (k + l) * kPanel + i, square[l]);
      }
      for (; k < inner; ++k) {
        for (int64_t l = 0; l < kLanes; ++l) {
          to[k * kPanel + i + l] = wide(*from.at(k, i + std::min(l, last)));
        }
      }
    }
    return;
  }
  const int64_t whole =
      from.column_stride == 1 ? readable_steps(inner, from.row_stride, count, kPanel) : 0;
  for (int64_t k = 0; k < inner; ++k, to += kPanel) {
    if (k < whole) {
      __builtin_prefetch(from.at(k + 16, 0));
      __builtin_prefetch(from.at(k + 16, kLanes));
      simd::store<kLanes>(to, simd::load<kLanes>(from.at(k, 0)));
      simd::store<kLanes>(to + kLanes, simd::load<kLanes>(from.at(k, kLanes)));
    } else {
      for (int64_t j = 0; j < count; ++j) to[j] = wide(*from.at(k, j));
      std::fill(to + count, to + kPanel, acc_type<scalar_t>{0});
    }
  }
}

// A strip (inner, rows): what a tile reads stands side by side.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void pack_strip(Matrix<const scalar_t> from, int64_t rows, int64_t inner,
                                acc_type<scalar_t>* to) {
  // Strips are short.
  constexpr int kLanes = sizeof(scalar_t) == 2 && Isa::kBytes >= 32 ? 8 : 16 / sizeof(*to);
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
    for (int64_t i = 0; i < rows; ++i) to[k * rows + i] = wide(*from.at(i, k));
  }
}

// Rows [0, rows) of a matrix whose rows are contiguous, `to_stride` apart in the copy.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void copy_rows(Matrix<const scalar_t> from, int64_t rows, int64_t columns,
                               acc_type<scalar_t>* to, int64_t to_stride) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  for (int64_t i = 0; i < rows; ++i, to += to_stride) {
    int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      simd::store<kLanes>(to + j, simd::load<kLanes>(from.at(i, j)));
    }
    for (; j < columns; ++j) to[j] = wide(*from.at(i, j));
  }
}

}  // namespace torchext::cpu
