// What kernels are written with: numbers, 16-byte accesses, warps, clusters, launches. All that
// only a GPU has stands here, so that tests/cuda can run the kernels' own source on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cuda/gpu.cuh"
#include "cuda/launch.h"

// A class index out of range ends in an assertion, as in torch, in release builds too.
#undef NDEBUG
#include <cassert>

namespace torchext::cuda {

using BFloat16 = __nv_bfloat16;
using Half = __half;

template <typename scalar_t>
struct AccType {
  using type = float;
};
template <>
struct AccType<double> {
  using type = double;
};
template <typename scalar_t>
using acc_type = typename AccType<scalar_t>::type;

__device__ inline float to_acc(float value) { return value; }
__device__ inline double to_acc(double value) { return value; }
__device__ inline float to_acc(BFloat16 value) { return __bfloat162float(value); }
__device__ inline float to_acc(Half value) { return __half2float(value); }

template <typename scalar_t>
__device__ inline scalar_t from_acc(acc_type<scalar_t> value) {
  if constexpr (std::is_same_v<scalar_t, BFloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<scalar_t, Half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

template <typename To, typename From>
__device__ inline To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

__device__ inline double exp_nonpositive(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }
__device__ inline double larger(double a, double b) { return fmax(a, b); }

template <typename acc_t>
constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
template <typename acc_t>
constexpr acc_t kNaN = std::numeric_limits<acc_t>::quiet_NaN();

// One access to memory: 16 bytes, or one element where rows are not aligned to that. In registers
// the elements stay as they are in memory, two bfloat16 to a register.
template <typename scalar_t, bool kWide>
struct Access {
  using acc_t = acc_type<scalar_t>;
  using Raw = std::conditional_t<kWide, uint4, scalar_t>;
  static constexpr int kSize = sizeof(Raw) / sizeof(scalar_t);

  static __device__ Raw load(const scalar_t* from) {
    if constexpr (kWide) {
      return load_wide(from);
    } else {
      return *from;
    }
  }
  static __device__ void store(scalar_t* to, const Raw& raw) {
    if constexpr (kWide) {
      store_wide(to, raw);
    } else {
      *to = raw;
    }
  }

  static __device__ void unpack(const Raw& raw, acc_t (&values)[kSize]) {
    if constexpr (!kWide) {
      values[0] = to_acc(raw);
    } else {
      const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          values[i] = bits_as<float>(words[i]);
        } else if constexpr (std::is_same_v<scalar_t, double>) {
          if (i % 2 == 0) {
            values[i / 2] = bits_as<double>(uint64_t{words[i + 1]} << 32 | words[i]);
          }
        } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
          values[2 * i] = bits_as<float>(words[i] << 16);
          values[2 * i + 1] = bits_as<float>(words[i] & 0xffff0000u);
        } else {
          const float2 pair = __half22float2(bits_as<__half2>(words[i]));
          values[2 * i] = pair.x;
          values[2 * i + 1] = pair.y;
        }
      }
    }
  }

  static __device__ Raw pack(const acc_t (&values)[kSize]) {
    if constexpr (!kWide) {
      return from_acc<scalar_t>(values[0]);
    } else {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (std::is_same_v<scalar_t, float>) {
          words[i] = bits_as<unsigned>(values[i]);
        } else if constexpr (std::is_same_v<scalar_t, double>) {
          words[i] = static_cast<unsigned>(bits_as<uint64_t>(values[i / 2]) >> (i % 2 * 32));
        } else if constexpr (std::is_same_v<scalar_t, BFloat16>) {
          words[i] = bits_as<unsigned>(__floats2bfloat162_rn(values[2 * i], values[2 * i + 1]));
        } else {
          words[i] = bits_as<unsigned>(__floats2half2_rn(values[2 * i], values[2 * i + 1]));
        }
      }
      return make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

// The same sum, or maximum, in all lanes of each group of `lanes`, in one fixed order.
template <typename acc_t>
__device__ inline acc_t group_sum(acc_t value, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += shuffle_xor(value, offset);
  return value;
}
template <typename acc_t>
__device__ inline acc_t group_max(acc_t value, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = larger(value, shuffle_xor(value, offset));
  }
  return value;
}

// Calls `body` with a value of the dtype's C++ type.
template <typename Body>
cudaError_t dispatch(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat:
      return body(float{});
    case Dtype::kDouble:
      return body(double{});
    case Dtype::kBFloat16:
      return body(BFloat16{});
    default:
      return body(Half{});
  }
}

}  // namespace torchext::cuda
