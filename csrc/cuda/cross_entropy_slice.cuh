// A part of a row in one thread's registers: `kItems` accesses, `step` apart among the threads that
// share the row, and one of the classes that are left where the row is no multiple of an access.
#pragma once

#include "cuda/cross_entropy.cuh"

namespace torchext::cuda {

// Which part: access number first + i * step, of `accesses`.
struct Part {
  int first;
  int step;
  int accesses;  // whole ones
  int rest;      // this thread's class of the rest, or -1

  template <int kSize>
  static __device__ Part of(int64_t classes, int first, int step) {
    const int accesses = static_cast<int>(classes / kSize);
    const int rest = accesses * kSize + first;
    return {first, step, accesses, rest < classes ? rest : -1};
  }
};

// Where a row's classes are: side by side.
template <typename scalar_t>
struct WholeRow {
  scalar_t* first;

  __device__ scalar_t* at(int64_t c) const { return first + c; }
};

template <typename scalar_t, bool kWide, bool kDense, int kItems>
struct Slice {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  static constexpr int kSize = Memory::kSize;

  typename Memory::Raw raw[kItems];
  acc_t rest;

  // All loads are under way before the first is waited for.
  template <typename Row>
  __device__ void load(const Row& row, const Part& part) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int access = part.first + i * part.step;
      if (access < part.accesses) {
        raw[i] = Memory::load(row.at(access * kSize));
      } else {
        acc_t none[kSize];
#pragma unroll
        for (int k = 0; k < kSize; ++k) none[k] = -kInfinity<acc_t>;
        raw[i] = Memory::pack(none);
      }
    }
    rest = part.rest >= 0 ? to_acc(*row.at(part.rest)) : -kInfinity<acc_t>;
  }

  __device__ acc_t max(const Part& part) const {
    acc_t largest = rest;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i * part.step >= part.accesses) break;
      acc_t x[kSize];
      Memory::unpack(raw[i], x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) largest = larger(largest, x[k]);
    }
    return largest;
  }

  // Of this thread's classes, relative to `max`.
  __device__ Sums<acc_t> sums(const CrossEntropyArgs& args, acc_t max, const Part& part,
                              const scalar_t* probabilities) const {
    const scalar_t* weight = static_cast<const scalar_t*>(args.weight);
    const acc_t base = base_of(max);
    Sums<acc_t> sums{max, exp_nonpositive(rest - base), 0, 0};
    if constexpr (kDense) {
      if (part.rest >= 0) {
        acc_t q[1];
        dense_target<scalar_t, false>(args, probabilities ? probabilities + part.rest : nullptr,
                                      weight ? weight + part.rest : nullptr, q);
        sums.mass = q[0];
        sums.dot = q[0] * (rest - base);
      }
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i * part.step >= part.accesses) break;
      acc_t x[kSize];
      Memory::unpack(raw[i], x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) sums.sum += exp_nonpositive(x[k] - base);
      if constexpr (kDense) {
        const int access = part.first + i * part.step;
        if (access < part.accesses) {
          acc_t q[kSize];
          dense_target<scalar_t, kWide>(args,
                                        probabilities ? probabilities + access * kSize : nullptr,
                                        weight ? weight + access * kSize : nullptr, q);
#pragma unroll
          for (int k = 0; k < kSize; ++k) {
            sums.mass += q[k];
            sums.dot += q[k] * (x[k] - base);
          }
        }
      }
    }
    return sums;
  }

  template <typename Row>
  __device__ void write_gradient(const CrossEntropyArgs& args,
                                 const GradientScale<acc_t>& row_scale,
                                 const Target<scalar_t>& target, const Part& part,
                                 const scalar_t* probabilities, const Row& gradient) const {
    const scalar_t* weight = static_cast<const scalar_t*>(args.weight);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int access = part.first + i * part.step;
      if (access >= part.accesses) break;
      acc_t x[kSize];
      Memory::unpack(raw[i], x);
      gradient_of<scalar_t, kWide, kDense>(args, row_scale, target, access * kSize,
                                           probabilities ? probabilities + access * kSize : nullptr,
                                           weight ? weight + access * kSize : nullptr, x);
      Memory::store(gradient.at(access * kSize), Memory::pack(x));
    }
    if (part.rest >= 0) {
      acc_t x[1] = {rest};
      gradient_of<scalar_t, false, kDense>(args, row_scale, target, part.rest,
                                           probabilities ? probabilities + part.rest : nullptr,
                                           weight ? weight + part.rest : nullptr, x);
      *gradient.at(part.rest) = from_acc<scalar_t>(x[0]);
    }
  }
};

}  // namespace torchext::cuda
