// The arithmetic of cross_entropy on the CPU: rows whose classes are contiguous, and tiles of
// positions whose classes are not. Formulas, for a row x with maximum m and S = sum_c exp(x_c - m):
//
//   loss       = W_t (log S - (x_t - m)) + sum_c q_c (log S - (x_c - m))
//   gradient_c = g (exp(x_c - m) (W_t + sum q) / S - (q_c + [c = t] W_t))
//
// with W_t = (1 - smoothing) weight_t of a class index t (0 for probabilities), the dense target
// q_c = weight_c ((1 - smoothing) probability_c + smoothing / C) (none for a plain class index),
// and g the gradient of the row's loss. At c = t the sum of q and W is made first: of a single
// class it is the other term's, and the gradient is 0 as the stock op's is.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/simd_math.h"
#include "ops/cross_entropy.h"

namespace torchext::cpu {

using simd::acc_type;
using simd::kLanesOf;
using simd::Vector;

// Rows (or tiles) whose losses are summed together, at the most: a matter of the shape, so that the
// sum of the batch does not depend on the number of threads.
constexpr int64_t kRowsPerBlock = 16;
// Classes from which on a few rows are some blocks, too, for threads to share: 4 x 32000 floats
// take 22 us forward by two, 36 by one, 8 x 10000 16 and 24, 40 x 10000 79 and 104, as 16 rows are
// less than half of them (2 cores of Zen 4).
constexpr int64_t kManyClasses = 512;
constexpr int64_t kFewestBlocks = 8;
inline int64_t rows_per_block(const CrossEntropyShape& shape) {
  if (shape.classes < kManyClasses) return kRowsPerBlock;
  return std::clamp<int64_t>(shape.positions() / kFewestBlocks, 1, kRowsPerBlock);
}
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kChunk = 2048;
// Rows of no more classes than this go into lanes (cross_entropy_tile.h): a vector for each would
// be mostly empty. Of 4096 x 40 floats the losses take 120 us so and 180 by rows, of 4096 x 48 110
// and 105 to 165 (a core of Zen 4). At least the lanes of the widest vector.
constexpr int64_t kFewClasses = 48;

template <typename scalar_t>
struct CrossEntropyArgs {
  using acc_t = acc_type<scalar_t>;
  CrossEntropyShape shape;
  int64_t block_rows;  // rows of a block

  const scalar_t* input;
  Strides input_strides;
  const scalar_t* probabilities;  // or null
  Strides probability_strides;
  const void* indices;  // contiguous int64, int32 or uint8, or null
  int index_bytes;
  int64_t ignore_index;
  const acc_t* weight;  // (C) or null
  double label_smoothing;
  acc_t kept, uniform;  // 1 - smoothing, smoothing / C
  double uniform_mass;  // sum_c weight_c * uniform: sum q without probabilities

  scalar_t* gradient;  // null where none is wanted; may be the input
  Strides gradient_strides;
  double gradient_scale;     // g, or what it is multiplied by:
  const acc_t* grad_output;  // one a position (reduction none), or null
  acc_t* losses;             // one a position, or null: the sums of blocks instead
  double* block_losses;
  acc_t* stats;          // maxima, then sums: written forward where not null, read backward
  int64_t stats_stride;  // from a position's maximum to its sum
  bool backward;         // stats are given, no loss is wanted

  bool dense() const { return probabilities != nullptr || label_smoothing > 0; }

  int64_t target(int64_t position) const {
    switch (index_bytes) {
      case 8:
        return static_cast<const int64_t*>(indices)[position];
      case 4:
        return static_cast<const int32_t*>(indices)[position];
      default:
        return static_cast<const uint8_t*>(indices)[position];
    }
  }
  // From the first element of a tensor to a position's.
  TORCHEXT_INLINE int64_t offset(int64_t position, const Strides& strides) const {
    const int64_t n = shape.inner == 1 ? position : position / shape.inner;
    return n * strides.outer + (position - n * shape.inner) * strides.inner;
  }
  // W_t of the formulas.
  acc_t target_weight(int64_t index) const { return weight ? kept * weight[index] : kept; }
  // q_c without probabilities.
  acc_t uniform_target(int64_t index) const { return weight ? uniform * weight[index] : uniform; }
  acc_t position_scale(int64_t position) const {
    const acc_t scale = static_cast<acc_t>(gradient_scale);
    return grad_output ? scale * grad_output[position] : scale;
  }
};

// A row's softmax and, of a dense target, sum q and sum q (x - m).
template <typename acc_t>
struct RowSums {
  acc_t max;
  acc_t sum;
  acc_t mass = 0;
  acc_t dot = 0;
};

// q_c for kLanes classes from c on.
template <int kLanes, typename scalar_t>
TORCHEXT_INLINE Vector<acc_type<scalar_t>, kLanes> dense_target(
    const CrossEntropyArgs<scalar_t>& args, const scalar_t* probabilities, int64_t c) {
  auto q = Vector<acc_type<scalar_t>, kLanes>{} + args.uniform;
  if (probabilities) q = simd::load<kLanes>(probabilities + c) * args.kept + args.uniform;
  if (args.weight) q *= simd::load<kLanes>(args.weight + c);
  return q;
}

// Rows are walked in chunks. A chunk has at least a vector of classes; its last vector overlaps the
// one before it where the classes are no multiple of the lanes (no masks, no scalar rest): it is
// loaded first, counted for its last lanes alone, and stored whole, the overlap with equal values.
struct Chunks {
  int64_t classes;
  int64_t size;

  explicit Chunks(int64_t classes)
      : classes(classes), size(std::max(kChunk, (classes + kMaxChunks - 1) / kMaxChunks)) {}
  // Where the chunk that begins at `begin` ends; a short rest joins the last one.
  TORCHEXT_INLINE int64_t end(int64_t begin) const {
    return classes - begin - size < kFewClasses ? classes : begin + size;
  }
};

// One read of a row: the maximum a chunk at a time, then, with the chunk in the first cache, its
// exponentials relative to the maximum so far (kept in `exps` where not null, each chunk's base in
// `bases`), the sum carried over from base to base.
template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE RowSums<acc_type<scalar_t>> softmax_row(
    const CrossEntropyArgs<scalar_t>& args, const scalar_t* x, const scalar_t* probabilities,
    const Chunks& chunks, acc_type<scalar_t>* exps, acc_type<scalar_t>* bases) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  using Acc = Vector<acc_t, kLanes>;
  RowSums<acc_t> row{-kInfinity, 0};
  for (int64_t begin = 0, end = 0; begin < chunks.classes; begin = end) {
    end = chunks.end(begin);
    const int64_t rest = (end - begin) % kLanes;
    const int64_t last = end - kLanes;
    const Acc tail = simd::load<kLanes>(x + last);
    Acc max0 = tail, max1 = Acc{} - kInfinity;
    int64_t c = begin;
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
      const Acc x0 = simd::load<kLanes>(x + c), x1 = simd::load<kLanes>(x + c + kLanes);
      max0 = x0 > max0 ? x0 : max0;
      max1 = x1 > max1 ? x1 : max1;
    }
    if (c + kLanes <= end) {
      const Acc x0 = simd::load<kLanes>(x + c);
      max1 = x0 > max1 ? x0 : max1;
    }
    max0 = max0 > max1 ? max0 : max1;
    const acc_t chunk_max = simd::horizontal_max<kLanes, acc_t>(max0);
    const acc_t max = chunk_max > row.max ? chunk_max : row.max;
    // Classes of -inf alone so far: any finite base gives their exponentials, 0.
    const acc_t base = max == -kInfinity ? acc_t{0} : max;
    *bases++ = max;

    Acc sum = {}, mass = {}, dot = {};
    for (c = begin; c + kLanes <= end; c += kLanes) {
      // The next chunk, or row: its memory is on its way while this one's exponentials are made.
      // 1024 x 1000 floats from memory: 296 us without, 200 with.
      __builtin_prefetch(x + c + (end - begin));
      if (exps) __builtin_prefetch(exps + c + (end - begin), 1);
      const Acc shifted = simd::load<kLanes>(x + c) - base;
      const Acc e = simd::exp_nonpositive<kLanes>(shifted);
      sum += e;
      if constexpr (kDense) {
        const Acc q = dense_target<kLanes>(args, probabilities, c);
        mass += q;
        dot += q * shifted;
      }
      if (exps) simd::store<kLanes>(exps + c, e);
    }
    if (rest > 0) {
      const Acc shifted = tail - base;
      const Acc e = simd::exp_nonpositive<kLanes>(shifted);
      sum += simd::last_lanes<kLanes, acc_t>(e, rest);
      if constexpr (kDense) {
        const Acc q = dense_target<kLanes>(args, probabilities, last);
        mass += simd::last_lanes<kLanes, acc_t>(q, rest);
        dot += simd::last_lanes<kLanes, acc_t>(q * shifted, rest);
      }
      if (exps) simd::store<kLanes>(exps + last, e);
    }
    if (max > row.max && row.max != -kInfinity) {
      row.sum *= simd::exp_nonpositive_scalar(row.max - max);
      if constexpr (kDense) row.dot += row.mass * (row.max - max);
    }
    if constexpr (kDense) {
      // Chunks before the first finite class were relative to 0.
      if (row.max == -kInfinity) row.dot -= row.mass * base;
      row.dot += simd::horizontal_sum<kLanes, acc_t>(dot);
      row.mass += simd::horizontal_sum<kLanes, acc_t>(mass);
    }
    row.sum += simd::horizontal_sum<kLanes, acc_t>(sum);
    row.max = max;
  }
  // Many equal terms are rounded alike.
  if (kDense && !probabilities) row.mass = static_cast<acc_t>(args.uniform_mass);
  // log_softmax of nothing but -inf is NaN.
  if (row.max == -kInfinity) row.sum = std::numeric_limits<acc_t>::quiet_NaN();
  return row;
}

// The sum of a dense target of given probabilities.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE acc_type<scalar_t> dense_mass(const CrossEntropyArgs<scalar_t>& args,
                                              const scalar_t* probabilities) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  const int64_t classes = args.shape.classes, rest = classes % kLanes;
  Vector<acc_t, kLanes> mass = {};
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) {
    mass += dense_target<kLanes>(args, probabilities, c);
  }
  mass += simd::last_lanes<kLanes, acc_t>(
      dense_target<kLanes>(args, probabilities, classes - kLanes), rest);
  return simd::horizontal_sum<kLanes, acc_t>(mass);
}

// gradient = e * scale - q * g over the chunk [begin, end); e from `exps`, or anew from x.
template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE void gradient_row(const CrossEntropyArgs<scalar_t>& args, const scalar_t* x,
                                  const scalar_t* probabilities, scalar_t* gradient,
                                  const acc_type<scalar_t>* exps, acc_type<scalar_t> max,
                                  acc_type<scalar_t> scale, acc_type<scalar_t> g, int64_t begin,
                                  int64_t end) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_t, kLanes>;
  const int64_t last = end - kLanes;
  const Acc tail = exps ? simd::load<kLanes>(exps + last) : simd::load<kLanes>(x + last);
  const auto value = [&](Acc e, int64_t c) __attribute__((always_inline)) {
    if (!exps) e = simd::exp_nonpositive<kLanes>(e - max);
    Acc result = e * scale;
    if constexpr (kDense) result -= dense_target<kLanes>(args, probabilities, c) * g;
    return result;
  };
  for (int64_t c = begin; c + kLanes <= end; c += kLanes) {
    const Acc e = exps ? simd::load<kLanes>(exps + c) : simd::load<kLanes>(x + c);
    simd::store<kLanes>(gradient + c, value(e, c));
  }
  if ((end - begin) % kLanes) simd::store<kLanes>(gradient + last, value(tail, last));
}

// The gradient of a row that counts for nothing: 0, or NaN where its softmax is NaN (as in torch,
// where it is 0 times the softmax): with a NaN, with +inf, or of nothing but -inf.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void ignored_row(const scalar_t* x, scalar_t* gradient, int64_t classes) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_t, kLanes>;
  constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();
  Acc max = Acc{} - kInfinity, nan = {};
  const auto look = [&](Acc value) __attribute__((always_inline)) {
    max = value > max ? value : max;
    nan = value == value ? nan : Acc{} + acc_t{1};
  };
  for (int64_t c = 0; c + kLanes <= classes; c += kLanes) look(simd::load<kLanes>(x + c));
  look(simd::load<kLanes>(x + classes - kLanes));
  const acc_t largest = simd::horizontal_max<kLanes, acc_t>(max);
  const bool defined =
      simd::horizontal_sum<kLanes, acc_t>(nan) == 0 && largest < kInfinity && largest > -kInfinity;
  if (defined) {
    std::memset(static_cast<void*>(gradient), 0, classes * sizeof(scalar_t));
  } else {
    std::fill_n(gradient, classes, static_cast<scalar_t>(std::numeric_limits<float>::quiet_NaN()));
  }
}

// Rows [begin, end), each with contiguous classes. Returns the sum of their losses.
template <class Isa, typename scalar_t, bool kDense>
TORCHEXT_INLINE double process_rows(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                    int64_t end, acc_type<scalar_t>* scratch) {
  using acc_t = acc_type<scalar_t>;
  const int64_t classes = args.shape.classes;
  const Chunks chunks(classes);
  double total = 0;
  for (int64_t p = begin; p < end; ++p) {
    const scalar_t* x = args.input + args.offset(p, args.input_strides);
    const scalar_t* probabilities =
        args.probabilities ? args.probabilities + args.offset(p, args.probability_strides)
                           : nullptr;
    scalar_t* gradient =
        args.gradient ? args.gradient + args.offset(p, args.gradient_strides) : nullptr;
    const int64_t index = args.indices ? args.target(p) : -1;
    const bool ignored = args.indices && index == args.ignore_index;
    if (ignored) {
      if (gradient) ignored_row<Isa, scalar_t>(x, gradient, classes);
      if (args.losses) args.losses[p] = 0;
      if (args.stats && !args.backward) args.stats[p] = args.stats[args.stats_stride + p] = 0;
      continue;
    }
    const acc_t target_weight = args.indices ? args.target_weight(index) : acc_t{0};
    const acc_t target_x = args.indices ? static_cast<acc_t>(x[index]) : acc_t{0};
    const acc_t g = args.position_scale(p);
    acc_t bases[kMaxChunks];
    acc_t* exps = nullptr;
    RowSums<acc_t> row;
    if (args.backward) {
      row.max = args.stats[p];
      row.sum = args.stats[args.stats_stride + p];
      if constexpr (kDense) row.mass = static_cast<acc_t>(args.uniform_mass);
      if (kDense && probabilities) row.mass = dense_mass<Isa, scalar_t>(args, probabilities);
    } else {
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        exps = gradient;
      } else {
        exps = gradient ? scratch : nullptr;
      }
      row = softmax_row<Isa, scalar_t, kDense>(args, x, probabilities, chunks, exps, bases);
      const acc_t log_sum = std::log(row.sum);
      acc_t loss = 0;
      if (args.indices) loss = target_weight * (log_sum - (target_x - row.max));
      if constexpr (kDense) loss += row.mass * log_sum - row.dot;
      if (args.losses) args.losses[p] = loss;
      total += loss;
      if (args.stats) {
        args.stats[p] = row.max;
        args.stats[args.stats_stride + p] = row.sum;
      }
    }
    if (!gradient) continue;
    const acc_t scale = g * (target_weight + row.mass) / row.sum;
    acc_t target_gradient = 0;
    if (args.indices) {
      const acc_t e = simd::exp_nonpositive_scalar(target_x - row.max);
      acc_t q = target_weight;
      if constexpr (kDense) q += args.uniform_target(index);
      target_gradient = e * scale - q * g;
    }
    const acc_t* base = bases;
    for (int64_t from = 0, to = 0; from < classes; from = to) {
      to = chunks.end(from);
      acc_t part = 1;
      if (!args.backward && *base != row.max) part = simd::exp_nonpositive_scalar(*base - row.max);
      ++base;
      gradient_row<Isa, scalar_t, kDense>(args, x, probabilities, gradient, exps, row.max,
                                          scale * part, g, from, to);
    }
    if (args.indices) gradient[index] = static_cast<scalar_t>(target_gradient);
  }
  return total;
}

}  // namespace torchext::cpu
