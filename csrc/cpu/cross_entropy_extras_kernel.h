// The rows of a loss with extras on the CPU. A row's logits are scaled and capped into memory of
// their own, which stays in cache; the softmax is cross_entropy_kernel.h's over that, and the
// gradient goes out once. With z = softcap tanh(logit_scale x / softcap):
//
//   loss       = W_t (log S - (z_t - m)) + sum_c q_c (log S - (z_c - m)) + z_loss lse^2
//   gradient_c = (exp(z_c - m) (g (W_t + sum q + 2 z_loss lse) + h) / S - g q_c - g [c = t] W_t)
//                logit_scale tanh'(logit_scale x_c / softcap)
//
// g and h the gradients of the row's loss and lse, the others as there.
#pragma once

#include <cmath>

#include "cpu/cross_entropy_kernel.h"

namespace torchext::cpu {

template <typename scalar_t>
struct ExtrasArgs {
  using acc_t = acc_type<scalar_t>;
  CrossEntropyArgs<acc_t> targets;       // what does not depend on the logits' dtype
  const scalar_t* narrow_probabilities;  // or null; have targets.probability_strides
  const scalar_t* input;
  int64_t input_stride;
  acc_t z_loss, softcap, logit_scale;
  const acc_t *grad_loss, *grad_lse;  // or null
  int64_t grad_loss_stride, grad_lse_stride;
  scalar_t* gradient;  // or null; may be the input
  int64_t gradient_stride;
  int64_t* argmax;  // or null

  bool as_they_are() const {
    return std::is_same_v<scalar_t, acc_t> && softcap == 0 && logit_scale == 1;
  }
};

// Memory of one thread for one row.
template <typename acc_t>
struct ExtrasScratch {
  std::vector<acc_t> z, slopes, exps, probabilities;
};

// z of a row, and of a capped one that wants a gradient softcap's derivative. Logits that are small
// beside the cap, as most are, need tanh's polynomial alone: it is looked for in groups of vectors
// (1024 x 1000 floats, all small: 350 us, 660 without).
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void transform_row(const ExtrasArgs<scalar_t>& args, const scalar_t* x,
                                   acc_type<scalar_t>* z, acc_type<scalar_t>* slopes,
                                   int64_t classes) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr int kGroup = 4;
  using Acc = Vector<acc_t, kLanes>;
  const acc_t cap = args.softcap;
  const acc_t inner = cap == 0 ? args.logit_scale : args.logit_scale / cap;
  const auto scaled = [&](int64_t c) __attribute__((always_inline)) {
    return simd::load<kLanes>(x + c) * inner;
  };
  const auto put = [&](int64_t c, Acc value) __attribute__((always_inline)) {
    if (cap == 0) return simd::store<kLanes>(z + c, value);
    Acc slope;
    simd::store<kLanes>(z + c, simd::tanh<kLanes, acc_t>(value, slope) * cap);
    if (slopes) simd::store<kLanes>(slopes + c, slope);
  };
  int64_t c = 0;
  for (; cap != 0 && c + kGroup * kLanes <= classes; c += kGroup * kLanes) {
    Acc value[kGroup], largest = {};
    for (int i = 0; i < kGroup; ++i) {
      value[i] = scaled(c + i * kLanes);
      const Acc size = value[i] < acc_t{0} ? -value[i] : value[i];
      largest = size > largest ? size : largest;
    }
    // NaN is passed over here, and stays what it is in either.
    if (simd::horizontal_max<kLanes, acc_t>(largest) < simd::kSmallTanh<acc_t>) {
      for (int i = 0; i < kGroup; ++i) {
        const Acc t = simd::tanh_small<kLanes, acc_t>(value[i]);
        simd::store<kLanes>(z + c + i * kLanes, t * cap);
        if (slopes) simd::store<kLanes>(slopes + c + i * kLanes, acc_t{1} - t * t);
      }
    } else {
      for (int i = 0; i < kGroup; ++i) put(c + i * kLanes, value[i]);
    }
  }
  for (; c + kLanes <= classes; c += kLanes) put(c, scaled(c));
  if (classes % kLanes) put(classes - kLanes, scaled(classes - kLanes));
}

template <typename scalar_t>
void widen_row(const scalar_t* from, acc_type<scalar_t>* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<acc_type<scalar_t>>(from[i]);
}

// As torch's: the first NaN, or the first of the largest.
template <typename acc_t>
int64_t argmax_of(const acc_t* z, int64_t classes, const RowSums<acc_t>& row) {
  const acc_t* end = z + classes;
  if (row.sum != row.sum) {
    const acc_t* nan = std::find_if(z, end, [](acc_t value) { return value != value; });
    if (nan != end) return nan - z;
  }
  return std::find(z, end, row.max) - z;
}

template <typename acc_t>
acc_t lse_of(acc_t max, acc_t sum) {
  return std::isinf(max) ? max : max + std::log(sum);
}

// gradient = (e * scale - q * g) * slope over the chunk [begin, end), of what is capped.
template <class Isa, typename scalar_t, bool kDense, bool kCapped>
TORCHEXT_INLINE void extras_gradient(const ExtrasArgs<scalar_t>& args, const acc_type<scalar_t>* z,
                                     const acc_type<scalar_t>* slopes,
                                     const acc_type<scalar_t>* probabilities, scalar_t* gradient,
                                     const acc_type<scalar_t>* exps, acc_type<scalar_t> max,
                                     acc_type<scalar_t> scale, acc_type<scalar_t> g, int64_t begin,
                                     int64_t end) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_t, kLanes>;
  const int64_t last = end - kLanes;
  // z may be the gradient's own memory: what is read twice is read first.
  const Acc tail = simd::load<kLanes>((exps ? exps : z) + last);
  const auto value = [&](Acc e, int64_t c) __attribute__((always_inline)) {
    if (!exps) e = simd::exp_nonpositive<kLanes>(e - max);
    Acc result = e * scale;
    if constexpr (kDense) result -= dense_target<kLanes>(args.targets, probabilities, c) * g;
    if constexpr (kCapped) result *= simd::load<kLanes>(slopes + c);
    return result;
  };
  for (int64_t c = begin; c + kLanes <= end; c += kLanes) {
    const Acc e = simd::load<kLanes>((exps ? exps : z) + c);
    simd::store<kLanes>(gradient + c, value(e, c));
  }
  if ((end - begin) % kLanes) simd::store<kLanes>(gradient + last, value(tail, last));
}

template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE void extras_row(const ExtrasArgs<scalar_t>& args, int64_t p,
                                ExtrasScratch<acc_type<scalar_t>>& scratch) {
  using acc_t = acc_type<scalar_t>;
  const CrossEntropyArgs<acc_t>& targets = args.targets;
  const int64_t classes = targets.shape.classes;
  const Chunks chunks(classes);
  const scalar_t* x = args.input + p * args.input_stride;
  const acc_t* z = scratch.z.data();
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    if (args.as_they_are()) z = x;
  }
  const bool capped = args.softcap != 0 && args.gradient;
  acc_t* slopes = capped ? scratch.slopes.data() : nullptr;
  if (!args.as_they_are()) transform_row<Isa, scalar_t>(args, x, scratch.z.data(), slopes, classes);
  const acc_t* probabilities = targets.probabilities;
  if (probabilities) probabilities += p * targets.probability_strides.outer;
  if (args.narrow_probabilities) {
    widen_row(args.narrow_probabilities + p * targets.probability_strides.outer,
              scratch.probabilities.data(), classes);
    probabilities = scratch.probabilities.data();
  }
  const int64_t index = targets.indices ? targets.target(p) : -1;
  const bool ignored = targets.indices && index == targets.ignore_index;
  const bool indexed = targets.indices && !ignored;
  const acc_t target_weight = indexed ? targets.target_weight(index) : acc_t{0};
  const acc_t target_z = indexed ? z[index] : acc_t{0};
  acc_t& saved_max = targets.stats[p];
  acc_t& saved_sum = targets.stats[targets.stats_stride + p];

  acc_t bases[kMaxChunks];
  acc_t* exps = nullptr;
  RowSums<acc_t> row;
  if (targets.backward) {
    row.max = saved_max;
    row.sum = saved_sum;
    if constexpr (kDense) row.mass = static_cast<acc_t>(targets.uniform_mass);
    if (kDense && probabilities) row.mass = dense_mass<Isa, acc_t>(targets, probabilities);
  } else {
    if (args.gradient) exps = scratch.exps.data();
    row = softmax_row<Isa, acc_t, kDense>(targets, z, probabilities, chunks, exps, bases);
    if (args.argmax) args.argmax[p] = argmax_of(z, classes, row);
    if (std::isinf(row.max) && std::any_of(z, z + classes, [](acc_t v) { return v != v; })) {
      row.max = std::numeric_limits<acc_t>::quiet_NaN();  // a maximum passes NaN over
    }
    saved_max = row.max;
    saved_sum = row.sum;
  }
  const acc_t log_sum = std::log(row.sum);
  const acc_t lse = lse_of(row.max, row.sum);
  if (!targets.backward) {
    acc_t loss = target_weight * (log_sum - (target_z - row.max));
    if (!indexed) loss = 0;
    if constexpr (kDense) loss += row.mass * log_sum - row.dot;
    if (args.z_loss != 0) loss += args.z_loss * (lse * lse);
    targets.losses[p] = ignored ? acc_t{0} : loss;
  }
  if (!args.gradient) return;

  scalar_t* gradient = args.gradient + p * args.gradient_stride;
  const acc_t g = args.grad_loss && !ignored
                      ? args.logit_scale * args.grad_loss[p * args.grad_loss_stride]
                      : acc_t{0};
  acc_t scale = args.grad_lse ? args.logit_scale * args.grad_lse[p * args.grad_lse_stride] : 0;
  // What is ignored has an infinite lse at most: no part of the scale where g is 0.
  if (!ignored) scale += g * (target_weight + row.mass + 2 * args.z_loss * lse);
  scale /= row.sum;
  acc_t target_gradient = 0;
  if (indexed) {
    const acc_t e = simd::exp_nonpositive_scalar(target_z - row.max);
    acc_t q = target_weight;
    if constexpr (kDense) q += targets.uniform_target(index);
    target_gradient = e * scale - q * g;
    if (capped) target_gradient *= slopes[index];
  }
  const acc_t* base = bases;
  for (int64_t from = 0, to = 0; from < classes; from = to) {
    to = chunks.end(from);
    acc_t part = 1;
    if (exps && *base != row.max) part = simd::exp_nonpositive_scalar(*base - row.max);
    ++base;
    const auto run = [&](auto is_capped) __attribute__((always_inline)) {
      extras_gradient<Isa, scalar_t, kDense, is_capped()>(args, z, slopes, probabilities, gradient,
                                                          exps, row.max, scale * part, g, from, to);
    };
    capped ? run(std::true_type{}) : run(std::false_type{});
  }
  if (indexed) gradient[index] = static_cast<scalar_t>(target_gradient);
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void extras_range(const ExtrasArgs<scalar_t>& args, int64_t begin, int64_t end) {
  const int64_t classes = args.targets.shape.classes;
  ExtrasScratch<acc_type<scalar_t>> scratch;
  if (!args.as_they_are()) scratch.z.resize(classes);
  if (args.softcap != 0 && args.gradient) scratch.slopes.resize(classes);
  if (args.gradient && !args.targets.backward) scratch.exps.resize(classes);
  if (args.narrow_probabilities) scratch.probabilities.resize(classes);
  const bool dense = args.targets.dense() || args.narrow_probabilities;
  for (int64_t p = begin; p < end; ++p) {
    dense ? extras_row<Isa, scalar_t, true>(args, p, scratch)
          : extras_row<Isa, scalar_t, false>(args, p, scratch);
  }
}

}  // namespace torchext::cpu
