// cross_entropy on CUDA: from tensors to kernels, and back. Nothing here waits for the device: what
// only the device knows (the weight of the targets, the loss) stays there, and CUDA graphs can
// capture every call.
#include "cuda/cross_entropy.h"

#include "cuda/host.h"
#include "ops/cross_entropy.h"
#include "ops/cross_entropy_walk.h"

namespace torchext {
namespace {

using cuda::CrossEntropyArgs;
using cuda::Dtype;
using cuda::Mean;
using cuda::Number;
using cuda::RowPlan;
using cuda::RowRoute;
using cuda::Workspace;

constexpr int64_t kMeanDoubles = sizeof(Mean) / sizeof(double);
static_assert(sizeof(Mean) % sizeof(double) == 0);

CrossEntropyShape checked(const Tensor& input, const Tensor& target,
                          const std::optional<Tensor>& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing) {
  cuda::check_memory("cross_entropy", input, {{"input", &input}, {"target", &target}});
  if (weight) cuda::check_memory("cross_entropy", input, {{"weight", &*weight}});
  return check_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing);
}

// One call: layouts and pointers. Keeps what the pointers point to until the kernels are launched.
class Call {
 public:
  CrossEntropyArgs args{};

  Call(const Tensor& given_input, const Tensor& given_target,
       const std::optional<Tensor>& given_weight, const CrossEntropyShape& shape,
       int64_t ignore_index, double label_smoothing)
      : dtype_(cuda::dtype_of(given_input, "cross_entropy")),
        stream_(cuda::current_stream(given_input)),
        input_(given_input) {
    auto found = walk_of(class_strides(input_), shape, 0);
    if (!found) {
      input_ = as_contiguous(input_);
      found = walk_of(class_strides(input_), shape, 0);
    }
    walk_ = *found;
    args.positions = shape.positions();
    args.classes = shape.classes;
    // (C, N) in memory: the N positions take the part of S.
    args.inner = walk_ == Walk::kTransposed ? shape.outer : shape.inner;
    args.input = input_.const_data_ptr();
    args.input_strides = strides_of(input_);
    if (shape.probabilities) {
      target_ = given_target;
      if (walk_of(class_strides(target_), shape, 0) != walk_) {
        const auto sizes = sizes_of(given_target);
        target_ = empty_strided_like(given_target, sizes, dense_strides(sizes, walk_),
                                     dtype_code(given_target));
        torch::stable::copy_(target_, given_target);
      }
      args.probabilities = target_.const_data_ptr();
      args.probability_strides = strides_of(target_);
    } else {
      target_ = as_contiguous(given_target);
      args.indices = target_.const_data_ptr();
      args.index_bytes = static_cast<int>(target_.element_size());
    }
    args.ignore_index = ignore_index;
    const double smoothing = label_smoothing > 0 ? label_smoothing : 0.0;
    args.kept = Number(1.0 - smoothing);
    args.uniform = Number(smoothing / static_cast<double>(shape.classes));
    args.uniform_mass = Number(smoothing);
    args.dense = shape.probabilities || smoothing > 0;
    if (given_weight) {
      weight_ = as_contiguous(*given_weight);
      args.weight = weight_.const_data_ptr();
    }
    args.gradient_scale = Number(1.0);
  }

  Dtype dtype() const { return dtype_; }
  const Tensor& input() const { return input_; }

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
    const Workspace partial(input_, 2 * cuda::partial_sums(args.positions));
    mean_ = empty_like(input_, {kMeanDoubles}, aoti_torch_dtype_float64());
    Mean* mean = static_cast<Mean*>(mean_.mutable_data_ptr());
    STD_CUDA_CHECK(cuda::launch_target_mass(args, dtype_, partial.data(), mean, stream_));
    args.mean = mean;
  }

  // Losses, and what is wanted beside them: stats, gradients.
  void forward() {
    if (args.positions == 0) return;
    if (walk_ != Walk::kRows) {
      STD_CUDA_CHECK(cuda::launch_cross_entropy_columns(args, dtype_, false, stream_));
      return;
    }
    const RowPlan plan = cuda::plan_rows(args, dtype_, cuda::largest_cluster(device()));
    if (plan.route != RowRoute::kTwoPass) {
      STD_CUDA_CHECK(cuda::launch_cross_entropy_rows(args, dtype_, plan, stream_));
      return;
    }
    Tensor stats;
    if (args.gradient && args.stats == nullptr) {
      stats = new_stats();
      args.stats = stats.mutable_data_ptr();
    }
    STD_CUDA_CHECK(cuda::launch_cross_entropy_stream(args, dtype_, plan.wide, stream_));
    if (args.gradient) backward();
  }

  // Gradients, from stats.
  void backward() {
    if (args.positions == 0 || args.classes == 0) return;
    Tensor mass;
    if (args.dense && (args.probabilities || args.weight)) {
      mass = empty_like(input_, {args.probabilities ? args.positions : 1}, acc_dtype());
      args.row_mass = mass.const_data_ptr();
      args.row_mass_stride = args.probabilities ? 1 : 0;
      const auto launch_mass =
          args.probabilities ? cuda::launch_dense_mass : cuda::launch_uniform_mass;
      STD_CUDA_CHECK(launch_mass(args, dtype_, mass.mutable_data_ptr(), stream_));
    }
    if (walk_ != Walk::kRows) {
      STD_CUDA_CHECK(cuda::launch_cross_entropy_columns(args, dtype_, true, stream_));
      return;
    }
    const bool wide = cuda::plan_rows(args, dtype_, 1).wide;
    STD_CUDA_CHECK(cuda::launch_cross_entropy_gradient(args, dtype_, wide, stream_));
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
    const bool mean = reduction == Reduction::kMean;
    const Tensor losses = empty_like(input_, {args.positions}, acc_dtype());
    const Tensor total = empty_like(input_, {});
    const Workspace partial(input_, 2 * cuda::partial_sums(args.positions));
    const double mass = args.indices ? -1.0 : static_cast<double>(args.positions);
    args.losses = losses.mutable_data_ptr();
    forward();
    STD_CUDA_CHECK(cuda::launch_loss_total(args, dtype_, mean, mass, partial.data(),
                                           total.mutable_data_ptr(), stream_));
    return total;
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
  Walk walk_ = Walk::kRows;
};

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cuda(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool save_gradient) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCHEXT_CHECK(!save_gradient || reduction != 0,
                 "cross_entropy: expected reduction mean or sum with save_gradient, but got none");
  const auto guard = cuda::on_device_of(input);
  Call call(input, target, weight, shape, ignore_index, label_smoothing);
  Tensor stats, gradient;
  if (save_gradient) {
    stats = empty_like(input, {2, 0}, call.acc_dtype());
    gradient = call.new_gradient();
    if (static_cast<Reduction>(reduction) == Reduction::kMean) call.average();
  } else {
    stats = call.new_stats();
    gradient = empty_like(input, {0});
    call.args.stats = stats.mutable_data_ptr();
  }
  const Tensor loss = call.loss(static_cast<Reduction>(reduction));
  return {loss, stats, gradient};
}

Tensor cross_entropy_forward_inplace_cuda(Tensor input, const Tensor& target,
                                          const std::optional<Tensor>& weight, int64_t reduction,
                                          int64_t ignore_index, double label_smoothing) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCHEXT_CHECK(reduction != 0,
                 "cross_entropy_forward_: expected reduction mean or sum, but got none");
  const auto guard = cuda::on_device_of(input);
  Call call(input, target, weight, shape, ignore_index, label_smoothing);
  TORCHEXT_CHECK(call.args.input == input.const_data_ptr(),
                 "cross_entropy_forward_: expected input whose classes or positions are "
                 "contiguous, but got shape ",
                 shape_string(input), " with other strides");
  call.write_gradient_to(input);
  if (static_cast<Reduction>(reduction) == Reduction::kMean) call.average();
  return call.loss(static_cast<Reduction>(reduction));
}

Tensor cross_entropy_backward_cuda(const Tensor& grad_output, const Tensor& input,
                                   const Tensor& target, const std::optional<Tensor>& weight,
                                   const Tensor& stats, int64_t reduction, int64_t ignore_index,
                                   double label_smoothing) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  cuda::check_memory("cross_entropy_backward", input,
                     {{"grad_output", &grad_output}, {"stats", &stats}});
  const int64_t wanted = reduction == 0 ? shape.positions() : 1;
  TORCHEXT_CHECK(grad_output.numel() == wanted && grad_output.scalar_type() == input.scalar_type(),
                 "cross_entropy_backward: expected grad_output of ", wanted, " elements of dtype ",
                 dtype_string(input), ", but got shape ", shape_string(grad_output), " and dtype ",
                 dtype_string(grad_output));
  const auto guard = cuda::on_device_of(input);
  Call call(input, target, weight, shape, ignore_index, label_smoothing);
  TORCHEXT_CHECK(stats.numel() == 2 * shape.positions() && stats.is_contiguous() &&
                     dtype_code(stats) == call.acc_dtype(),
                 "cross_entropy_backward: expected stats of shape [2, ", shape.positions(),
                 "], but got ", shape_string(stats), " and dtype ", dtype_string(stats));
  const Tensor grad = as_contiguous(grad_output);
  const Tensor gradient = call.new_gradient();
  call.args.grad_output = grad.const_data_ptr();
  call.args.grad_output_stride = reduction == 0 ? 1 : 0;
  call.args.stats = const_cast<void*>(stats.const_data_ptr());
  if (static_cast<Reduction>(reduction) == Reduction::kMean) call.average();
  call.backward();
  return gradient;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&torchext::cross_entropy_forward_cuda));
  m.impl("cross_entropy_forward_", TORCH_BOX(&torchext::cross_entropy_forward_inplace_cuda));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchext::cross_entropy_backward_cuda));
}
