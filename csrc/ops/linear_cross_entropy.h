// linear_cross_entropy: the cross-entropy of logits = input @ linear_weight.T + linear_bias that
// never exist as a whole. Checks shared by every device.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/stable.h"
#include "ops/cross_entropy.h"

namespace torchext {

struct LinearCrossEntropyShape {
  int64_t rows;        // N
  int64_t features;    // H
  int64_t classes;     // C
  bool probabilities;  // the target is (N, C), or (N, C, D)
  int64_t inner = 1;   // D, of a linear_weight (C, D, H)

  int64_t positions() const { return rows * inner; }
};

// `inner_dimension`: whether the caller serves a linear_weight of shape (C, D, H) as well.
inline LinearCrossEntropyShape check_linear_cross_entropy(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, double label_smoothing, bool inner_dimension = false) {
  constexpr const char* kOp = "linear_cross_entropy";
  TORCHEXT_CHECK(input.dim() == 2, kOp, ": expected input of shape (N, in_features), but got ",
                 shape_string(input));
  const int64_t dims = linear_weight.dim();
  TORCHEXT_CHECK(dims == 2 || (inner_dimension && dims == 3), kOp,
                 ": expected linear_weight of shape (C, in_features), but got ",
                 shape_string(linear_weight));
  TORCHEXT_CHECK(input.size(1) == linear_weight.size(dims - 1), kOp,
                 ": expected equal last dimensions (in_features) of input and linear_weight, but "
                 "got ",
                 input.size(1), " and ", linear_weight.size(dims - 1));
  TORCHEXT_CHECK(is_floating(input.scalar_type()), kOp,
                 ": expected input of dtype float32, float64, bfloat16 or float16, but got ",
                 dtype_string(input));
  TORCHEXT_CHECK(linear_weight.scalar_type() == input.scalar_type(), kOp,
                 ": expected linear_weight of input's dtype (", dtype_string(input), "), but got ",
                 dtype_string(linear_weight));
  TORCHEXT_CHECK_VALUE(reduction >= 0 && reduction <= 2, kOp,
                       ": expected reduction 0 (none), 1 (mean) or 2 (sum), but got ", reduction);
  TORCHEXT_CHECK(!(label_smoothing > 1.0), kOp,
                 ": expected label_smoothing between 0.0 and 1.0, but got ", label_smoothing);
  const LinearCrossEntropyShape shape{input.size(0), input.size(1), linear_weight.size(0),
                                      !is_class_index(target.scalar_type()),
                                      dims == 3 ? linear_weight.size(1) : 1};
  const auto sized = [&](const Tensor& tensor, std::vector<int64_t> sizes) {
    if (dims == 3) sizes.push_back(shape.inner);
    return sizes_of(tensor) == sizes;
  };
  const std::string rest = dims == 3 ? ", " + std::to_string(shape.inner) : "";
  if (shape.probabilities) {
    TORCHEXT_CHECK(target.scalar_type() == input.scalar_type(), kOp,
                   ": expected target of class indices (int64, int32, uint8) or of probabilities "
                   "of input's dtype (",
                   dtype_string(input), "), but got ", dtype_string(target));
    TORCHEXT_CHECK(sized(target, {shape.rows, shape.classes}), kOp,
                   ": expected target of class probabilities of shape [", shape.rows, ", ",
                   shape.classes, rest, "], but got ", shape_string(target));
  } else {
    TORCHEXT_CHECK(target.dim() == dims - 1, kOp, ": expected target of class indices of shape [",
                   shape.rows, rest, "], but got ", shape_string(target));
    TORCHEXT_CHECK_VALUE(target.size(0) == shape.rows, kOp,
                         ": expected target's batch size to be input's (", shape.rows,
                         "), but got ", target.size(0));
    TORCHEXT_CHECK(sized(target, {shape.rows}), kOp,
                   ": expected target of class indices of shape [", shape.rows, rest, "], but got ",
                   shape_string(target));
  }
  if (linear_bias) {
    TORCHEXT_CHECK(sized(*linear_bias, {shape.classes}), kOp, ": expected linear_bias of shape [",
                   shape.classes, rest, "], but got ", shape_string(*linear_bias));
    TORCHEXT_CHECK(linear_bias->scalar_type() == input.scalar_type(), kOp,
                   ": expected linear_bias of input's dtype (", dtype_string(input), "), but got ",
                   dtype_string(*linear_bias));
  }
  if (weight) {
    const ScalarType wide = accumulation_dtype(input.scalar_type());
    TORCHEXT_CHECK(weight->dim() == 1 && weight->size(0) == shape.classes, kOp,
                   ": expected weight of shape [", shape.classes, "], but got ",
                   shape_string(*weight));
    // As wide as the sums under autocast, which casts the features alone.
    TORCHEXT_CHECK(weight->scalar_type() == input.scalar_type() || weight->scalar_type() == wide,
                   kOp, ": expected weight of input's dtype (", dtype_string(input), ") or ",
                   torch::headeronly::toString(wide), ", but got ", dtype_string(*weight));
  }
  return shape;
}

}  // namespace torchext
