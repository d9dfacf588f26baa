// exp and tanh of vectors.
#pragma once

#include <iterator>

#include "cpu/simd.h"

namespace torchext::simd {

// exp(x) for x <= 0 and NaN: below the smallest normal result it is 0. Within 0.9 ulp
// with FMA, 1.2 without. The polynomial: least maximal error relative to exp over |r| <= ln(2)/2
// with the first two terms given, 3e-9.
template <int kLanes>
TORCHEXT_INLINE Vector<float, kLanes> exp_nonpositive(Vector<float, kLanes> x) {
  using Bits = Vector<uint32_t, kLanes>;
  using Float = Vector<float, kLanes>;
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits of the sum: with the exponent's
  // bias in it, it needs only a shift to be a power of two.
  constexpr float kMagic = 12582912.0f + 127.0f;
  const Float shifted = x * 1.44269504088896341f + kMagic;
  const Float n = shifted - kMagic;
  Float r = x - n * 0.693359375f;  // ln 2 in two parts, the first exact in few bits
  r = r - n * -2.12194440e-4f;
  Float p = r * 1.3814583947e-3f + 8.3687239412e-3f;
  p = p * r + 4.1668388732e-2f;
  p = p * r + 1.6666520574e-1f;
  p = p * r + 4.9999993444e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Float scale = bits_as<Float>(bits_as<Bits>(shifted) << 23);
  return x < -87.33654f ? Float{} : p * scale;
}

template <int kLanes>
TORCHEXT_INLINE Vector<double, kLanes> exp_nonpositive(Vector<double, kLanes> x) {
  using Bits = Vector<uint64_t, kLanes>;
  using Double = Vector<double, kLanes>;
  const Double shifted = x * 1.4426950408889634074 + 6755399441055744.0;
  const Double n = shifted - 6755399441055744.0;
  Double r = x - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  // Taylor to r^13: |r| <= ln(2)/2, the next term is below 2^-57.
  constexpr double kInverseFactorial[] = {
      1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
      1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2};
  Double p = Double{} + kInverseFactorial[0];
  for (int i = 1; i < 12; ++i) p = p * r + kInverseFactorial[i];
  p = p * (r * r) + r + 1.0;
  const Double scale = bits_as<Double>((bits_as<Bits>(shifted) << 52) + (uint64_t{1023} << 52));
  return x < -708.39641853226408 ? Double{} : p * scale;
}

// tanh(x) where |x| < kSmallTanh: a polynomial, of the least maximal error relative to tanh (below
// 5e-9, and 4e-19 in double).
template <typename T>
inline constexpr T kSmallTanh = T(0.625);

template <int kLanes, typename T>
TORCHEXT_INLINE Vector<T, kLanes> tanh_small(Vector<T, kLanes> x) {
  constexpr T kFloat[] = {-5.7049777498e-3f, 2.0639077823e-2f, -5.3739711703e-2f, 1.3331442149e-1f,
                          -3.3333281940e-1f};
  constexpr T kDouble[] = {
      6.04235231917113504e-6,  -3.01869320624076433e-5, 9.15580965971145908e-5,
      -2.37011531377039997e-4, 5.89451718991336369e-4,  -1.45572592668223498e-3,
      3.59211399602972868e-3,  -8.86323431211845552e-3, 2.18694884686800183e-2,
      -5.39682539660572692e-2, 1.33333333333297388e-1,  -3.33333333333333128e-1};
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  constexpr int kTerms = kIsFloat ? std::size(kFloat) : std::size(kDouble);
  const Vector<T, kLanes> square = x * x;
  Vector<T, kLanes> p = {};
  for (int i = 0; i < kTerms; ++i) p = p * square + (kIsFloat ? kFloat[i] : kDouble[i]);
  return x + x * square * p;
}

// tanh(x), odd, never beyond 1, within 1.5 ulp: of large x 1 - 2 e / (1 + e), e = exp(-2 |x|). And
// its derivative, 4 e / (1 + e)^2, within 5 ulp: 1 - tanh(x)^2 of large x has nothing left but
// tanh's rounding.
template <int kLanes, typename T>
TORCHEXT_INLINE Vector<T, kLanes> tanh(Vector<T, kLanes> x, Vector<T, kLanes>& slope) {
  using Value = Vector<T, kLanes>;
  const Value size = x < T{0} ? -x : x;
  const Value e = exp_nonpositive<kLanes>(size * T{-2});
  const Value inverse = T{2} / (T{1} + e);
  const Value below = e * inverse;
  slope = below * inverse;
  const Value large = T{1} - below;
  const Value small = tanh_small<kLanes, T>(x);
  return size < kSmallTanh<T> ? small : (x < T{0} ? -large : large);
}

template <typename T>
TORCHEXT_INLINE T exp_nonpositive_scalar(T x) {
  // The same arithmetic as in the vectors, so that a lane and a scalar agree to the bit.
  constexpr int kLanes = 16 / static_cast<int>(sizeof(T));
  return exp_nonpositive<kLanes>(Vector<T, kLanes>{} + x)[0];
}

}  // namespace torchext::simd
