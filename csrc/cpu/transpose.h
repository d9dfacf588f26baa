// Squares of numbers turned in registers, and matrices copied so.
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

// What x86 takes from two vectors in one step without indices (unpack, shuf; shuff32x4), twice as
// fast as lanes by index. In each 16 bytes of kSmall numbers, of two vectors a and b: a0 b0 a1 b1
// and the other halves; a0 a1 b0 b1 and the other halves.
template <int kSmall>
inline constexpr auto kFirst =
    [](int i, int lanes) { return i / kSmall * kSmall + i % kSmall / 2 + i % 2 * lanes; };
template <int kSmall>
inline constexpr auto kSecond = [](int i, int lanes) {
  return i / kSmall * kSmall + kSmall / 2 + i % kSmall / 2 + i % 2 * lanes;
};
inline constexpr auto kLow = [](int i, int lanes) { return i / 4 * 4 + i % 2 + i % 4 / 2 * lanes; };
inline constexpr auto kHigh = [](int i, int lanes) {
  return i / 4 * 4 + 2 + i % 2 + i % 4 / 2 * lanes;
};
// Blocks of 16 bytes: both lower halves and both upper ones; the even blocks and the odd ones.
inline constexpr auto kLower = [](int i, int lanes) { return i < lanes / 2 ? i : i + lanes / 2; };
inline constexpr auto kUpper = [](int i, int lanes) {
  return i < lanes / 2 ? i + lanes / 2 : i + lanes;
};
template <int kSmall>
inline constexpr auto kEven = [](int i, int) { return 2 * i - i % kSmall; };
template <int kSmall>
inline constexpr auto kOdd = [](int i, int) { return 2 * i - i % kSmall + kSmall; };

// Numbers of 16 bytes.
template <typename Value>
inline constexpr int kSmallOf = 16 / static_cast<int>(sizeof(Value{}[0]));

// In each 16 bytes of as many vectors as numbers fit into them: those of one vector become the same
// place of all.
template <int kLanes, typename Value>
TORCHEXT_INLINE void transpose_blocks(Value* rows) {
  constexpr int kSmall = kSmallOf<Value>;
  constexpr auto kLanesOfAll = std::make_integer_sequence<int, kLanes>{};
  const auto pick = [&](auto how, Value a, Value b)
                        __attribute__((always_inline)) { return picked(how, a, b, kLanesOfAll); };
  if constexpr (kSmall == 2) {
    const Value a = rows[0], b = rows[1];
    rows[0] = pick(kFirst<kSmall>, a, b);
    rows[1] = pick(kSecond<kSmall>, a, b);
  } else {
    const Value a = pick(kFirst<kSmall>, rows[0], rows[1]);
    const Value b = pick(kSecond<kSmall>, rows[0], rows[1]);
    const Value c = pick(kFirst<kSmall>, rows[2], rows[3]);
    const Value d = pick(kSecond<kSmall>, rows[2], rows[3]);
    rows[0] = pick(kLow, a, c);
    rows[1] = pick(kHigh, a, c);
    rows[2] = pick(kLow, b, d);
    rows[3] = pick(kHigh, b, d);
  }
}

// Turns a square of kLanes vectors: 16 bytes of each at a time, and then the squares of those.
template <int kLanes, typename Value>
TORCHEXT_INLINE void transpose_square(Value (&rows)[kLanes]) {
  constexpr int kSmall = kSmallOf<Value>, kBlocks = kLanes / kSmall;
  constexpr auto kLanesOfAll = std::make_integer_sequence<int, kLanes>{};
  const auto pick = [&](auto how, Value a, Value b)
                        __attribute__((always_inline)) { return picked(how, a, b, kLanesOfAll); };
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; r += kSmall) transpose_blocks<kLanes>(rows + r);
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
      rows[r] = pick(kEven<kSmall>, e, g);
      rows[r + kSmall] = pick(kOdd<kSmall>, e, g);
      rows[r + 2 * kSmall] = pick(kEven<kSmall>, f, h);
      rows[r + 3 * kSmall] = pick(kOdd<kSmall>, f, h);
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

// The same of rows of `count` numbers, fewer than kLanes: zeros stand past them.
template <int kLanes, typename scalar_t, typename Row>
TORCHEXT_INLINE void load_short_turned(Row row, int64_t count,
                                       simd::Vector<acc_type<scalar_t>, kLanes> (&turned)[kLanes]) {
#pragma GCC unroll 16
  for (int l = 0; l < kLanes; ++l) turned[l] = simd::load_tail<kLanes>(row(l), count, 0);
  transpose_square(turned);
}

// A square of float32 in AVX-512, where the blocks of 16 bytes are put where they belong as they
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
// The last squares overlap the ones before them.
template <int kLanes, typename From, typename To>
TORCHEXT_INLINE void copy_transposed(Matrix<From> from, int64_t rows, int64_t columns, To* to,
                                     int64_t to_stride) {
  using scalar_t = std::remove_const_t<From>;
  if (rows < kLanes || columns < kLanes) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        to[j * to_stride + i] = static_cast<To>(wide<scalar_t>(*from.at(i, j)));
      }
    }
    return;
  }
  for (int64_t begin = 0; begin < rows; begin += kLanes) {
    const int64_t i = std::min(begin, rows - kLanes);
    for (int64_t at = 0; at < columns; at += kLanes) {
      const int64_t j = std::min(at, columns - kLanes);
      simd::Vector<acc_type<scalar_t>, kLanes> square[kLanes];
      const auto row = [&](int l) __attribute__((always_inline)) { return from.at(i + l, j); };
      load_turned<kLanes, scalar_t>(row, square);
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) simd::store<kLanes>(to + (j + l) * to_stride + i, square[l]);
    }
  }
}

}  // namespace torchext::cpu
