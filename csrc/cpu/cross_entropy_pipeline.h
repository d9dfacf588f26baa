// cross_entropy's loss and gradient over rows that are one chunk long, three rows at a time: while
// a row's exponentials are made, the maximum of the next one is found and the gradient of the one
// before is written. So no row waits for another's reductions, and memory is read and written at an
// even pace. 1024 x 1000 floats in the cache take 76 us, row after row 107.
#pragma once

#include "cpu/cross_entropy_kernel.h"
#include "cpu/memory.h"

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

// Rows are never copied: a copy is read by vectors over what was just written number by number, and
// waits until that is in the cache. 4096 x 64 floats take 207 us with such copies, 131 without (a
// core of Zen 4).
template <typename scalar_t>
struct PipelinedRow {
  using acc_t = acc_type<scalar_t>;
  int64_t position, index;  // -1: probabilities
  const scalar_t *x, *probabilities;
  scalar_t* gradient;
  acc_t* exps;
  acc_t target_x, target_weight, g;
  RowSums<acc_t> sums;

  // What the exponentials are multiplied by.
  acc_t scale() const { return g * (target_weight + sums.mass) / sums.sum; }
};

// What the losses of a block's rows are made of.
template <typename acc_t>
struct FinishedRows {
  int64_t count = 0, position[kRowsPerBlock];
  acc_t target_weight[kRowsPerBlock], shifted[kRowsPerBlock];  // x_t - max
  acc_t max[kRowsPerBlock], sum[kRowsPerBlock], mass[kRowsPerBlock], dot[kRowsPerBlock];

  template <typename scalar_t>
  void add(const PipelinedRow<scalar_t>& row) {
    position[count] = row.position;
    target_weight[count] = row.target_weight;
    shifted[count] = row.target_x - row.sums.max;
    max[count] = row.sums.max;
    sum[count] = row.sums.sum;
    mass[count] = row.sums.mass;
    dot[count++] = row.sums.dot;
  }
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
  auto q = row.target_weight;
  if constexpr (kDense) q += args.uniform_target(row.index);
  row.gradient[row.index] = static_cast<scalar_t>(row.exps[row.index] * scale - q * row.g);
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
  // The exponentials of two rows, and where the gradient of the row before the first one goes.
  AlignedBuffer<acc_t> buffer;
  std::vector<scalar_t> nowhere(kGradient ? classes : 0);
  acc_t* const exps = kGradient ? buffer.of_size(2 * stride) : nullptr;

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
  const auto begin_row = [&](Row& row, int64_t p, acc_t* to) {
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
  };
  // The losses of some rows together: a logarithm is a call, for which the stage's registers would
  // be put aside.
  FinishedRows<acc_t> done;
  const auto finish = [&]() {
    for (int64_t i = 0; i < done.count; ++i) {
      const acc_t log_sum = std::log(done.sum[i]);
      acc_t loss = args.indices ? done.target_weight[i] * (log_sum - done.shifted[i]) : acc_t{0};
      if constexpr (kDense) loss += done.mass[i] * log_sum - done.dot[i];
      const int64_t position = done.position[i];
      if (args.losses) args.losses[position] = loss;
      if (args.block_losses) args.block_losses[position / args.block_rows] += loss;
      if (args.stats) {
        args.stats[position] = done.max[i];
        args.stats[args.stats_stride + position] = done.sum[i];
      }
    }
    done.count = 0;
  };

  if (args.block_losses) {
    for (int64_t p = begin; p < end; p += args.block_rows)
      args.block_losses[p / args.block_rows] = 0;
  }
  const int64_t first = counted(begin);
  if (first == end) return;
  Row rows[3] = {};
  Row *before = &rows[0], *now = &rows[1], *next = &rows[2];
  begin_row(*now, first, exps);
  before->gradient = nowhere.data();
  before->exps = exps + stride;
  before->probabilities = now->probabilities;
  before->index = -1;
  before->sums.sum = 1;
  now->sums.max = row_max<Isa, scalar_t>(now->x, classes);
  for (bool more = true; more;) {
    const int64_t p = counted(now->position + 1);
    more = p < end;
    // After the last row its own maximum is looked for again.
    begin_row(*next, more ? p : now->position, before->exps);
    pipeline_stage<Isa, scalar_t, kDense, kGradient>(args, *before, *now, *next);
    done.add(*now);
    if (done.count == kRowsPerBlock) finish();
    Row* const free = before;
    before = now;
    now = next;
    next = free;
  }
  finish();
  if constexpr (kGradient) {
    const acc_t scale = before->scale();
    gradient_row<Isa, scalar_t, kDense>(args, nullptr, before->probabilities, before->gradient,
                                        before->exps, before->sums.max, scale, before->g, 0,
                                        classes);
    target_gradient<kDense>(args, *before, scale);
  }
}

}  // namespace torchext::cpu
