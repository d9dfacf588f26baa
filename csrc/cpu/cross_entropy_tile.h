// cross_entropy where positions, not classes, are contiguous: (N, C, d1, ...) and transposed
// (N, C). A tile is kWidth vectors of positions side by side; the classes are walked three times
// (maximum, exponentials and sums, gradient) while the tile is in cache. The formulas are those of
// cross_entropy_kernel.h.
#pragma once

#include "cpu/cross_entropy_call.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/memory.h"
#include "cpu/transpose.h"

namespace torchext::cpu {

constexpr int64_t kClassesPerSum = 256;
// Exponentials that are summed by themselves. Such sums are added up, and what that is rounded by
// is kept. Of 400 classes the gradient of one that is nearly certain was up to 3e-7 off with sums
// of 256, up to 1.2e-7 so (2.4e-7 in torch; 6,000 runs).
constexpr int64_t kClassesPerExactSum = 16;

// Element c of the tile's first position, and what separates the classes.
template <typename T>
struct Column {
  T* data;
  int64_t stride;
  TORCHEXT_INLINE T* at(int64_t c) const { return data + c * stride; }
  explicit operator bool() const { return data != nullptr; }
};

// What the lanes of one tile need beside the columns.
template <typename acc_t, int kPositions>
struct TileTargets {
  int64_t index[kPositions];  // -1 where there is none, or it is ignored
  acc_t keep[kPositions];     // 0 where ignored, else 1
  acc_t weight[kPositions];   // W_t of the formulas
  acc_t x[kPositions];        // the logit of the class
  acc_t gradient[kPositions];
};

// A tile, its columns in scalar_t or in what is computed in. Leaves the gradients of the targets'
// classes in `targets`.
template <class Isa, typename scalar_t, bool kDense, int kWidth, typename Element>
TORCHEXT_INLINE double process_tile(
    const CrossEntropyArgs<scalar_t>& args, int64_t position, int64_t count,
    Column<const Element> x, Column<const Element> probabilities, Column<Element> gradient,
    Column<acc_type<scalar_t>> exps,
    TileTargets<acc_type<scalar_t>, kLanesOf<Isa, scalar_t> * kWidth>& targets) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr int kPositions = kLanes * kWidth;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  using Acc = Vector<acc_t, kLanes>;
  const int64_t classes = args.shape.classes;

  for (int i = 0; i < kPositions; ++i) {
    const bool real = i < count;
    const int64_t index = args.indices && real ? args.target(position + i) : -1;
    const bool keep = real && !(args.indices && index == args.ignore_index);
    const bool indexed = keep && args.indices;
    targets.index[i] = indexed ? index : -1;
    targets.keep[i] = keep;
    targets.weight[i] = indexed ? args.target_weight(index) : acc_t{0};
    targets.x[i] = indexed ? static_cast<acc_t>(x.at(index)[i]) : acc_t{0};
  }
  // Those of the tile's positions, of one number for each.
  const auto lanes = [&](const acc_t* values, int k, acc_t other) __attribute__((always_inline)) {
    const int64_t here = count - k * kLanes;
    if (here >= kLanes) return simd::load<kLanes>(values + position + k * kLanes);
    if (here <= 0) return Acc{} + other;
    return simd::load_tail<kLanes>(values + position + k * kLanes, here, other);
  };
  const auto dense = [&](int64_t c, int k) __attribute__((always_inline)) {
    // Weights before the probabilities: a product of them last would be contracted into whatever
    // sum comes next, in tiles of one width and not of another.
    const acc_t kept = args.weight ? args.kept * args.weight[c] : args.kept;
    const acc_t uniform = args.weight ? args.uniform * args.weight[c] : args.uniform;
    if (!probabilities) return Acc{} + uniform;
    return simd::load<kLanes>(probabilities.at(c) + k * kLanes) * kept + uniform;
  };

  // Many equal terms would be rounded alike.
  const bool known_mass = kDense && !probabilities;
  Acc max[kWidth], sum[kWidth], lost[kWidth], mass[kWidth], dot[kWidth];
  for (int k = 0; k < kWidth; ++k) {
    max[k] = Acc{} - kInfinity;
    sum[k] = lost[k] = dot[k] = Acc{};
    mass[k] = Acc{} + (known_mass ? static_cast<acc_t>(args.uniform_mass) : acc_t{0});
  }
  double total = 0;
  if (args.backward) {
    for (int k = 0; k < kWidth; ++k) {
      max[k] = lanes(args.stats, k, 0);
      sum[k] = lanes(args.stats + args.stats_stride, k, 1);
    }
    if (kDense && probabilities) {
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
      Acc part_mass[kWidth] = {}, part_dot[kWidth] = {};
      for (int64_t c = begin; c < end;) {
        Acc part_sum[kWidth] = {};
        for (const int64_t stop = std::min(end, c + kClassesPerExactSum); c < stop; ++c) {
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
          const Acc whole = sum[k] + part_sum[k], added = whole - sum[k];
          lost[k] += (sum[k] - (whole - added)) + (part_sum[k] - added);
          sum[k] = whole;
        }
      }
      for (int k = 0; k < kWidth; ++k) {
        if (!known_mass) mass[k] += part_mass[k];
        dot[k] += part_dot[k];
      }
    }
    for (int k = 0; k < kWidth; ++k) sum[k] += lost[k];
    for (int i = 0; i < count; ++i) {
      const int k = i / kLanes, lane = i % kLanes;
      const acc_t log_sum = std::log(sum[k][lane]);
      acc_t loss = targets.weight[i] * (log_sum - (targets.x[i] - max[k][lane]));
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
  for (int k = 0; k < kWidth; ++k) {
    const Acc weight = simd::load<kLanes>(targets.weight + k * kLanes);
    keep[k] = simd::load<kLanes>(targets.keep + k * kLanes);
    g[k] = Acc{} + static_cast<acc_t>(args.gradient_scale);
    if (args.grad_output) g[k] *= lanes(args.grad_output, k, 0);
    g[k] = keep[k] == 0 ? Acc{} : g[k];
    scale[k] = g[k] * (weight + mass[k]) / sum[k];
    const Acc shifted = simd::load<kLanes>(targets.x + k * kLanes) - max[k];
    Acc q = weight;
    if constexpr (kDense) {
      acc_t uniform[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int64_t index = targets.index[k * kLanes + i];
        uniform[i] = index < 0 ? acc_t{0} : args.uniform_target(index);
      }
      q += simd::load<kLanes>(uniform);
    }
    const Acc value = simd::exp_nonpositive<kLanes>(shifted) * scale[k] - q * g[k];
    simd::store<kLanes>(targets.gradient + k * kLanes, value);
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
  return total;
}

// The gradients of the targets' classes, of positions `step` elements apart.
template <typename scalar_t, int kPositions>
TORCHEXT_INLINE void write_targets(const TileTargets<acc_type<scalar_t>, kPositions>& targets,
                                   int64_t count, Column<scalar_t> gradient, int64_t step) {
  for (int i = 0; gradient && i < count; ++i) {
    if (targets.index[i] < 0) continue;
    gradient.at(targets.index[i])[i * step] = static_cast<scalar_t>(targets.gradient[i]);
  }
}

// `count` positions, `step` elements apart, as columns of kLanes positions.
template <int kBlock, int kLanes, typename scalar_t>
TORCHEXT_INLINE void gather_columns(Column<const scalar_t> from, int64_t step, int64_t classes,
                                    int64_t count, acc_type<scalar_t>* to) {
  if (from.stride == 1) {
    copy_transposed<kBlock>(Matrix<const scalar_t>{from.data, step, 1}, count, classes, to, kLanes);
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t i = 0; i < count; ++i) to[c * kLanes + i] = wide(from.at(c)[i * step]);
    }
  }
  if (count == kLanes) return;
  for (int64_t c = 0; c < classes; ++c) std::fill_n(to + c * kLanes + count, kLanes - count, 0);
}

// And back.
template <int kBlock, int kLanes, typename scalar_t>
TORCHEXT_INLINE void scatter_columns(const acc_type<scalar_t>* from, int64_t classes, int64_t count,
                                     Column<scalar_t> to, int64_t step) {
  if (to.stride == 1) {
    using Columns = Matrix<const acc_type<scalar_t>>;
    return copy_transposed<kBlock>(Columns{from, kLanes, 1}, classes, count, to.data, step);
  }
  for (int64_t c = 0; c < classes; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      to.at(c)[i * step] = static_cast<scalar_t>(from[c * kLanes + i]);
    }
  }
}

// One block of kPositionsPerBlock positions. Positions that are not contiguous (rows of few
// classes) and the last few of a block go through columns of their own, in what is computed in.
template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE double process_block(const CrossEntropyArgs<scalar_t>& args, int64_t block,
                                     AlignedBuffer<acc_type<scalar_t>>& exps_buffer,
                                     AlignedBuffer<acc_type<scalar_t>>& columns_buffer) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr int kWidth = 4;
  constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
  // Sides of the squares that are turned.
  constexpr int kBlock = kNarrow && Isa::kBytes >= 32 ? 8 : 16 / int{sizeof(acc_t)};
  const int64_t classes = args.shape.classes, inner = args.shape.inner;
  const int64_t n = block / blocks_per_outer(args.shape);
  const int64_t begin = block % blocks_per_outer(args.shape) * kPositionsPerBlock;
  const int64_t end = std::min(inner, begin + kPositionsPerBlock);
  const bool keep_exps = args.gradient && !args.backward;
  const bool side_by_side = args.input_strides.inner == 1 &&
                            (!args.probabilities || args.probability_strides.inner == 1) &&
                            (!args.gradient || args.gradient_strides.inner == 1);
  acc_t* const kept_exps = kNarrow && keep_exps && side_by_side
                               ? exps_buffer.of_size(classes * kLanes * kWidth)
                               : nullptr;

  const auto column = [n](auto* data, const Strides& strides,
                          int64_t s) __attribute__((always_inline)) {
    using Element = std::remove_reference_t<decltype(*data)>;
    return Column<Element>{data ? data + n * strides.outer + s * strides.inner : nullptr,
                           strides.channel};
  };
  double total = 0;
  const auto run = [&](auto width, int64_t s) __attribute__((always_inline)) {
    constexpr int kVectors = width();
    const Column<scalar_t> gradient = column(args.gradient, args.gradient_strides, s);
    Column<acc_t> exps{nullptr, 0};
    if constexpr (kNarrow) {
      exps = {kept_exps, int64_t{kLanes} * kVectors};
    } else {
      if (keep_exps) exps = gradient;
    }
    TileTargets<acc_t, kLanes * kVectors> targets;
    total += process_tile<Isa, scalar_t, kDense, kVectors>(
        args, n * inner + s, kLanes * kVectors, column(args.input, args.input_strides, s),
        column(args.probabilities, args.probability_strides, s), gradient, exps, targets);
    write_targets(targets, kLanes * kVectors, gradient, 1);
  };
  int64_t s = begin;
  if (side_by_side) {
    for (; s + kLanes * kWidth <= end; s += kLanes * kWidth) {
      run(std::integral_constant<int, kWidth>{}, s);
    }
    for (; s + kLanes <= end; s += kLanes) run(std::integral_constant<int, 1>{}, s);
  }
  for (; s < end; s += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - s);
    acc_t* const own = columns_buffer.of_size(3 * classes * kLanes);
    Column<acc_t> probabilities{nullptr, kLanes}, own_gradient{nullptr, kLanes};
    gather_columns<kBlock, kLanes>(column(args.input, args.input_strides, s),
                                   args.input_strides.inner, classes, count, own);
    if (args.probabilities) {
      probabilities.data = own + classes * kLanes;
      gather_columns<kBlock, kLanes>(column(args.probabilities, args.probability_strides, s),
                                     args.probability_strides.inner, classes, count,
                                     probabilities.data);
    }
    if (args.gradient) own_gradient.data = own + 2 * classes * kLanes;
    TileTargets<acc_t, kLanes> targets;
    total += process_tile<Isa, scalar_t, kDense, 1>(
        args, n * inner + s, count, Column<const acc_t>{own, kLanes},
        Column<const acc_t>{probabilities.data, kLanes}, own_gradient,
        keep_exps ? own_gradient : Column<acc_t>{nullptr, 0}, targets);
    if (args.gradient) {
      const Column<scalar_t> gradient = column(args.gradient, args.gradient_strides, s);
      const int64_t step = args.gradient_strides.inner;
      scatter_columns<kBlock, kLanes>(own_gradient.data, classes, count, gradient, step);
      write_targets(targets, count, gradient, step);
    }
  }
  return total;
}

}  // namespace torchext::cpu
