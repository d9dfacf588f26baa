// linear_relu on CUDA. The products are cuBLASLt's, forward with bias and ReLU in the product's own
// epilogue; what stands around them backward is one kernel of ours (linear_relu_mask.cu).
#include "cuda/linear_relu.h"

#include "cuda/gemm.h"
#include "cuda/host.h"
#include "ops/linear_relu.h"

namespace torchext {
namespace {

using cuda::Dtype;
using cuda::mm_out;
using cuda::transposed;
using cuda::Workspace;

// (*, features) as (rows, features), a view where it can be.
Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t features) {
  if (tensor.dim() == 2) return tensor;
  return as_strided(as_contiguous(tensor), {rows, features}, {features, 1});
}

// relu(added + left @ right), the sum and the ReLU in cuBLASLt's epilogue where it can.
Tensor product_relu(const Tensor& added, const Tensor& left, const Tensor& right) {
  AtenTensorHandle result = nullptr;
  TORCHEXT_AOTI_CHECK(aoti_torch_cuda__addmm_activation(added.get(), left.get(), right.get(), 1.0,
                                                        1.0, /*use_gelu=*/0, &result));
  return Tensor(result);
}

Tensor linear_relu_forward_cuda(const Tensor& input, const Tensor& weight,
                                const std::optional<Tensor>& bias) {
  cuda::check_memory("linear_relu", input, {{"input", &input}, {"weight", &weight}});
  if (bias) cuda::check_memory("linear_relu", input, {{"bias", &*bias}});
  const LinearShape shape = check_linear_relu(input, weight, bias);
  const auto guard = cuda::on_device_of(input);
  const Dtype dtype = cuda::dtype_of(input, "linear_relu");
  const cudaStream_t stream = cuda::current_stream(input);
  auto sizes = sizes_of(input);
  sizes.back() = shape.out_features;
  if (shape.rows == 0 || shape.out_features == 0 || shape.in_features == 0) {
    const Tensor output = empty_like(input, sizes);
    const Tensor dense = bias ? as_contiguous(*bias) : Tensor();
    STD_CUDA_CHECK(cuda::launch_relu_of_bias(bias ? dense.const_data_ptr() : nullptr, shape.rows,
                                             shape.out_features, output.mutable_data_ptr(), dtype,
                                             stream));
    return output;
  }
  Tensor added;
  if (bias) {
    added = as_contiguous(*bias);
  } else {
    // The epilogue has no ReLU without a bias; a vector of zeros is less than a pass of our own.
    added = empty_like(input, {shape.out_features});
    STD_CUDA_CHECK(cudaMemsetAsync(added.mutable_data_ptr(), 0,
                                   shape.out_features * cuda::item_bytes(dtype), stream));
  }
  const Tensor product =
      product_relu(added, as_matrix(input, shape.rows, shape.in_features), transposed(weight));
  return input.dim() == 2 ? product : as_strided(product, sizes, contiguous_strides(sizes));
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_cuda(const Tensor& grad_output,
                                                             const Tensor& output,
                                                             const Tensor& input,
                                                             const Tensor& weight, bool input_grad,
                                                             bool weight_grad, bool bias_grad) {
  cuda::check_memory(
      "linear_relu_backward", input,
      {{"grad_output", &grad_output}, {"output", &output}, {"input", &input}, {"weight", &weight}});
  const LinearShape shape =
      check_linear_relu_backward(grad_output, output, input, weight, weight_grad);
  const auto guard = cuda::on_device_of(input);
  // The input may be none of this call's (see the check): the weight's dtype is everyone's.
  const Dtype dtype = cuda::dtype_of(weight, "linear_relu");
  const cudaStream_t stream = cuda::current_stream(input);
  const int64_t rows = shape.rows;
  const int64_t columns = shape.out_features;
  const Tensor grad_input = empty_like(
      grad_output, input_grad ? input_sizes(grad_output, shape) : std::vector<int64_t>{0});
  const Tensor grad_weight =
      empty_like(weight, weight_grad ? sizes_of(weight) : std::vector<int64_t>{0});
  const Tensor grad_bias = empty_like(weight, {bias_grad ? columns : 0});
  const bool products = grad_input.numel() > 0 || grad_weight.numel() > 0;

  const Tensor grad = as_contiguous(grad_output);
  const Tensor result = as_contiguous(output);
  const int64_t blocks = bias_grad ? cuda::relu_mask_blocks(rows, columns) : 0;
  const Workspace partial(input, blocks * columns);
  const Tensor grad_linear =
      products ? empty_like(grad_output, {rows, columns}) : empty_like(grad_output, {0});
  cuda::ReluMaskArgs args{};
  args.grad_output = grad.const_data_ptr();
  args.output = result.const_data_ptr();
  args.grad_linear = products ? grad_linear.mutable_data_ptr() : nullptr;
  args.partial = partial.data();
  args.rows = rows;
  args.columns = columns;
  STD_CUDA_CHECK(cuda::launch_relu_mask(args, dtype, stream));
  if (bias_grad) {
    STD_CUDA_CHECK(cuda::launch_column_sums(args.partial, blocks, columns,
                                            grad_bias.mutable_data_ptr(), dtype, stream));
  }
  if (grad_input.numel() > 0) {
    const Tensor matrix = as_strided(grad_input, {rows, shape.in_features}, {shape.in_features, 1});
    mm_out(matrix, grad_linear, weight);
  }
  if (grad_weight.numel() > 0) {
    mm_out(grad_weight, transposed(grad_linear), as_matrix(input, rows, shape.in_features));
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CUDA, m) {
  m.impl("linear_relu_forward", TORCH_BOX(&torchext::linear_relu_forward_cuda));
  m.impl("linear_relu_backward", TORCH_BOX(&torchext::linear_relu_backward_cuda));
}
