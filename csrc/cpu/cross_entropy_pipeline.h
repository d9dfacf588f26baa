// cross_entropy's loss and gradient over rows that are one chunk long, three rows at a time: while
// a row's exponentials are made, the maximum of the next one is found and the gradient of the one
// before is written. So no row waits for another's reductions, and memory is read and written at an
// even pace. 1024 x 1000 floats in the cache take 76 us, row after row 107.
#pragma once

#include "cpu/cross_entropy_kernel.h"

namespace torchext::cpu {

// Elements between what is read or written and what is asked for from memory, where rows follow
// each other. 1024 x 1000 floats from memory: 87 us, 109 with half of both, 110 with 3072.
constexpr int64_t kReadAhead = 2048;
constexpr int64_t kWriteAhead = 1024;

// Whether `pipelined_rows` serves the call.
template <typename scalar_t>
bool pipelined(const CrossEntropyArgs<scalar_t>& args) {
  return !args.backward && Chunks(args.shape.classes).end(0) == args.shape.classes;
}

template <typename scalar_t>
struct PipelinedRow {
  using acc_t = acc_type<scalar_t>;
  int64_t position, index;  // -1: probabilities
  const scalar_t *x, *probabilities;
  scalar_t* gradient;
  acc_t* exps;
  acc_t target_x, target_weight, g;
  RowSums<acc_t> sums;

  template <bool kDense>
  acc_t loss() const {
    const acc_t log_sum = std::log(sums.sum);
    acc_t loss = index < 0 ? acc_t{0} : target_weight * (log_sum - (target_x - sums.max));
    if constexpr (kDense) loss += sums.mass * log_sum - sums.dot;
    return loss;
  }
  // What the exponentials are multiplied by.
  acc_t scale() const { return g * (target_weight + sums.mass) / sums.sum; }
};

// The largest class but NaN.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE acc_type<scalar_t> row_max(const scalar_t* x, int64_t classes) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  Vector<acc_t, kLanes> max = simd::load<kLanes>(x + classes - kLanes);
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) {
    const auto value = simd::load<kLanes>(x + c);
    max = value > max ? value : max;
  }
  return simd::horizontal_max<kLanes, acc_t>(max);
}

// What kLanes classes of the gradient are.
template <int kLanes, bool kDense, typename scalar_t>
TORCHEXT_INLINE Vector<acc_type<scalar_t>, kLanes> gradient_lanes(
    const CrossEntropyArgs<scalar_t>& args, const PipelinedRow<scalar_t>& row,
    acc_type<scalar_t> scale, int64_t c) {
  auto value = simd::load<kLanes>(row.exps + c) * scale;
  if constexpr (kDense) value -= dense_target<kLanes>(args, row.probabilities, c) * row.g;
  return value;
}

template <bool kDense, typename scalar_t>
TORCHEXT_INLINE void target_gradient(const CrossEntropyArgs<scalar_t>& args,
                                     const PipelinedRow<scalar_t>& row, acc_type<scalar_t> scale) {
  if (row.index < 0) return;
  auto value = row.exps[row.index] * scale - row.target_weight * row.g;
  if constexpr (kDense) value -= args.uniform_target(row.index) * row.g;
  row.gradient[row.index] = static_cast<scalar_t>(value);
}

// The exponentials of `now` and their sum, the maximum of `next`, the gradient of `before`.
template <class Isa, typename scalar_t, bool kDense, bool kGradient>
TORCHEXT_INLINE void pipeline_stage(const CrossEntropyArgs<scalar_t>& args,
                                    const PipelinedRow<scalar_t>& before,
                                    PipelinedRow<scalar_t>& now, PipelinedRow<scalar_t>& next) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_t, kLanes>;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  const int64_t classes = args.shape.classes, rest = classes % kLanes, last = classes - kLanes;
  // Classes of -inf alone: any finite base gives their exponentials, 0.
  const acc_t base = now.sums.max == -kInfinity ? acc_t{0} : now.sums.max;
  const acc_t scale = kGradient ? before.scale() : acc_t{0};
  Acc max = simd::load<kLanes>(next.x + last), sum = {}, mass = {}, dot = {};
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) {
    __builtin_prefetch(next.x + c + kReadAhead);
    const Acc shifted = simd::load<kLanes>(now.x + c) - base;
    const Acc e = simd::exp_nonpositive<kLanes>(shifted);
    sum += e;
    if constexpr (kDense) {
      const Acc q = dense_target<kLanes>(args, now.probabilities, c);
      mass += q;
      dot += q * shifted;
    }
    const Acc ahead = simd::load<kLanes>(next.x + c);
    max = ahead > max ? ahead : max;
    if constexpr (kGradient) {
      __builtin_prefetch(before.gradient + c + kWriteAhead, 1);
      simd::store<kLanes>(now.exps + c, e);
      simd::store<kLanes>(before.gradient + c,
                          gradient_lanes<kLanes, kDense>(args, before, scale, c));
    }
  }
  if (rest > 0) {
    const Acc shifted = simd::load<kLanes>(now.x + last) - base;
    const Acc e = simd::exp_nonpositive<kLanes>(shifted);
    sum += simd::last_lanes<kLanes, acc_t>(e, rest);
    if constexpr (kDense) {
      const Acc q = dense_target<kLanes>(args, now.probabilities, last);
      mass += simd::last_lanes<kLanes, acc_t>(q, rest);
      dot += simd::last_lanes<kLanes, acc_t>(q * shifted, rest);
    }
    if constexpr (kGradient) {
      simd::store<kLanes>(now.exps + last, e);
      simd::store<kLanes>(before.gradient + last,
                          gradient_lanes<kLanes, kDense>(args, before, scale, last));
    }
  }
  if constexpr (kGradient) target_gradient<kDense>(args, before, scale);
  next.sums.max = simd::horizontal_max<kLanes, acc_t>(max);
  now.sums.sum = simd::horizontal_sum<kLanes, acc_t>(sum);
  if constexpr (kDense) {
    // Many equal terms would be rounded alike.
    now.sums.mass = args.probabilities ? simd::horizontal_sum<kLanes, acc_t>(mass)
                                       : static_cast<acc_t>(args.uniform_mass);
    now.sums.dot = simd::horizontal_sum<kLanes, acc_t>(dot);
  }
  // log_softmax of nothing but -inf is NaN.
  if (now.sums.max == -kInfinity) now.sums.sum = std::numeric_limits<acc_t>::quiet_NaN();
}

// Rows [begin, end), whole blocks of them.
template <class Isa, typename scalar_t, bool kDense, bool kGradient>
TORCHEXT_INLINE void pipelined_rows(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                    int64_t end) {
  using acc_t = acc_type<scalar_t>;
  using Row = PipelinedRow<scalar_t>;
  const int64_t classes = args.shape.classes;
  constexpr int64_t kLine = 64 / sizeof(acc_t);
  const int64_t stride = (classes + kLine - 1) / kLine * kLine;
  // The exponentials of two rows, from a cache line on, and where the gradient of the row before
  // the first one goes.
  std::vector<acc_t> memory(kGradient ? 2 * stride + kLine : 0);
  std::vector<scalar_t> nowhere(kGradient ? classes : 0);
  acc_t* exps = memory.data();
  while (reinterpret_cast<uintptr_t>(exps) % 64 != 0) ++exps;

  // The first row from p on that counts; those before it are done with.
  const auto counted = [&](int64_t p) {
    for (; args.indices && p < end && args.target(p) == args.ignore_index; ++p) {
      if constexpr (kGradient) {
        ignored_row<Isa, scalar_t>(args.input + args.offset(p, args.input_strides),
                                   args.gradient + args.offset(p, args.gradient_strides), classes);
      }
      if (args.losses) args.losses[p] = 0;
      if (args.stats) args.stats[p] = args.stats[args.stats_stride + p] = 0;
    }
    return p;
  };
  const auto row_at = [&](int64_t p, acc_t* to) {
    Row row{};
    row.position = p;
    row.x = args.input + args.offset(p, args.input_strides);
    row.index = args.indices ? args.target(p) : -1;
    if (args.indices) {
      row.target_x = static_cast<acc_t>(row.x[row.index]);
      row.target_weight = args.target_weight(row.index);
    }
    if (args.probabilities) {
      row.probabilities = args.probabilities + args.offset(p, args.probability_strides);
    }
    if constexpr (kGradient) {
      row.gradient = args.gradient + args.offset(p, args.gradient_strides);
      row.exps = to;
      row.g = args.position_scale(p);
    }
    return row;
  };
  // The losses of some rows together: a logarithm is a call, for which the stage's registers would
  // be put aside.
  Row done[kRowsPerBlock];
  int64_t done_count = 0;
  const auto finish = [&]() {
    for (int64_t i = 0; i < done_count; ++i) {
      const acc_t loss = done[i].template loss<kDense>();
      const int64_t position = done[i].position;
      const RowSums<acc_t>& sums = done[i].sums;
      if (args.losses) args.losses[position] = loss;
      if (args.block_losses) args.block_losses[position / kRowsPerBlock] += loss;
      if (args.stats) {
        args.stats[position] = sums.max;
        args.stats[args.stats_stride + position] = sums.sum;
      }
    }
    done_count = 0;
  };

  if (args.block_losses) {
    for (int64_t p = begin; p < end; p += kRowsPerBlock) args.block_losses[p / kRowsPerBlock] = 0;
  }
  const int64_t first = counted(begin);
  if (first == end) return;
  Row before{}, now = row_at(first, exps);
  before.gradient = nowhere.data();
  before.exps = exps + stride;
  before.probabilities = now.probabilities;
  before.sums.sum = 1;
  now.sums.max = row_max<Isa, scalar_t>(now.x, classes);
  for (bool more = true; more;) {
    const int64_t p = counted(now.position + 1);
    more = p < end;
    Row next = more ? row_at(p, before.exps) : now;
    pipeline_stage<Isa, scalar_t, kDense, kGradient>(args, before, now, next);
    done[done_count++] = now;
    if (done_count == kRowsPerBlock) finish();
    before = now;
    now = next;
  }
  finish();
  if constexpr (kGradient) {
    const acc_t scale = before.scale();
    gradient_row<Isa, scalar_t, kDense>(args, nullptr, before.probabilities, before.gradient,
                                        before.exps, before.sums.max, scale, before.g, 0, classes);
    target_gradient<kDense>(args, before, scale);
  }
}

}  // namespace torchext::cpu
