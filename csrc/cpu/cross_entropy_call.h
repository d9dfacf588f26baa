// One call of the cross_entropy kernels: layouts, weights, targets and their checks, and the total
// of the losses in an order that no thread count changes. Serves cross_entropy, and the chunks of
// linear_cross_entropy.
#pragma once

#include <utility>
#include <vector>

#include "cpu/cross_entropy_kernel.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "ops/cross_entropy.h"
#include "ops/cross_entropy_walk.h"

namespace torchext::cpu {

// Positions whose losses are summed together, where they stand side by side.
constexpr int64_t kPositionsPerBlock = 64;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 8192;
// Targets whose weights are summed together.
constexpr int64_t kTargetsPerBlock = 8192;

// Tiles of one n.
inline int64_t blocks_per_outer(const CrossEntropyShape& shape) {
  return (shape.inner + kPositionsPerBlock - 1) / kPositionsPerBlock;
}

// Blocks [begin, end) of block_rows rows, or of kPositionsPerBlock positions.
template <typename scalar_t>
void cross_entropy_rows(const CrossEntropyArgs<scalar_t>& args, int64_t begin, int64_t end);
template <typename scalar_t>
void cross_entropy_tiles(const CrossEntropyArgs<scalar_t>& args, int64_t begin, int64_t end);

// Rows of few classes go through the tiles' kernels, too.
inline std::optional<Walk> walk_of(const std::optional<Strides>& strides,
                                   const CrossEntropyShape& shape) {
  return torchext::walk_of(strides, shape, kFewClasses);
}

// The values in the accumulation dtype: themselves, or copied into `copies`.
template <typename scalar_t>
const acc_type<scalar_t>* widened(const scalar_t* values, int64_t count,
                                  std::vector<acc_type<scalar_t>>& copies) {
  if constexpr (std::is_same_v<scalar_t, acc_type<scalar_t>>) {
    return values;
  } else {
    copies.assign(values, values + count);
    return copies.data();
  }
}

struct Call {
  const char* op;  // whose name errors bear
  const Tensor& input;
  const Tensor& target;
  const std::optional<Tensor>& weight;
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
};

// The number of targets, or the weight of them, that a mean divides by. Every class index is
// checked here, before it addresses anything.
template <typename scalar_t>
double target_mass(const char* op, const CrossEntropyArgs<scalar_t>& args) {
  const int64_t positions = args.shape.positions();
  if (!args.indices) return static_cast<double>(positions);
  const int64_t blocks = (positions + kTargetsPerBlock - 1) / kTargetsPerBlock;
  std::vector<double> mass(blocks, 0.0);
  std::vector<int64_t> wrong(blocks, -1);
  for_each_block(blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t last = std::min(positions, (block + 1) * kTargetsPerBlock);
      double sum = 0;
      for (int64_t p = block * kTargetsPerBlock; p < last; ++p) {
        const int64_t index = args.target(p);
        if (index == args.ignore_index) continue;
        if (index < 0 || index >= args.shape.classes) {
          wrong[block] = p;
          break;
        }
        sum += args.weight ? static_cast<double>(args.weight[index]) : 1.0;
      }
      mass[block] = sum;
    }
  });
  double total = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    TORCHEXT_CHECK_INDEX(wrong[block] < 0, op, ": expected target in [0, ", args.shape.classes,
                         ") or ignore_index (", args.ignore_index, "), but got: Target ",
                         args.target(wrong[block]),
                         " is out of bounds (at "
                         "position ",
                         wrong[block], " of the flattened target).");
    total += mass[block];
  }
  return total;
}

// Blocks of rows or of positions: what threads share out, and what losses are summed by.
template <typename scalar_t>
int64_t block_count(const CrossEntropyArgs<scalar_t>& args, Walk walk) {
  if (walk != Walk::kRows) return args.shape.outer * blocks_per_outer(args.shape);
  return (args.shape.positions() + args.block_rows - 1) / args.block_rows;
}

template <typename scalar_t>
void run_blocks(const CrossEntropyArgs<scalar_t>& args, Walk walk) {
  const int64_t positions =
      walk == Walk::kRows ? args.block_rows : std::min(kPositionsPerBlock, args.shape.inner);
  const int64_t grain = kGrain / std::max<int64_t>(positions * args.shape.classes, 1);
  for_each_block(block_count(args, walk), grain, [&](int64_t begin, int64_t end) {
    if (walk == Walk::kRows) {
      cross_entropy_rows<scalar_t>(args, begin, end);
    } else {
      cross_entropy_tiles<scalar_t>(args, begin, end);
    }
  });
}

// The class weights in the dtype of the sums, copied into `copies`; null without any.
template <typename scalar_t>
const acc_type<scalar_t>* copied_weight(const std::optional<Tensor>& weight,
                                        std::vector<acc_type<scalar_t>>& copies) {
  using acc_t = acc_type<scalar_t>;
  if (!weight) return nullptr;
  const Tensor dense = as_contiguous(*weight);
  const auto take = [&](const auto* values) { copies.assign(values, values + dense.numel()); };
  if (dense.element_size() == sizeof(acc_t)) {
    take(static_cast<const acc_t*>(dense.const_data_ptr()));
  } else {
    take(static_cast<const scalar_t*>(dense.const_data_ptr()));
  }
  return copies.data();
}

// The class weights (or null) and the smoothing, and what comes of them; args.shape is set.
template <typename scalar_t>
void set_weight(CrossEntropyArgs<scalar_t>& args, const acc_type<scalar_t>* weight,
                double label_smoothing) {
  using acc_t = acc_type<scalar_t>;
  const int64_t classes = args.shape.classes;
  args.label_smoothing = label_smoothing > 0 ? label_smoothing : 0.0;
  args.kept = static_cast<acc_t>(1.0 - args.label_smoothing);
  args.uniform = static_cast<acc_t>(args.label_smoothing / static_cast<double>(classes));
  args.weight = weight;
  double weights = static_cast<double>(classes);
  if (weight) {
    weights = 0;
    for (int64_t c = 0; c < classes; ++c) weights += weight[c];
  }
  args.uniform_mass = weights * args.uniform;
}

// What forward and backward share: layouts, weights, targets. Keeps what the pointers point to.
template <typename scalar_t>
struct Prepared {
  using acc_t = acc_type<scalar_t>;
  CrossEntropyArgs<scalar_t> args{};
  Tensor input, target;
  std::vector<acc_t> weight;
  Walk walk = Walk::kTiles;
  double mass = 1;  // a mean divides by it

  Prepared(const Call& call, const CrossEntropyShape& shape) {
    args.shape = shape;
    args.block_rows = rows_per_block(shape);
    input = call.input;
    const auto found = walk_of(class_strides(input), shape);
    if (!found) input = as_contiguous(input);
    walk = found ? *found : *walk_of(class_strides(input), shape);
    args.input = static_cast<const scalar_t*>(input.const_data_ptr());
    args.input_strides = strides_of(input);
    if (shape.probabilities) {
      target = call.target;
      if (walk_of(class_strides(target), shape) != walk) {
        const auto sizes = sizes_of(target);
        target = empty_strided_like(target, sizes, dense_strides(sizes, walk), dtype_code(target));
        torch::stable::copy_(target, call.target);
      }
      args.probabilities = static_cast<const scalar_t*>(target.const_data_ptr());
      args.probability_strides = strides_of(target);
    } else {
      target = as_contiguous(call.target);
      args.indices = target.const_data_ptr();
      args.index_bytes = static_cast<int>(target.element_size());
    }
    args.ignore_index = call.ignore_index;
    set_weight(args, copied_weight<scalar_t>(call.weight, weight), call.label_smoothing);
    mass = target_mass(call.op, args);
    args.gradient_scale = call.reduction == Reduction::kMean ? mean(1.0) : 1.0;
    if (transposed()) std::swap(args.shape.outer, args.shape.inner);
    args.stats_stride = args.shape.positions();
  }

  // NaN over no target, and over targets of no weight, as in torch.
  double mean(double sum) const {
    return mass == 0 ? std::numeric_limits<double>::quiet_NaN() : sum / mass;
  }

  // Whether the N positions take the part of S.
  bool transposed() const {
    return walk == Walk::kTransposed || (walk == Walk::kFewClasses && input.dim() <= 2);
  }

  // What the kernels step by; `inner` and `outer` change places in a transposed matrix.
  Strides strides_of(const Tensor& tensor) const {
    Strides strides = *class_strides(tensor);
    if (transposed()) strides = {0, strides.channel, strides.outer};
    if (args.shape.classes == 1) strides.channel = 1;
    return strides;
  }

  void write_gradient_to(const Tensor& gradient) {
    args.gradient = static_cast<scalar_t*>(gradient.mutable_data_ptr());
    args.gradient_strides = strides_of(gradient);
  }

  // A new gradient, laid out like the logits as far as they are dense.
  Tensor new_gradient() {
    const auto sizes = sizes_of(input);
    const Tensor gradient =
        empty_strided_like(input, sizes, dense_strides(sizes, walk), dtype_code(input));
    write_gradient_to(gradient);
    advise(gradient);
    return gradient;
  }

  int64_t blocks() const { return block_count(args, walk); }
  void run() const { run_blocks(args, walk); }
};

}  // namespace torchext::cpu
