// linear_cross_entropy on CUDA: the operators. linear_cross_entropy_schedule.h has what is made
// when.
#include "cuda/linear_cross_entropy_schedule.h"

namespace torchext {
namespace cuda {
namespace {

using Problem = LinearCrossEntropyProblem;
using Gradients = LinearCrossEntropyGradients;

constexpr const char* kOp = "linear_cross_entropy";

// Of a matrix whose rows and columns both have gaps the library would make a copy at each product.
Tensor for_products(const Tensor& matrix) {
  return matrix.stride(0) == 1 || matrix.stride(1) == 1 ? matrix : as_contiguous(matrix);
}

Problem checked(const LinearCrossEntropyLimits& limits, const Tensor& input,
                const Tensor& linear_weight, const Tensor& target,
                const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
                int64_t reduction, double label_smoothing) {
  check_memory(kOp, input,
               {{"input", &input}, {"linear_weight", &linear_weight}, {"target", &target}});
  if (linear_bias) check_memory(kOp, input, {{"linear_bias", &*linear_bias}});
  if (weight) check_memory(kOp, input, {{"weight", &*weight}});
  const auto shape = check_linear_cross_entropy(input, linear_weight, target, linear_bias, weight,
                                                reduction, label_smoothing);
  TORCHEXT_CHECK(!weight || weight->scalar_type() == input.scalar_type(), kOp,
                 ": expected weight of input's dtype (", dtype_string(input), ") on CUDA, but got ",
                 dtype_string(*weight));
  return {
      for_products(input), for_products(linear_weight), target, linear_bias, weight, shape, limits};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_within(
    const LinearCrossEntropyLimits& limits, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, bool input_grad, bool linear_weight_grad, bool linear_bias_grad) {
  const Problem problem = checked(limits, input, linear_weight, target, linear_bias, weight,
                                  reduction, label_smoothing);
  const auto guard = on_device_of(input);
  const Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  TORCHEXT_CHECK(reduction != 0 || !gradients.any, kOp,
                 ": expected reduction mean or sum where gradients come with the loss, but got "
                 "none");
  LinearCrossEntropyCall call(problem, gradients, ignore_index, label_smoothing);
  CrossEntropyArgs& args = call.loss.args;
  const Tensor stats = call.loss.new_stats();
  args.stats = stats.mutable_data_ptr();
  if (static_cast<Reduction>(reduction) == Reduction::kMean && gradients.any) call.loss.average();
  const Tensor losses = empty_like(input, {problem.shape.rows}, call.loss.acc_dtype());
  args.losses = losses.mutable_data_ptr();
  args.wide = true;
  call.forward();
  const Tensor loss = reduction == 0 ? losses : call.loss.total(static_cast<Reduction>(reduction));
  return {loss, stats, gradients.input, gradients.linear_weight, gradients.linear_bias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_within(
    const LinearCrossEntropyLimits& limits, const Tensor& grad_output, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  const Problem problem = checked(limits, input, linear_weight, target, linear_bias, weight,
                                  reduction, label_smoothing);
  const auto guard = on_device_of(input);
  const int64_t rows = problem.shape.rows;
  check_memory("linear_cross_entropy_backward", input,
               {{"grad_output", &grad_output}, {"stats", &stats}});
  const int64_t wanted = reduction == 0 ? rows : 1;
  const ScalarType wide = accumulation_dtype(input.scalar_type());
  TORCHEXT_CHECK(grad_output.numel() == wanted && grad_output.scalar_type() == wide,
                 "linear_cross_entropy_backward: expected grad_output of ", wanted,
                 " elements of dtype ", torch::headeronly::toString(wide), ", but got shape ",
                 shape_string(grad_output), " and dtype ", dtype_string(grad_output));
  const Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  LinearCrossEntropyCall call(problem, gradients, ignore_index, label_smoothing);
  check_stats("linear_cross_entropy_backward", stats, rows, input);
  const Tensor grad = as_contiguous(grad_output);
  CrossEntropyArgs& args = call.loss.args;
  args.wide = true;
  args.grad_output = grad.const_data_ptr();
  args.grad_output_stride = reduction == 0 ? 1 : 0;
  args.stats = const_cast<void*>(stats.const_data_ptr());
  if (gradients.any && rows > 0) {
    if (static_cast<Reduction>(reduction) == Reduction::kMean) call.loss.average();
    call.backward();
  }
  return {gradients.input, gradients.linear_weight, gradients.linear_bias};
}

}  // namespace cuda

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_cuda(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool linear_weight_grad, bool linear_bias_grad) {
  return cuda::linear_cross_entropy_forward_within(
      {}, input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
      label_smoothing, input_grad, linear_weight_grad, linear_bias_grad);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cuda(
    const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  return cuda::linear_cross_entropy_backward_within(
      {}, grad_output, input, linear_weight, target, linear_bias, weight, stats, reduction,
      ignore_index, label_smoothing, input_grad, linear_weight_grad, linear_bias_grad);
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&torchext::linear_cross_entropy_forward_cuda));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&torchext::linear_cross_entropy_backward_cuda));
}
