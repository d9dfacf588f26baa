// cross_entropy where positions, not classes, are contiguous: (N, C, d1, ...) and transposed
// (N, C). A tile is kWidth vectors of positions side by side; the classes are walked three times
// (maximum, exponentials and sums, gradient) while the tile is in cache. The formulas are those of
// cross_entropy_kernel.h.
#pragma once

#include "cpu/cross_entropy_call.h"
#include "cpu/cross_entropy_kernel.h"

namespace torchext::cpu {

constexpr int64_t kClassesPerSum = 256;

// Element c of the tile's first position, and what separates the classes.
template <typename T>
struct Column {
  T* data;
  int64_t stride;
  TORCHEXT_INLINE T* at(int64_t c) const { return data + c * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// What the lanes of one tile need beside the columns.
template <typename scalar_t, int kPositions>
struct TileTargets {
  using acc_t = acc_type<scalar_t>;
  int64_t index[kPositions];
  acc_t keep[kPositions];    // 0 where ignored, else 1
  acc_t weight[kPositions];  // W_t of the formulas
};

template <class Isa, typename scalar_t, bool kDense, int kWidth>
TORCHEXT_INLINE double process_tile(const CrossEntropyArgs<scalar_t>& args, int64_t position,
                                    int64_t count, Column<const scalar_t> x,
                                    Column<const scalar_t> probabilities, Column<scalar_t> gradient,
                                    Column<acc_type<scalar_t>> exps) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr int kPositions = kLanes * kWidth;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  using Acc = Vector<acc_t, kLanes>;
  const int64_t classes = args.shape.classes;

  TileTargets<scalar_t, kPositions> targets;
  acc_t target_x[kPositions];
  for (int i = 0; i < kPositions; ++i) {
    const bool real = i < count;
    const int64_t index = args.indices && real ? args.target(position + i) : -1;
    const bool keep = real && !(args.indices && index == args.ignore_index);
    const bool indexed = keep && args.indices;
    targets.index[i] = indexed ? index : -1;
    targets.keep[i] = keep;
    targets.weight[i] = indexed ? args.target_weight(index) : acc_t{0};
    target_x[i] = indexed ? static_cast<acc_t>(x.at(index)[i]) : acc_t{0};
  }
  const auto dense = [&](int64_t c, int k) __attribute__((always_inline)) {
    Acc q = Acc{} + args.uniform;
    if (probabilities) {
      q = simd::load<kLanes>(probabilities.at(c) + k * kLanes) * args.kept + args.uniform;
    }
    if (args.weight) q *= args.weight[c];
    return q;
  };

  Acc max[kWidth], sum[kWidth], mass[kWidth], dot[kWidth];
  for (int k = 0; k < kWidth; ++k) {
    max[k] = Acc{} - kInfinity;
    sum[k] = mass[k] = dot[k] = Acc{};
  }
  double total = 0;
  if (args.backward) {
    for (int i = 0; i < kPositions; ++i) {
      max[i / kLanes][i % kLanes] = i < count ? args.stats[position + i] : acc_t{0};
      sum[i / kLanes][i % kLanes] =
          i < count ? args.stats[args.stats_stride + position + i] : acc_t{1};
    }
    if constexpr (kDense) {
      for (int64_t begin = 0; begin < classes; begin += kClassesPerSum) {
        const int64_t end = std::min(classes, begin + kClassesPerSum);
        Acc part[kWidth] = {};
        for (int64_t c = begin; c < end; ++c) {
          for (int k = 0; k < kWidth; ++k) part[k] += dense(c, k);
        }
        for (int k = 0; k < kWidth; ++k) mass[k] += part[k];
      }
    }
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      for (int k = 0; k < kWidth; ++k) {
        const Acc value = simd::load<kLanes>(x.at(c) + k * kLanes);
        max[k] = value > max[k] ? value : max[k];
      }
    }
    // Sums of kClassesPerSum classes, and of those: one sum of a large vocabulary would lose
    // digits.
    for (int64_t begin = 0; begin < classes; begin += kClassesPerSum) {
      const int64_t end = std::min(classes, begin + kClassesPerSum);
      Acc part_sum[kWidth] = {}, part_mass[kWidth] = {}, part_dot[kWidth] = {};
      for (int64_t c = begin; c < end; ++c) {
        for (int k = 0; k < kWidth; ++k) {
          const Acc shifted = simd::load<kLanes>(x.at(c) + k * kLanes) - max[k];
          const Acc e = simd::exp_nonpositive<kLanes>(shifted);
          part_sum[k] += e;
          if constexpr (kDense) {
            const Acc q = dense(c, k);
            part_mass[k] += q;
            part_dot[k] += q * shifted;
          }
          if (exps) simd::store<kLanes>(exps.at(c) + k * kLanes, e);
        }
      }
      for (int k = 0; k < kWidth; ++k) {
        sum[k] += part_sum[k];
        mass[k] += part_mass[k];
        dot[k] += part_dot[k];
      }
    }
    for (int i = 0; i < count; ++i) {
      const int k = i / kLanes, lane = i % kLanes;
      const acc_t log_sum = std::log(sum[k][lane]);
      acc_t loss = targets.weight[i] * (log_sum - (target_x[i] - max[k][lane]));
      if constexpr (kDense) loss += mass[k][lane] * log_sum - dot[k][lane];
      if (targets.keep[i] == 0) loss = 0;
      if (args.losses) args.losses[position + i] = loss;
      total += loss;
      if (args.stats) {
        args.stats[position + i] = max[k][lane];
        args.stats[args.stats_stride + position + i] = sum[k][lane];
      }
    }
  }
  if (!gradient) return total;

  Acc scale[kWidth], g[kWidth], keep[kWidth];
  acc_t target_gradient[kPositions];
  for (int i = 0; i < kPositions; ++i) {
    const int k = i / kLanes, lane = i % kLanes;
    const bool kept_position = targets.keep[i] != 0;
    g[k][lane] = kept_position ? args.position_scale(position + i) : acc_t{0};
    keep[k][lane] = targets.keep[i];
    scale[k][lane] = g[k][lane] * (targets.weight[i] + mass[k][lane]) / sum[k][lane];
    if (targets.index[i] < 0) continue;
    const acc_t e = simd::exp_nonpositive_scalar(target_x[i] - max[k][lane]);
    target_gradient[i] = e * scale[k][lane] - targets.weight[i] * g[k][lane];
    if constexpr (kDense) target_gradient[i] -= args.uniform_target(targets.index[i]) * g[k][lane];
  }
  // An ignored position's gradient is 0, or NaN where its softmax is (as in torch).
  Acc nothing[kWidth];
  for (int k = 0; k < kWidth; ++k) nothing[k] = sum[k] - sum[k];
  for (int64_t c = 0; c < classes; ++c) {
    for (int k = 0; k < kWidth; ++k) {
      const Acc e =
          exps ? simd::load<kLanes>(exps.at(c) + k * kLanes)
               : simd::exp_nonpositive<kLanes>(simd::load<kLanes>(x.at(c) + k * kLanes) - max[k]);
      Acc value = e * scale[k];
      if constexpr (kDense) value -= dense(c, k) * g[k];
      simd::store<kLanes>(gradient.at(c) + k * kLanes, keep[k] == 0 ? nothing[k] : value);
    }
  }
  for (int i = 0; i < count; ++i) {
    if (targets.index[i] >= 0) {
      gradient.at(targets.index[i])[i] = static_cast<scalar_t>(target_gradient[i]);
    }
  }
  return total;
}

// The first `count` positions, `step` elements apart, into columns of kLanes; the others zero.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE void gather_columns(Column<const scalar_t> from, int64_t step, scalar_t* to,
                                    int64_t classes, int64_t count) {
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < count; ++i) to[c * kLanes + i] = from.at(c)[i * step];
    for (int64_t i = count; i < kLanes; ++i) to[c * kLanes + i] = scalar_t(0.0f);
  }
}

// One block of kPositionsPerBlock positions. Positions that are not contiguous (rows of few
// classes) and the last few of a block go through columns of their own, in `padded`.
template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE double process_block(const CrossEntropyArgs<scalar_t>& args, int64_t block,
                                     std::vector<acc_type<scalar_t>>& scratch,
                                     std::vector<scalar_t>& padded) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr int kWidth = 4;
  constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
  const int64_t classes = args.shape.classes, inner = args.shape.inner;
  const int64_t n = block / blocks_per_outer(args.shape);
  const int64_t begin = block % blocks_per_outer(args.shape) * kPositionsPerBlock;
  const int64_t end = std::min(inner, begin + kPositionsPerBlock);
  const bool keep_exps = args.gradient && !args.backward;
  if (kNarrow && keep_exps) scratch.resize(classes * kLanes * kWidth);

  const auto column = [n](auto* data, const Strides& strides,
                          int64_t s) __attribute__((always_inline)) {
    using Element = std::remove_reference_t<decltype(*data)>;
    return Column<Element>{data ? data + n * strides.outer + s * strides.inner : nullptr,
                           strides.channel};
  };
  const auto exps_of = [&](Column<scalar_t> gradient, int width) __attribute__((always_inline)) {
    Column<acc_t> exps{nullptr, 0};
    if constexpr (kNarrow) {
      if (keep_exps) exps = {scratch.data(), int64_t{kLanes} * width};
    } else {
      if (keep_exps) exps = gradient;
    }
    return exps;
  };
  double total = 0;
  int64_t s = begin;
  const bool side_by_side = args.input_strides.inner == 1 &&
                            (!args.probabilities || args.probability_strides.inner == 1) &&
                            (!args.gradient || args.gradient_strides.inner == 1);
  for (; side_by_side && s + kLanes * kWidth <= end; s += kLanes * kWidth) {
    const auto gradient = column(args.gradient, args.gradient_strides, s);
    total += process_tile<Isa, scalar_t, kDense, kWidth>(
        args, n * inner + s, kLanes * kWidth, column(args.input, args.input_strides, s),
        column(args.probabilities, args.probability_strides, s), gradient,
        exps_of(gradient, kWidth));
  }
  for (; s < end; s += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - s);
    auto x = column(args.input, args.input_strides, s);
    auto probabilities = column(args.probabilities, args.probability_strides, s);
    auto gradient = column(args.gradient, args.gradient_strides, s);
    const auto result = gradient;
    const bool pad = count < kLanes || !side_by_side;
    if (pad) {
      padded.resize(3 * classes * kLanes);
      scalar_t* buffer = padded.data();
      gather_columns<kLanes>(x, args.input_strides.inner, buffer, classes, count);
      x = {buffer, kLanes};
      if (probabilities) {
        gather_columns<kLanes>(probabilities, args.probability_strides.inner,
                               buffer + classes * kLanes, classes, count);
        probabilities = {buffer + classes * kLanes, kLanes};
      }
      if (gradient) gradient = {buffer + 2 * classes * kLanes, kLanes};
    }
    total += process_tile<Isa, scalar_t, kDense, 1>(args, n * inner + s, count, x, probabilities,
                                                    gradient, exps_of(gradient, 1));
    if (pad && gradient) {
      for (int64_t c = 0; c < classes; ++c) {
        for (int64_t i = 0; i < count; ++i) {
          result.at(c)[i * args.gradient_strides.inner] = gradient.at(c)[i];
        }
      }
    }
  }
  return total;
}

}  // namespace torchext::cpu
