// linear_relu: output = relu(input @ weight.T + bias). Checks shared by every device.
#pragma once

#include <optional>
#include <vector>

#include "common/checks.h"
#include "common/stable.h"

namespace torchext {

// The call as one matrix product: (rows, in) x (in, out).
struct LinearShape {
  int64_t rows;
  int64_t in_features;
  int64_t out_features;
};

inline LinearShape check_linear_relu(const Tensor& input, const Tensor& weight,
                                     const std::optional<Tensor>& bias) {
  TORCHEXT_CHECK(weight.dim() == 2,
                 "linear_relu: expected weight of shape (out_features, "
                 "in_features), but got shape ",
                 shape_string(weight));
  TORCHEXT_CHECK(input.dim() >= 1,
                 "linear_relu: expected input of at least one dimension "
                 "(*, in_features), but got a tensor of no dimensions");
  const int64_t in_features = weight.size(1);
  const int64_t out_features = weight.size(0);
  TORCHEXT_CHECK(input.size(input.dim() - 1) == in_features,
                 "linear_relu: expected the last dimension of input to be in_features of weight (",
                 in_features, "), but got input of shape ", shape_string(input),
                 " and weight of shape ", shape_string(weight));
  TORCHEXT_CHECK(is_floating(input.scalar_type()),
                 "linear_relu: expected input of dtype float32, "
                 "float64, bfloat16 or float16, but got ",
                 dtype_string(input));
  TORCHEXT_CHECK(weight.scalar_type() == input.scalar_type(),
                 "linear_relu: expected weight of input's dtype (", dtype_string(input),
                 "), but got ", dtype_string(weight));
  if (bias) {
    TORCHEXT_CHECK(bias->dim() == 1 && bias->size(0) == out_features,
                   "linear_relu: expected bias of shape [", out_features, "], but got shape ",
                   shape_string(*bias));
    TORCHEXT_CHECK(bias->scalar_type() == input.scalar_type(),
                   "linear_relu: expected bias of input's dtype (", dtype_string(input),
                   "), but got ", dtype_string(*bias));
  }
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < input.dim(); ++i) rows *= input.size(i);
  return {rows, in_features, out_features};
}

// An input is read for the weight's gradient alone: without it the weight may stand in its place.
inline LinearShape check_linear_relu_backward(const Tensor& grad_output, const Tensor& output,
                                              const Tensor& input, const Tensor& weight,
                                              bool weight_grad) {
  LinearShape shape = check_linear_relu(weight_grad ? input : weight, weight, std::nullopt);
  const int64_t dimensions = weight_grad ? input.dim() : grad_output.dim();
  if (!weight_grad) {
    shape.rows = 1;
    for (int64_t i = 0; i + 1 < dimensions; ++i) shape.rows *= grad_output.size(i);
  }
  for (const Tensor* tensor : {&grad_output, &output}) {
    const char* name = tensor == &output ? "output" : "grad_output";
    TORCHEXT_CHECK(dimensions >= 1 && tensor->dim() == dimensions &&
                       tensor->numel() == shape.rows * shape.out_features &&
                       tensor->size(dimensions - 1) == shape.out_features,
                   "linear_relu_backward: expected ", name, " of ", shape.rows, " x ",
                   shape.out_features, " elements, but got shape ", shape_string(*tensor));
    TORCHEXT_CHECK(tensor->scalar_type() == weight.scalar_type(), "linear_relu_backward: expected ",
                   name, " of input's dtype (", dtype_string(weight), "), but got ",
                   dtype_string(*tensor));
  }
  return shape;
}

// The sizes of the input whose gradient is made.
inline std::vector<int64_t> input_sizes(const Tensor& grad_output, const LinearShape& shape) {
  std::vector<int64_t> sizes = sizes_of(grad_output);
  sizes.back() = shape.in_features;
  return sizes;
}

}  // namespace torchext
