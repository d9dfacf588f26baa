// One call of cross_entropy on CUDA: from tensors to kernels. Nothing here waits for the device:
// what only the device knows (the weight of the targets, the loss) stays there, and CUDA graphs can
// capture every call.
#pragma once

#include <optional>

#include "cuda/cross_entropy.h"
#include "cuda/host.h"
#include "ops/cross_entropy.h"
#include "ops/cross_entropy_walk.h"

namespace torchext::cuda {

// Layouts and pointers. Keeps what the pointers point to until the kernels are launched.
class CrossEntropyCall {
 public:
  CrossEntropyArgs args{};

  // Of logits that are there. What no kernel can walk is copied.
  static CrossEntropyCall of(const Tensor& input, const Tensor& target,
                             const std::optional<Tensor>& weight, const CrossEntropyShape& shape,
                             int64_t ignore_index, double label_smoothing) {
    Tensor walked = input;
    auto walk = walk_of(class_strides(walked), shape, 0);
    if (!walk) {
      walked = as_contiguous(walked);
      walk = walk_of(class_strides(walked), shape, 0);
    }
    CrossEntropyCall call(walked, *walk, target, weight, shape, ignore_index, label_smoothing);
    call.args.input = walked.const_data_ptr();
    call.args.input_strides = call.strides_of(walked);
    return call;
  }

  // Of logits that will be: `like` has their dtype and device, `walk` is how they will lie.
  CrossEntropyCall(const Tensor& like, Walk walk, const Tensor& target,
                   const std::optional<Tensor>& weight, const CrossEntropyShape& shape,
                   int64_t ignore_index, double label_smoothing)
      : dtype_(dtype_of(like, "cross_entropy")),
        stream_(current_stream(like)),
        input_(like),
        walk_(walk) {
    args.positions = args.stats_stride = shape.positions();
    args.classes = args.all_classes = shape.classes;
    // (C, N) in memory: the N positions take the part of S.
    args.inner = walk_ == Walk::kTransposed ? shape.outer : shape.inner;
    if (shape.probabilities) {
      target_ = target;
      if (walk_of(class_strides(target_), shape, 0) != walk_) {
        const auto sizes = sizes_of(target);
        target_ =
            empty_strided_like(target, sizes, dense_strides(sizes, walk_), dtype_code(target));
        torch::stable::copy_(target_, target);
      }
      args.probabilities = target_.const_data_ptr();
      args.probability_strides = strides_of(target_);
    } else {
      target_ = as_contiguous(target);
      args.indices = target_.const_data_ptr();
      args.index_bytes = static_cast<int>(target_.element_size());
    }
    args.ignore_index = ignore_index;
    const double smoothing = label_smoothing > 0 ? label_smoothing : 0.0;
    args.kept = Number(1.0 - smoothing);
    args.uniform = Number(smoothing / static_cast<double>(shape.classes));
    args.uniform_mass = Number(smoothing);
    args.dense = shape.probabilities || smoothing > 0;
    if (weight) {
      weight_ = as_contiguous(*weight);
      args.weight = weight_.const_data_ptr();
    }
    args.gradient_scale = Number(1.0);
  }

  Dtype dtype() const { return dtype_; }
  cudaStream_t stream() const { return stream_; }

  void write_gradient_to(const Tensor& gradient) {
    args.gradient = gradient.mutable_data_ptr();
    args.gradient_strides = strides_of(gradient);
  }

  // A new gradient, laid out like the logits as far as they are dense.
  Tensor new_gradient() {
    const auto sizes = sizes_of(input_);
    const Tensor gradient =
        empty_strided_like(input_, sizes, dense_strides(sizes, walk_), dtype_code(input_));
    write_gradient_to(gradient);
    return gradient;
  }

  // Lets gradients be those of a mean: divided by the weight of the targets.
  void average() {
    if (args.indices == nullptr) {
      args.gradient_scale = Number(1.0 / static_cast<double>(args.positions));
      return;
    }
    constexpr int64_t kMeanDoubles = sizeof(Mean) / sizeof(double);
    static_assert(sizeof(Mean) % sizeof(double) == 0);
    const Workspace partial(input_, 2 * partial_sums(args.positions));
    mean_ = empty_like(input_, {kMeanDoubles}, aoti_torch_dtype_float64());
    Mean* mean = static_cast<Mean*>(mean_.mutable_data_ptr());
    STD_CUDA_CHECK(launch_target_mass(args, dtype_, partial.data(), mean, stream_));
    args.mean = mean;
  }

  // How rows of contiguous classes are computed.
  RowPlan plan() const { return plan_rows(args, dtype_, largest_cluster(device())); }

  // Losses, and what is wanted beside them: stats, gradients.
  void forward() {
    if (args.positions == 0) return;
    if (walk_ != Walk::kRows) {
      STD_CUDA_CHECK(launch_cross_entropy_columns(args, dtype_, false, stream_));
      return;
    }
    const RowPlan rows = plan();
    if (rows.route != RowRoute::kTwoPass) {
      STD_CUDA_CHECK(launch_cross_entropy_rows(args, dtype_, rows, stream_));
      return;
    }
    Tensor stats;
    if (args.gradient && args.stats == nullptr) {
      stats = new_stats();
      args.stats = stats.mutable_data_ptr();
    }
    STD_CUDA_CHECK(launch_cross_entropy_stream(args, dtype_, rows.wide, stream_));
    if (args.gradient) backward();
  }

  // Gradients, from stats.
  void backward() {
    if (args.positions == 0 || args.classes == 0) return;
    Tensor mass;
    if (args.row_mass == nullptr) mass = sum_dense_target();
    if (walk_ != Walk::kRows) {
      STD_CUDA_CHECK(launch_cross_entropy_columns(args, dtype_, true, stream_));
    } else {
      const bool wide = plan_rows(args, dtype_, 1).wide;
      STD_CUDA_CHECK(launch_cross_entropy_gradient(args, dtype_, wide, stream_));
    }
    if (mass.defined()) args.row_mass = nullptr;
  }

  // sum q of all classes, which gradients from stats begin with, where it is no plain number.
  // Undefined where it is.
  Tensor sum_dense_target() {
    if (!args.dense || !(args.probabilities || args.weight)) return Tensor();
    const Tensor mass = empty_like(input_, {args.probabilities ? args.positions : 1}, acc_dtype());
    args.row_mass = mass.const_data_ptr();
    args.row_mass_stride = args.probabilities ? 1 : 0;
    const auto launch_mass = args.probabilities ? launch_dense_mass : launch_uniform_mass;
    STD_CUDA_CHECK(launch_mass(args, dtype_, mass.mutable_data_ptr(), stream_));
    return mass;
  }

  // The sum, or the mean, of all losses (args.losses).
  Tensor total(Reduction reduction) const {
    const bool mean = reduction == Reduction::kMean;
    const Tensor result = empty_like(input_, {}, args.wide ? acc_dtype() : dtype_code(input_));
    const Workspace partial(input_, 2 * partial_sums(args.positions));
    const double mass = args.indices ? -1.0 : static_cast<double>(args.positions);
    STD_CUDA_CHECK(launch_loss_total(args, dtype_, mean, mass, partial.data(),
                                     result.mutable_data_ptr(), stream_));
    return result;
  }

  // The loss in input's dtype: every position's, or their sum or mean.
  Tensor loss(Reduction reduction) {
    if (reduction == Reduction::kNone) {
      std::vector<int64_t> sizes = sizes_of(input_);
      sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
      const Tensor values = empty_like(input_, sizes);
      args.loss_values = values.mutable_data_ptr();
      forward();
      return values;
    }
    const Tensor losses = empty_like(input_, {args.positions}, acc_dtype());
    args.losses = losses.mutable_data_ptr();
    forward();
    return total(reduction);
  }

  Tensor new_stats() const { return empty_like(input_, {2, args.positions}, acc_dtype()); }
  int32_t acc_dtype() const { return cuda::acc_dtype(dtype_); }

 private:
  int device() const { return input_.get_device_index(); }

  // What the kernels step by; `inner` and `outer` change places in a transposed matrix.
  Strides strides_of(const Tensor& tensor) const {
    Strides strides = *class_strides(tensor);
    if (walk_ == Walk::kTransposed) strides = {0, strides.channel, strides.outer};
    if (args.classes == 1) strides.channel = 1;
    return strides;
  }

  Dtype dtype_;
  cudaStream_t stream_;
  Tensor input_, target_, weight_, mean_;
  Walk walk_;
};

}  // namespace torchext::cuda
