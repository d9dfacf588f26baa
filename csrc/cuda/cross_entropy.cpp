// cross_entropy on CUDA: the operators. cross_entropy_call.h has what happens between tensors and
// kernels.
#include "cuda/cross_entropy_call.h"
#include "ops/cross_entropy.h"

namespace torchext {
namespace {

using cuda::CrossEntropyCall;

CrossEntropyShape checked(const Tensor& input, const Tensor& target,
                          const std::optional<Tensor>& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing) {
  cuda::check_memory("cross_entropy", input, {{"input", &input}, {"target", &target}});
  if (weight) cuda::check_memory("cross_entropy", input, {{"weight", &*weight}});
  return check_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cuda(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool save_gradient) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCHEXT_CHECK(!save_gradient || reduction != 0,
                 "cross_entropy: expected reduction mean or sum with save_gradient, but got none");
  const auto guard = cuda::on_device_of(input);
  auto call = CrossEntropyCall::of(input, target, weight, shape, ignore_index, label_smoothing);
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
  auto call = CrossEntropyCall::of(input, target, weight, shape, ignore_index, label_smoothing);
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
  auto call = CrossEntropyCall::of(input, target, weight, shape, ignore_index, label_smoothing);
  check_stats("cross_entropy_backward", stats, shape.positions(), input);
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
