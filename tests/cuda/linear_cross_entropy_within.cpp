// linear_cross_entropy with limits of the test's choice, so that small problems are cut as large
// ones are; and what torch's CUDA library has and its CPU library has not.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/checks.h"
#include "cuda/gpu.cuh"
#include "cuda/linear_cross_entropy_call.h"

namespace torchext {
namespace {

using Limits = std::vector<int64_t>;

cuda::LinearCrossEntropyLimits limits_of(const Limits& limits) {
  return {limits.at(0), limits.at(1), limits.at(2), limits.at(3), limits.at(4)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Limits limits, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool linear_weight_grad, bool linear_bias_grad) {
  return cuda::linear_cross_entropy_forward_within(
      limits_of(limits), input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
      label_smoothing, input_grad, linear_weight_grad, linear_bias_grad);
}

std::tuple<Tensor, Tensor, Tensor> backward(
    Limits limits, const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  return cuda::linear_cross_entropy_backward_within(
      limits_of(limits), grad_output, input, linear_weight, target, linear_bias, weight, stats,
      reduction, ignore_index, label_smoothing, input_grad, linear_weight_grad, linear_bias_grad);
}

// The classes at which pieces begin, and the end; then the element of the gradient at which each
// begins, -1 of one that lies outside.
std::vector<int64_t> pieces(int64_t rows, int64_t features, int64_t classes) {
  const cuda::PiecePlan plan = cuda::plan_pieces(rows, features, classes);
  std::vector<int64_t> result = plan.begin;
  for (size_t i = 0; i + 1 < plan.begin.size(); ++i) {
    const bool inside = plan.begin[i] < classes - plan.outside;
    result.push_back(inside ? cuda::piece_offset(plan, rows, features, i) : -1);
  }
  return result;
}

int64_t products() { return emulated::products; }

// Sums in float32, as on a GPU: the CPU's own product of bfloat16 ends in bfloat16.
Tensor mm_dtype_out(const Tensor& left, const Tensor& right, ScalarType dtype, Tensor out) {
  ++emulated::products;
  const Tensor wide_left = torch::stable::to(left, dtype);
  const Tensor wide_right = torch::stable::to(right, dtype);
  TORCHEXT_AOTI_CHECK(aoti_torch_cpu_mm_out(out.get(), wide_left.get(), wide_right.get()));
  return out;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY(torchext_emulated, m) {
  m.def(
      "linear_cross_entropy_forward(int[] limits, Tensor input, Tensor linear_weight, "
      "Tensor target, Tensor? linear_bias, Tensor? weight, int reduction, int ignore_index, "
      "float label_smoothing, bool input_grad, bool linear_weight_grad, bool linear_bias_grad) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_backward(int[] limits, Tensor grad_output, Tensor input, "
      "Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor stats, "
      "int reduction, int ignore_index, float label_smoothing, bool input_grad, "
      "bool linear_weight_grad, bool linear_bias_grad) -> (Tensor, Tensor, Tensor)");
  m.def("pieces(int rows, int features, int classes) -> int[]");
  m.def("products() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(torchext_emulated, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&torchext::forward));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&torchext::backward));
}

STABLE_TORCH_LIBRARY_IMPL(torchext_emulated, CompositeExplicitAutograd, m) {
  m.impl("pieces", TORCH_BOX(&torchext::pieces));
  m.impl("products", TORCH_BOX(&torchext::products));
}

STABLE_TORCH_LIBRARY_IMPL(aten, CPU, m) {
  m.impl("mm.dtype_out", TORCH_BOX(&torchext::mm_dtype_out));
}
