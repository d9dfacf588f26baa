// cross_entropy on the CPU: from tensors to the kernels of cross_entropy_kernel.h and
// cross_entropy_tile.h, and the total of the loss in an order that no thread count changes.
#include "ops/cross_entropy.h"

#include "cpu/cross_entropy_kernel.h"
#include "cpu/cross_entropy_tile.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"

namespace torchext {
namespace {

using cpu::CrossEntropyArgs;
using simd::acc_type;

// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// Targets whose weights are summed together.
constexpr int64_t kTargetsPerBlock = 8192;

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void row_blocks(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                int64_t end) {
  const bool scratch_needed =
      args.gradient && !args.backward && !std::is_same_v<scalar_t, acc_type<scalar_t>>;
  std::vector<acc_type<scalar_t>> scratch(scratch_needed ? args.shape.classes : 0);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * cpu::kRowsPerBlock;
    const int64_t last = std::min(args.shape.positions(), first + cpu::kRowsPerBlock);
    const double loss =
        args.dense() ? cpu::process_rows<Isa, scalar_t, true>(args, first, last, scratch.data())
                     : cpu::process_rows<Isa, scalar_t, false>(args, first, last, scratch.data());
    if (args.block_losses) args.block_losses[block] = loss;
  }
}
TORCHEXT_SIMD_FUNCTION(cross_entropy_rows, row_blocks, CrossEntropyArgs)

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void tile_blocks(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                 int64_t end) {
  std::vector<acc_type<scalar_t>> scratch;
  std::vector<scalar_t> padded;
  for (int64_t block = begin; block < end; ++block) {
    const double loss =
        args.dense() ? cpu::process_block<Isa, scalar_t, true>(args, block, scratch, padded)
                     : cpu::process_block<Isa, scalar_t, false>(args, block, scratch, padded);
    if (args.block_losses) args.block_losses[block] = loss;
  }
}
TORCHEXT_SIMD_FUNCTION(cross_entropy_tiles, tile_blocks, CrossEntropyArgs)

// How the kernels walk a tensor: rows of contiguous classes, or tiles of positions. Rows of few
// classes fill no vector, so that their positions stand side by side in one, too.
enum class Walk { kRows, kFewClasses, kTiles, kTransposed };

std::optional<Walk> walk_of(const std::optional<Strides>& strides, const CrossEntropyShape& shape) {
  if (!strides) return std::nullopt;
  if (shape.positions() == 0) return Walk::kRows;  // nothing to walk
  if (strides->channel == 1 || shape.classes == 1) {
    return shape.classes <= cpu::kFewClasses ? Walk::kFewClasses : Walk::kRows;
  }
  if (shape.inner > 1) {
    if (strides->inner == 1) return Walk::kTiles;
  } else if (strides->outer == 1) {
    return Walk::kTransposed;  // (C, N) in memory: the N positions take the part of S
  }
  return std::nullopt;
}

// The strides of a dense tensor of `sizes` that is walked so.
std::vector<int64_t> dense_strides(const std::vector<int64_t>& sizes, Walk walk) {
  std::vector<int64_t> strides = contiguous_strides(sizes);
  if (walk == Walk::kTransposed) return {1, sizes[0]};
  if ((walk == Walk::kRows || walk == Walk::kFewClasses) && sizes.size() > 2) {
    strides[1] = 1;  // channels last: (N, S, C) in memory
    int64_t stride = sizes[1];
    for (size_t i = sizes.size() - 1; i >= 2; --i) {
      strides[i] = stride;
      stride *= sizes[i];
    }
    strides[0] = stride;
  }
  return strides;
}

struct Call {
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
double target_mass(const CrossEntropyArgs<scalar_t>& args) {
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
    TORCHEXT_CHECK_INDEX(wrong[block] < 0, "cross_entropy: expected target in [0, ",
                         args.shape.classes, ") or ignore_index (", args.ignore_index,
                         "), but got: Target ", args.target(wrong[block]),
                         " is out of bounds (at "
                         "position ",
                         wrong[block], " of the flattened target).");
    total += mass[block];
  }
  return total;
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
    args.label_smoothing = call.label_smoothing;
    double weights = static_cast<double>(shape.classes);
    if (call.weight) {
      const Tensor dense = as_contiguous(*call.weight);
      const scalar_t* values = static_cast<const scalar_t*>(dense.const_data_ptr());
      weight.assign(values, values + shape.classes);
      args.weight = weight.data();
      weights = 0;
      for (const acc_t value : weight) weights += value;
    }
    args.uniform_mass = weights * call.label_smoothing / static_cast<double>(shape.classes);
    mass = target_mass(args);
    args.gradient_scale = call.reduction == Reduction::kMean ? 1.0 / mass : 1.0;
    if (transposed()) std::swap(args.shape.outer, args.shape.inner);
    args.blocks_per_outer =
        (args.shape.inner + cpu::kPositionsPerBlock - 1) / cpu::kPositionsPerBlock;
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
    advise_huge_pages(args.gradient, gradient.numel() * static_cast<int64_t>(sizeof(scalar_t)));
    return gradient;
  }

  int64_t blocks() const {
    if (walk != Walk::kRows) return args.shape.outer * args.blocks_per_outer;
    return (args.shape.positions() + cpu::kRowsPerBlock - 1) / cpu::kRowsPerBlock;
  }

  void run() const {
    const int64_t positions = walk == Walk::kRows
                                  ? cpu::kRowsPerBlock
                                  : std::min(cpu::kPositionsPerBlock, args.shape.inner);
    const int64_t grain = kGrain / std::max<int64_t>(positions * args.shape.classes, 1);
    for_each_block(blocks(), grain, [&](int64_t begin, int64_t end) {
      if (walk == Walk::kRows) {
        cross_entropy_rows<scalar_t>(args, begin, end);
      } else {
        cross_entropy_tiles<scalar_t>(args, begin, end);
      }
    });
  }
};

// The loss in input's dtype: every position's, or their sum or mean.
template <typename scalar_t>
Tensor run_forward(const Call& call, Prepared<scalar_t>& prepared) {
  using acc_t = acc_type<scalar_t>;
  CrossEntropyArgs<scalar_t>& args = prepared.args;
  const int64_t positions = args.shape.positions();
  if (call.reduction == Reduction::kNone) {
    std::vector<int64_t> sizes = sizes_of(call.input);
    sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
    const Tensor loss = empty_like(call.input, sizes);
    scalar_t* values = static_cast<scalar_t*>(loss.mutable_data_ptr());
    std::vector<acc_t> wide;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      args.losses = values;
    } else {
      wide.resize(positions);
      args.losses = wide.data();
    }
    prepared.run();
    for (size_t i = 0; i < wide.size(); ++i) values[i] = static_cast<scalar_t>(wide[i]);
    return loss;
  }
  const Tensor loss = empty_like(call.input, {});
  std::vector<double> block_losses(prepared.blocks());
  args.block_losses = block_losses.data();
  prepared.run();
  double total = 0;
  for (const double value : block_losses) total += value;
  if (call.reduction == Reduction::kMean) total /= prepared.mass;
  *static_cast<scalar_t*>(loss.mutable_data_ptr()) = static_cast<scalar_t>(total);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool save_gradient) {
  const auto shape = check_cross_entropy(input, target, weight, reduction, label_smoothing);
  TORCHEXT_CHECK(!save_gradient || reduction != 0,
                 "cross_entropy: expected reduction mean or sum "
                 "with save_gradient, but got none");
  const Call call{input,        target,         weight, static_cast<Reduction>(reduction),
                  ignore_index, label_smoothing};
  Tensor loss, stats, gradient;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    Prepared<scalar_t> prepared(call, shape);
    const auto acc_dtype =
        std::is_same_v<acc_t, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    if (save_gradient) {
      stats = empty_like(input, {2, 0}, acc_dtype);
      gradient = prepared.new_gradient();
    } else {
      stats = empty_like(input, {2, shape.positions()}, acc_dtype);
      gradient = empty_like(input, {0});
      prepared.args.stats = static_cast<acc_t*>(stats.mutable_data_ptr());
    }
    loss = run_forward(call, prepared);
  });
  return {loss, stats, gradient};
}

Tensor cross_entropy_forward_inplace_cpu(Tensor input, const Tensor& target,
                                         const std::optional<Tensor>& weight, int64_t reduction,
                                         int64_t ignore_index, double label_smoothing) {
  const auto shape = check_cross_entropy(input, target, weight, reduction, label_smoothing);
  TORCHEXT_CHECK(reduction != 0,
                 "cross_entropy_forward_: expected reduction mean or sum, but got "
                 "none");
  const Call call{input,        target,         weight, static_cast<Reduction>(reduction),
                  ignore_index, label_smoothing};
  Tensor loss;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    Prepared<scalar_t> prepared(call, shape);
    TORCHEXT_CHECK(prepared.input.const_data_ptr() == input.const_data_ptr(),
                   "cross_entropy_forward_: expected input whose classes or positions are "
                   "contiguous, but got shape ",
                   shape_string(input), " with other strides");
    prepared.write_gradient_to(input);
    loss = run_forward(call, prepared);
  });
  return loss;
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& target, const std::optional<Tensor>& weight,
                                  const Tensor& stats, int64_t reduction, int64_t ignore_index,
                                  double label_smoothing) {
  const auto shape = check_cross_entropy(input, target, weight, reduction, label_smoothing);
  const int64_t wanted = reduction == 0 ? shape.positions() : 1;
  TORCHEXT_CHECK(grad_output.numel() == wanted && grad_output.scalar_type() == input.scalar_type(),
                 "cross_entropy_backward: expected grad_output of ", wanted, " elements of dtype ",
                 dtype_string(input), ", but got shape ", shape_string(grad_output), " and dtype ",
                 dtype_string(grad_output));
  TORCHEXT_CHECK(stats.numel() == 2 * shape.positions() && stats.is_contiguous(),
                 "cross_entropy_backward: expected stats of shape [2, ", shape.positions(),
                 "], but got ", shape_string(stats));
  const Call call{input,        target,         weight, static_cast<Reduction>(reduction),
                  ignore_index, label_smoothing};
  const Tensor grad = as_contiguous(grad_output);
  Tensor gradient;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    Prepared<scalar_t> prepared(call, shape);
    gradient = prepared.new_gradient();
    const auto* values = static_cast<const scalar_t*>(grad.const_data_ptr());
    if (reduction == 0) {
      prepared.args.grad_output = values;
    } else {
      prepared.args.gradient_scale *= static_cast<double>(*values);
    }
    prepared.args.stats =
        static_cast<acc_type<scalar_t>*>(const_cast<void*>(stats.const_data_ptr()));
    prepared.args.backward = true;
    prepared.run();
  });
  return gradient;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&torchext::cross_entropy_forward_cpu));
  m.impl("cross_entropy_forward_", TORCH_BOX(&torchext::cross_entropy_forward_inplace_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchext::cross_entropy_backward_cpu));
}
