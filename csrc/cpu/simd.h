// Explicit SIMD on GCC/Clang vector extensions, with the instruction set chosen at run time.
//
// A kernel is a template over an instruction set `Isa`, all of it TORCHEXT_INLINE, and one plain
// function per instruction set (TORCHEXT_SIMD_FUNCTION) that the compiler builds for that target.
// Explicit vectors instead of -ffast-math: the order of every sum is fixed, so a row's result
// depends on nothing but the row, and NaN and infinity keep their meaning.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

// Vectors wider than the baseline's registers are passed by value only between inlined functions.
#pragma GCC diagnostic ignored "-Wpsabi"

#define TORCHEXT_INLINE [[gnu::always_inline]] inline

namespace torchext::simd {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

struct Baseline {
  static constexpr int kBytes = 16;
};
struct Avx2 {
  static constexpr int kBytes = 32;
};
struct Avx512 {
  static constexpr int kBytes = 64;
};

enum class Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The features of x86-64-v4 and -v3 that no processor has without the others; the levels' own names
// are unknown to g++ 11.
inline Level detect_level() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") ||
      !__builtin_cpu_supports("bmi2")) {
    return Level::kBaseline;
  }
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl")
             ? Level::kAvx512
             : Level::kAvx2;
#else
  return Level::kBaseline;
#endif
}

// What the machine has, or less where ATEN_CPU_CAPABILITY says so, as it does to torch's own
// kernels.
inline Level level() {
  static const Level chosen = [] {
    const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
    const Level most = !wanted                               ? Level::kAvx512
                       : std::strcmp(wanted, "default") == 0 ? Level::kBaseline
                       : std::strcmp(wanted, "avx2") == 0    ? Level::kAvx2
                                                             : Level::kAvx512;
    return std::min(most, detect_level());
  }();
  return chosen;
}

// Defines `name<scalar_t>(args, begin, end)`, which runs `body<Isa, scalar_t>(args, begin, end)`.
#if defined(__x86_64__)
#define TORCHEXT_SIMD_FUNCTION(name, body, Args)                                                   \
  template <typename scalar_t>                                                                     \
  [[gnu::target("arch=x86-64-v4"), gnu::noinline]] void name##_avx512(                             \
      const Args<scalar_t>& args, int64_t begin, int64_t end) {                                    \
    body<::torchext::simd::Avx512, scalar_t>(args, begin, end);                                    \
  }                                                                                                \
  template <typename scalar_t>                                                                     \
  [[gnu::target("arch=x86-64-v3"), gnu::noinline]] void name##_avx2(const Args<scalar_t>& args,    \
                                                                    int64_t begin, int64_t end) {  \
    body<::torchext::simd::Avx2, scalar_t>(args, begin, end);                                      \
  }                                                                                                \
  template <typename scalar_t>                                                                     \
  [[gnu::noinline]] void name##_baseline(const Args<scalar_t>& args, int64_t begin, int64_t end) { \
    body<::torchext::simd::Baseline, scalar_t>(args, begin, end);                                  \
  }                                                                                                \
  template <typename scalar_t>                                                                     \
  void name(const Args<scalar_t>& args, int64_t begin, int64_t end) {                              \
    switch (::torchext::simd::level()) {                                                           \
      case ::torchext::simd::Level::kAvx512:                                                       \
        return name##_avx512<scalar_t>(args, begin, end);                                          \
      case ::torchext::simd::Level::kAvx2:                                                         \
        return name##_avx2<scalar_t>(args, begin, end);                                            \
      default:                                                                                     \
        return name##_baseline<scalar_t>(args, begin, end);                                        \
    }                                                                                              \
  }
#else
#define TORCHEXT_SIMD_FUNCTION(name, body, Args)                      \
  template <typename scalar_t>                                        \
  void name(const Args<scalar_t>& args, int64_t begin, int64_t end) { \
    body<::torchext::simd::Baseline, scalar_t>(args, begin, end);     \
  }
#endif

// What sums and exponentials are computed in.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T, int kLanes>
struct VectorOf {
  typedef T type [[gnu::vector_size(kLanes * sizeof(T))]];
};
template <typename T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

// Lanes of the accumulation type in one register.
template <class Isa, typename scalar_t>
inline constexpr int kLanesOf = Isa::kBytes / static_cast<int>(sizeof(acc_type<scalar_t>));

template <typename To, typename From>
TORCHEXT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(from);
}

template <typename T, int kLanes>
TORCHEXT_INLINE Vector<T, kLanes> load_raw(const T* pointer) {
  Vector<T, kLanes> value;
  __builtin_memcpy(&value, pointer, sizeof(value));
  return value;
}

template <typename Bits, typename T>
TORCHEXT_INLINE void store_raw(T* pointer, Bits value) {
  __builtin_memcpy(pointer, &value, sizeof(value));
}

// What stands in memory, in all lanes of `Value`. Assembly: of `Value{} + *from` GCC makes a
// broadcast of a register, for which Intel's processors have the port of every second
// multiplication. 256 x 256 by 256 x 256 takes 384 us so and 211 from memory (float32, one core).
template <typename Value, typename T>
TORCHEXT_INLINE Value broadcast(const T* from) {
#if defined(__x86_64__)
  Value value;
  if constexpr (sizeof(Value) > 16 && sizeof(T) == 4) {
    asm("vbroadcastss %1, %0" : "=v"(value) : "m"(*from));
    return value;
  } else if constexpr (sizeof(Value) > 16 && sizeof(T) == 8) {
    asm("vbroadcastsd %1, %0" : "=v"(value) : "m"(*from));
    return value;
  }
#endif
  return Value{} + *from;
}

// IEEE half to float and back on integers, branch-free (the subnormals by one exact subtraction).
template <int kLanes>
TORCHEXT_INLINE Vector<float, kLanes> half_to_float(Vector<uint32_t, kLanes> half) {
  using Bits = Vector<uint32_t, kLanes>;
  using Float = Vector<float, kLanes>;
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Bits exponent = magnitude & 0x0f800000u;
  const Bits normal = magnitude + 0x38000000u;  // rebias by 127 - 15
  const Bits infinite = magnitude + 0x70000000u;
  const Float subnormal =
      bits_as<Float>(normal + 0x00800000u) - bits_as<Float>(Bits{} + 0x38800000u);
  const Bits finite = exponent == 0u ? bits_as<Bits>(subnormal) : normal;
  const Bits result = exponent == 0x0f800000u ? infinite : finite;
  return bits_as<Float>(result | ((half & 0x8000u) << 16));
}

template <int kLanes>
TORCHEXT_INLINE Vector<uint32_t, kLanes> float_to_half(Vector<float, kLanes> value) {
  using Bits = Vector<uint32_t, kLanes>;
  using Float = Vector<float, kLanes>;
  const Bits bits = bits_as<Bits>(value);
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits magic = Bits{} + 0x3f000000u;  // 0.5: adding it rounds a subnormal half to an integer
  const Bits subnormal = bits_as<Bits>(bits_as<Float>(magnitude) + bits_as<Float>(magic)) - magic;
  const Bits odd = (magnitude >> 13) & 1u;
  const Bits normal = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  const Bits finite = magnitude < 0x38800000u ? subnormal : normal;
  const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits result = magnitude >= 0x47800000u ? special : finite;
  return result | ((bits & 0x80000000u) >> 16);
}

template <int kLanes>
TORCHEXT_INLINE Vector<uint32_t, kLanes> float_to_bfloat16(Vector<float, kLanes> value) {
  using Bits = Vector<uint32_t, kLanes>;
  const Bits bits = bits_as<Bits>(value);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? Bits{} + 0x7fc0u : rounded;
}

// Whether the processor converts vectors of float16: AVX2's and AVX-512's do (F16C). Assembly, as
// the compiler's names for it want the target of the function that they are inlined in.
template <typename scalar_t, int kLanes>
inline constexpr bool kHalfConversions = std::is_same_v<scalar_t, Half> && kLanes >= 8;

// The float values of bfloat16 or float16 bits.
template <typename scalar_t, int kLanes>
TORCHEXT_INLINE Vector<float, kLanes> widen(Vector<uint16_t, kLanes> narrow) {
#if defined(__x86_64__)
  if constexpr (kHalfConversions<scalar_t, kLanes>) {
    Vector<float, kLanes> value;
    asm("vcvtph2ps %1, %0" : "=v"(value) : "v"(narrow));
    return value;
  }
#endif
  const auto wide = __builtin_convertvector(narrow, Vector<uint32_t, kLanes>);
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    return bits_as<Vector<float, kLanes>>(wide << 16);
  } else {
    return half_to_float<kLanes>(wide);
  }
}

// Loads and stores convert between the tensor's dtype and the accumulation type.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE Vector<acc_type<scalar_t>, kLanes> load(const scalar_t* pointer) {
  if constexpr (std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    return load_raw<scalar_t, kLanes>(pointer);
  } else {
    return widen<scalar_t, kLanes>(
        load_raw<uint16_t, kLanes>(reinterpret_cast<const uint16_t*>(pointer)));
  }
}

template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void store(scalar_t* pointer, Vector<acc_type<scalar_t>, kLanes> value) {
  if constexpr (std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    __builtin_memcpy(pointer, &value, sizeof(value));
  } else {
#if defined(__x86_64__)
    if constexpr (kHalfConversions<scalar_t, kLanes>) {
      Vector<uint16_t, kLanes> nearest;
      asm("vcvtps2ph $0, %1, %0" : "=v"(nearest) : "v"(value));
      __builtin_memcpy(pointer, &nearest, sizeof(nearest));
      return;
    }
#endif
    Vector<uint32_t, kLanes> wide;
    if constexpr (std::is_same_v<scalar_t, BFloat16>) {
      wide = float_to_bfloat16<kLanes>(value);
    } else {
      wide = float_to_half<kLanes>(value);
    }
    const auto narrow = __builtin_convertvector(wide, Vector<uint16_t, kLanes>);
    __builtin_memcpy(pointer, &narrow, sizeof(narrow));
  }
}

// Whether part of a vector of `scalar_t` is loaded and stored by one instruction: AVX-512's, under
// a mask.
template <typename scalar_t, int kLanes>
inline constexpr bool kMasked =
#if defined(__x86_64__)
    sizeof(acc_type<scalar_t>) * kLanes == 64;
#else
    false;
#endif

// Whether it is loaded so alone: AVX2's, of 4 and 8 bytes.
template <typename scalar_t, int kLanes>
inline constexpr bool kMaskedLoads =
#if defined(__x86_64__)
    sizeof(scalar_t) >= 4 && sizeof(scalar_t) * kLanes == 32;
#else
    false;
#endif

// The first `count` lanes (0 < count < kLanes); the others are `fill`.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE Vector<acc_type<scalar_t>, kLanes> load_tail(const scalar_t* pointer, int64_t count,
                                                             acc_type<scalar_t> fill) {
  using Memory = const char (*)[kLanes * sizeof(scalar_t)];
  if constexpr (kMasked<scalar_t, kLanes>) {
    const auto mask = static_cast<uint16_t>((1u << count) - 1);
    const auto& memory = *reinterpret_cast<Memory>(pointer);
    auto value = Vector<acc_type<scalar_t>, kLanes>{} + fill;
    if constexpr (sizeof(scalar_t) == 2) {
      Vector<uint16_t, kLanes> narrow{};
      asm("vmovdqu16 %1, %0%{%2%}" : "+v"(narrow) : "m"(memory), "Yk"(mask));
      const auto wide = widen<scalar_t, kLanes>(narrow);
      asm("vmovaps %1, %0%{%2%}" : "+v"(value) : "v"(wide), "Yk"(mask));
    } else if constexpr (sizeof(scalar_t) == 4) {
      asm("vmovups %1, %0%{%2%}" : "+v"(value) : "m"(memory), "Yk"(mask));
    } else {
      asm("vmovupd %1, %0%{%2%}" : "+v"(value) : "m"(memory), "Yk"(mask));
    }
    return value;
  }
  if constexpr (kMaskedLoads<scalar_t, kLanes>) {
    using Lane = std::conditional_t<sizeof(scalar_t) == 8, int64_t, int32_t>;
    Vector<Lane, kLanes> lane{};
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Vector<Lane, kLanes> mask = lane < Vector<Lane, kLanes>{} + static_cast<Lane>(count);
    const auto& memory = *reinterpret_cast<Memory>(pointer);
    Vector<scalar_t, kLanes> value;
    if constexpr (sizeof(scalar_t) == 4) {
      asm("vmaskmovps %2, %1, %0" : "=x"(value) : "x"(mask), "m"(memory));
    } else {
      asm("vmaskmovpd %2, %1, %0" : "=x"(value) : "x"(mask), "m"(memory));
    }
    return mask ? value : Vector<scalar_t, kLanes>{} + fill;
  }
  scalar_t buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = pointer[i];
  auto value = load<kLanes>(buffer);
  for (int64_t i = count; i < kLanes; ++i) value[i] = fill;
  return value;
}

template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void store_tail(scalar_t* pointer, Vector<acc_type<scalar_t>, kLanes> value,
                                int64_t count) {
  using Memory = char (*)[kLanes * sizeof(scalar_t)];
  if constexpr (kMasked<scalar_t, kLanes>) {
    const auto mask = static_cast<uint16_t>((1u << count) - 1);
    auto& memory = *reinterpret_cast<Memory>(pointer);
    if constexpr (sizeof(scalar_t) == 2) {
      scalar_t buffer[kLanes];
      store<kLanes>(buffer, value);
      const auto narrow = load_raw<uint16_t, kLanes>(reinterpret_cast<const uint16_t*>(buffer));
      asm("vmovdqu16 %1, %0%{%2%}" : "+m"(memory) : "v"(narrow), "Yk"(mask));
    } else if constexpr (sizeof(scalar_t) == 4) {
      asm("vmovups %1, %0%{%2%}" : "+m"(memory) : "v"(value), "Yk"(mask));
    } else {
      asm("vmovupd %1, %0%{%2%}" : "+m"(memory) : "v"(value), "Yk"(mask));
    }
    return;
  }
  scalar_t buffer[kLanes];
  store<kLanes>(buffer, value);
  // By halves: count < kLanes, so its bits say which.
  const scalar_t* from = buffer;
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    if (!(count & step)) continue;
    __builtin_memcpy(static_cast<void*>(pointer), from, step * sizeof(scalar_t));
    pointer += step;
    from += step;
  }
}

// The lower (0) or upper (1) half of a vector's lanes.
template <int kLanes, typename T>
TORCHEXT_INLINE Vector<T, kLanes / 2> half(Vector<T, kLanes> value, int which) {
  Vector<T, kLanes / 2> result;
  __builtin_memcpy(&result, reinterpret_cast<const char*>(&value) + which * sizeof(result),
                   sizeof(result));
  return result;
}

template <int kLanes, typename T>
TORCHEXT_INLINE T horizontal_sum(Vector<T, kLanes> value) {
  if constexpr (kLanes == 2) {
    return value[0] + value[1];
  } else {
    return horizontal_sum<kLanes / 2, T>(half<kLanes, T>(value, 0) + half<kLanes, T>(value, 1));
  }
}

// NaN lanes may be passed over: what is computed from them afterwards is NaN all the same.
template <int kLanes, typename T>
TORCHEXT_INLINE T horizontal_max(Vector<T, kLanes> value) {
  if constexpr (kLanes == 2) {
    return value[0] > value[1] ? value[0] : value[1];
  } else {
    const auto low = half<kLanes, T>(value, 0), high = half<kLanes, T>(value, 1);
    return horizontal_max<kLanes / 2, T>(low > high ? low : high);
  }
}

// `value` in the last `count` lanes, 0 in the others.
template <int kLanes, typename T>
TORCHEXT_INLINE Vector<T, kLanes> last_lanes(Vector<T, kLanes> value, int64_t count) {
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vector<Index, kLanes> lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane >= static_cast<Index>(kLanes - count) ? value : Vector<T, kLanes>{};
}

}  // namespace torchext::simd
