// The rows of a loss with extras on CUDA: from tensors to one launch. Nothing here waits for the
// device.
#include "cuda/cross_entropy_extras.h"

#include "cuda/host.h"
#include "ops/cross_entropy_extras.h"

namespace torchext {
namespace {

template <typename T>
T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

int64_t stride_of(const std::optional<Tensor>& tensor) { return tensor ? tensor->stride(0) : 0; }

// A tensor of the sums' dtype, contiguous: the class weights are few.
Tensor widened(const Tensor& tensor, int32_t dtype) {
  if (dtype_code(tensor) == dtype) return as_contiguous(tensor);
  Tensor copy = empty_like(tensor, sizes_of(tensor), dtype);
  torch::stable::copy_(copy, tensor);
  return copy;
}

void cross_entropy_extras_rows_cuda(const Tensor& input, const Tensor& target,
                                    const std::optional<Tensor>& weight, int64_t ignore_index,
                                    double label_smoothing, double z_loss, double softcap,
                                    double logit_scale, const std::optional<Tensor>& grad_loss,
                                    const std::optional<Tensor>& grad_lse,
                                    const std::optional<Tensor>& gradient,
                                    const std::optional<Tensor>& loss, const Tensor& stats,
                                    const std::optional<Tensor>& argmax) {
  const char* op = "cross_entropy_extras_rows";
  cuda::check_memory(op, input, {{"input", &input}, {"target", &target}, {"stats", &stats}});
  for (const auto* tensor : {&weight, &grad_loss, &grad_lse, &gradient, &loss, &argmax}) {
    if (*tensor) cuda::check_memory(op, input, {{"what goes with it", &**tensor}});
  }
  check_extras_rows({input, target, weight, ignore_index, label_smoothing, z_loss, softcap,
                     logit_scale, stats, grad_loss, grad_lse, gradient, loss, argmax},
                    1);
  const auto guard = cuda::on_device_of(input);
  const cuda::Dtype dtype = cuda::dtype_of(input, op);
  const int64_t classes = input.size(1);
  cuda::ExtrasArgs args{};
  cuda::CrossEntropyArgs& rows = args.rows;
  rows.positions = input.size(0);
  rows.classes = rows.all_classes = classes;
  rows.inner = 1;
  rows.input = input.const_data_ptr();
  rows.input_strides.outer = input.stride(0);
  const bool indexed = is_class_index(target.scalar_type());
  const Tensor read = indexed || target.stride(1) != 1 ? as_contiguous(target) : target;
  if (indexed) {
    rows.indices = read.const_data_ptr();
    rows.index_bytes = static_cast<int>(read.element_size());
  } else {
    const bool narrow = read.scalar_type() == input.scalar_type();
    (narrow ? rows.probabilities : args.wide_probabilities) = read.const_data_ptr();
    rows.probability_strides.outer = read.stride(0);
  }
  rows.ignore_index = ignore_index;
  Tensor wide_weight;
  if (weight) {
    wide_weight = widened(*weight, cuda::acc_dtype(dtype));
    rows.weight = wide_weight.const_data_ptr();
  }
  const double smoothing = label_smoothing > 0 ? label_smoothing : 0.0;
  rows.kept = cuda::Number(1.0 - smoothing);
  rows.uniform = cuda::Number(smoothing / static_cast<double>(classes));
  rows.dense = !indexed || smoothing > 0;
  rows.gradient = data_of<void>(gradient);
  rows.gradient_strides.outer = stride_of(gradient);
  rows.losses = data_of<void>(loss);
  rows.stats = stats.mutable_data_ptr();
  rows.stats_stride = stats.stride(0);
  args.from_stats = !loss;
  args.grad_loss = data_of<void>(grad_loss);
  args.grad_loss_stride = stride_of(grad_loss);
  args.grad_lse = data_of<void>(grad_lse);
  args.grad_lse_stride = stride_of(grad_lse);
  args.argmax = data_of<int64_t>(argmax);
  args.z_loss = cuda::Number(z_loss);
  args.softcap = cuda::Number(softcap);
  args.logit_scale = cuda::Number(logit_scale);
  STD_CUDA_CHECK(launch_cross_entropy_extras(args, dtype, cuda::current_stream(input)));
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  m.impl("cross_entropy_extras_rows", TORCH_BOX(&torchext::cross_entropy_extras_rows_cuda));
}
