// What the cross_entropy kernels share: a row's softmax and how parts of it are joined, its target,
// its loss, and the scale of its gradient. cross_entropy.h has the formulas.
#pragma once

#include "cuda/cross_entropy.h"
#include "cuda/device.cuh"

namespace torchext::cuda {

// A number of the host's, in the width that a kernel computes in.
template <typename acc_t>
__device__ inline acc_t in_width(const Number& number) {
  if constexpr (std::is_same_v<acc_t, double>) return number.wide;
  return number.narrow;
}

// The softmax of some classes and, of a dense target, sum q and sum q (x - m).
template <typename acc_t>
struct Sums {
  acc_t max;
  acc_t sum;
  acc_t mass;
  acc_t dot;
};

template <typename acc_t>
__device__ inline Sums<acc_t> no_sums() {
  return {-kInfinity<acc_t>, 0, 0, 0};
}

// What exponentials are relative to: of classes of -inf alone, any finite number gives 0.
template <typename acc_t>
__device__ inline acc_t base_of(acc_t max) {
  return max == -kInfinity<acc_t> ? acc_t{0} : max;
}

// The sums, relative to a maximum that is no smaller.
template <bool kDense, typename acc_t>
__device__ inline void rebase(Sums<acc_t>& sums, acc_t max) {
  const bool same = sums.max == max || sums.max == -kInfinity<acc_t>;
  if (!same) sums.sum *= exp_nonpositive(sums.max - max);
  if constexpr (kDense) sums.dot += sums.mass * (base_of(sums.max) - base_of(max));
  sums.max = max;
}

template <bool kDense, typename acc_t>
__device__ inline Sums<acc_t> joined(Sums<acc_t> a, Sums<acc_t> b) {
  const acc_t max = larger(a.max, b.max);
  rebase<kDense>(a, max);
  rebase<kDense>(b, max);
  return {max, a.sum + b.sum, a.mass + b.mass, a.dot + b.dot};
}

// Of all lanes of each group of `lanes`; the first lane's is what counts.
template <bool kDense, typename acc_t>
__device__ inline Sums<acc_t> group_joined(Sums<acc_t> sums, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    Sums<acc_t> other = sums;
    other.max = shuffle_xor(sums.max, offset);
    other.sum = shuffle_xor(sums.sum, offset);
    if constexpr (kDense) {
      other.mass = shuffle_xor(sums.mass, offset);
      other.dot = shuffle_xor(sums.dot, offset);
    }
    sums = joined<kDense>(sums, other);
  }
  return sums;
}

// log_softmax of nothing but -inf is NaN.
template <typename acc_t>
__device__ inline Sums<acc_t> finished(Sums<acc_t> sums) {
  if (sums.max == -kInfinity<acc_t>) sums.sum = kNaN<acc_t>;
  return sums;
}

// Where a position's classes are.
struct Place {
  int64_t n;
  int64_t s;

  __device__ Place(const CrossEntropyArgs& args, int64_t position)
      : n(args.inner == 1 ? position : position / args.inner), s(position - n * args.inner) {}
  __device__ int64_t in(const Strides& strides) const {
    return n * strides.outer + s * strides.inner;
  }
};

template <typename scalar_t>
struct Target {
  int64_t index;  // from first_class on; -1 of probabilities and of an ignored position
  bool ignored;
  acc_type<scalar_t> weight;  // W_t
};

__device__ inline int64_t class_index(const CrossEntropyArgs& args, int64_t position) {
  if (args.index_bytes == 8) return static_cast<const int64_t*>(args.indices)[position];
  if (args.index_bytes == 4) return static_cast<const int32_t*>(args.indices)[position];
  return static_cast<const uint8_t*>(args.indices)[position];
}

// A class index that is out of range addresses nothing: it ends in an assertion, of one thread, in
// the words of torch's. `kPart`: args.classes may be a part of all.
template <typename scalar_t, bool kPart = false>
__device__ inline Target<scalar_t> target_of(const CrossEntropyArgs& args, int64_t position,
                                             bool asserts) {
  if (args.indices == nullptr) return {-1, false, 0};
  const int64_t t = class_index(args, position);
  const int64_t n_classes = kPart ? args.all_classes : args.classes;
  if (t == args.ignore_index) return {-1, true, 0};
  if (t < 0 || t >= n_classes) {
    if (asserts) assert(t >= 0 && t < n_classes);
    return {-1, false, 0};
  }
  acc_type<scalar_t> weight = in_width<acc_type<scalar_t>>(args.kept);
  const int64_t index = kPart ? t - args.first_class : t;
  if (args.weight) weight *= to_acc(static_cast<const scalar_t*>(args.weight)[index]);
  return {index, false, weight};
}

// q of `kSize` classes from `c` on; `probabilities` and the weights at that class.
template <typename scalar_t, bool kWide>
__device__ inline void dense_target(const CrossEntropyArgs& args, const scalar_t* probabilities,
                                    const scalar_t* weight,
                                    acc_type<scalar_t> (&q)[Access<scalar_t, kWide>::kSize]) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  const acc_t uniform = in_width<acc_t>(args.uniform);
  if (probabilities) {
    const acc_t kept = in_width<acc_t>(args.kept);
    Memory::unpack(Memory::load(probabilities), q);
#pragma unroll
    for (int i = 0; i < Memory::kSize; ++i) q[i] = q[i] * kept + uniform;
  } else {
#pragma unroll
    for (int i = 0; i < Memory::kSize; ++i) q[i] = uniform;
  }
  if (weight) {
    acc_t weights[Memory::kSize];
    Memory::unpack(Memory::load(weight), weights);
#pragma unroll
    for (int i = 0; i < Memory::kSize; ++i) q[i] *= weights[i];
  }
}

// What the gradient of a row is made of: e^(x - max) * scale - q * g, at the target
// e^(x - max) * scale - (q + at_target) * g.
template <typename acc_t>
struct GradientScale {
  acc_t max;
  acc_t scale;
  acc_t g;
  acc_t at_target;
};

template <typename scalar_t>
__device__ inline GradientScale<acc_type<scalar_t>> gradient_scale(
    const CrossEntropyArgs& args, int64_t position, const Sums<acc_type<scalar_t>>& sums,
    const Target<scalar_t>& target) {
  using acc_t = acc_type<scalar_t>;
  // Of an ignored position 0, or NaN where its softmax is NaN (as in torch, where it is 0 times the
  // softmax): with a NaN, with +inf, or of nothing but -inf.
  if (target.ignored) return {base_of(sums.max), sums.sum - sums.sum, 0, 0};
  acc_t g = in_width<acc_t>(args.gradient_scale);
  if (args.mean) {
    if constexpr (std::is_same_v<acc_t, double>) {
      g *= args.mean->inverse;
    } else {
      g *= args.mean->inverse_narrow;
    }
  }
  if (args.grad_output) {
    const int64_t at = position * args.grad_output_stride;
    g *= args.wide ? static_cast<const acc_type<scalar_t>*>(args.grad_output)[at]
                   : to_acc(static_cast<const scalar_t*>(args.grad_output)[at]);
  }
  return {base_of(sums.max), g * (target.weight + sums.mass) / sums.sum, g, target.weight};
}

// The loss and the stats of a position, by one thread. `target_x` is the logit of the target.
template <typename scalar_t, bool kDense>
__device__ inline void write_loss(const CrossEntropyArgs& args, int64_t position,
                                  const Sums<acc_type<scalar_t>>& sums,
                                  const Target<scalar_t>& target, acc_type<scalar_t> target_x) {
  using acc_t = acc_type<scalar_t>;
  const acc_t log_sum = logarithm(sums.sum);
  acc_t loss = 0;
  if (target.index >= 0) loss = target.weight * (log_sum - (target_x - sums.max));
  if constexpr (kDense) loss += sums.mass * log_sum - sums.dot;
  if (target.ignored) loss = 0;
  if (args.losses) static_cast<acc_t*>(args.losses)[position] = loss;
  if (args.loss_values) {
    static_cast<scalar_t*>(args.loss_values)[position] = from_acc<scalar_t>(loss);
  }
  if (args.stats) {
    acc_t* stats = static_cast<acc_t*>(args.stats);
    stats[position] = sums.max;
    stats[args.stats_stride + position] = sums.sum;
  }
}

// The gradient of `kSize` classes from `c` on, over their logits.
template <typename scalar_t, bool kWide, bool kDense>
__device__ inline void gradient_of(const CrossEntropyArgs& args,
                                   const GradientScale<acc_type<scalar_t>>& row,
                                   const Target<scalar_t>& target, int64_t c,
                                   const scalar_t* probabilities, const scalar_t* weight,
                                   acc_type<scalar_t> (&x)[Access<scalar_t, kWide>::kSize]) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSize = Access<scalar_t, kWide>::kSize;
#pragma unroll
  for (int i = 0; i < kSize; ++i) x[i] = exp_nonpositive(x[i] - row.max) * row.scale;
  const uint64_t from_here = static_cast<uint64_t>(target.index) - static_cast<uint64_t>(c);
  if constexpr (kDense) {
    acc_t q[kSize];
    dense_target<scalar_t, kWide>(args, probabilities, weight, q);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (from_here == i) q[i] += row.at_target;
      x[i] -= q[i] * row.g;
    }
  } else if (from_here < kSize) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[i] -= from_here == i ? row.at_target * row.g : acc_t{0};
  }
}

}  // namespace torchext::cuda
