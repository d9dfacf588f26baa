// cross_entropy: schema arguments, their checks, and the one view of the logits that every device's
// kernels work on.
#pragma once

#include <optional>

#include "common/checks.h"
#include "common/stable.h"
#include "common/strides.h"

namespace torchext {

// As in at::Reduction. An int in the schemas: the stable ABI leaks string arguments.
enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };

struct CrossEntropyShape {
  int64_t outer;    // N
  int64_t classes;  // C
  int64_t inner;    // S: the product of d1, d2, ...
  bool probabilities;

  int64_t positions() const { return outer * inner; }
};

// The dtype of sums, of a loss before it is rounded, and of what goes back into it.
inline ScalarType accumulation_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline bool is_class_index(ScalarType dtype) {
  return dtype == ScalarType::Long || dtype == ScalarType::Int || dtype == ScalarType::Byte;
}

inline CrossEntropyShape check_cross_entropy(const Tensor& input, const Tensor& target,
                                             const std::optional<Tensor>& weight, int64_t reduction,
                                             int64_t ignore_index, double label_smoothing) {
  TORCHEXT_CHECK(input.dim() >= 1,
                 "cross_entropy: expected input of shape (C), (N, C) or "
                 "(N, C, d1, ...), but got a tensor of no dimensions");
  TORCHEXT_CHECK(is_floating(input.scalar_type()),
                 "cross_entropy: expected input of dtype "
                 "float32, float64, bfloat16 or float16, but got ",
                 dtype_string(input));
  TORCHEXT_CHECK_VALUE(reduction >= 0 && reduction <= 2,
                       "cross_entropy: expected reduction 0 (none), 1 (mean) or 2 (sum), but got ",
                       reduction);
  // Below 0 and NaN count as 0, as in torch.
  TORCHEXT_CHECK(!(label_smoothing > 1.0),
                 "cross_entropy: expected "
                 "label_smoothing between 0.0 and 1.0, but got ",
                 label_smoothing);
  const int64_t class_dim = input.dim() == 1 ? 0 : 1;
  CrossEntropyShape shape{1, input.size(class_dim), 1, false};
  if (class_dim == 1) shape.outer = input.size(0);
  for (int64_t i = 2; i < input.dim(); ++i) shape.inner *= input.size(i);

  if (is_class_index(target.scalar_type())) {
    // (C) goes with (), and as in torch with (1), which for one class has the shape of
    // probabilities.
    const bool unbatched = input.dim() == 1 && target.numel() == 1 &&
                           (target.dim() == 0 || (target.dim() == 1 && shape.classes != 1));
    TORCHEXT_CHECK(unbatched || (input.dim() > 1 && target.dim() == input.dim() - 1),
                   "cross_entropy: expected target of class indices with one dimension less than "
                   "input, or of input's shape with class probabilities of a floating point dtype, "
                   "but got input of shape ",
                   shape_string(input), " and target of shape ", shape_string(target),
                   " and dtype ", dtype_string(target));
    TORCHEXT_CHECK_VALUE(unbatched || target.size(0) == shape.outer,
                         "cross_entropy: expected target's batch size to be input's (", shape.outer,
                         "), but got ", unbatched ? 0 : target.size(0));
    for (int64_t i = 1; !unbatched && i < target.dim(); ++i) {
      TORCHEXT_CHECK(target.size(i) == input.size(i + 1),
                     "cross_entropy: expected target of "
                     "input's shape without its class dimension 1, but got input of shape ",
                     shape_string(input), " and target of shape ", shape_string(target));
    }
  } else {
    shape.probabilities = true;
    TORCHEXT_CHECK(ignore_index < 0,
                   "cross_entropy: expected no ignore_index with a target of class probabilities, "
                   "but got ",
                   ignore_index);
    TORCHEXT_CHECK(is_floating(target.scalar_type()),
                   "cross_entropy: expected target of class "
                   "indices (int64, int32, uint8) or of probabilities in a floating point dtype, "
                   "but got ",
                   dtype_string(target));
    bool same = target.dim() == input.dim();
    for (int64_t i = 0; same && i < input.dim(); ++i) same = target.size(i) == input.size(i);
    TORCHEXT_CHECK(same, "cross_entropy: expected target of class probabilities of input's shape ",
                   shape_string(input), ", or of class indices (int64, int32, uint8), but got ",
                   "shape ", shape_string(target), " and dtype ", dtype_string(target));
    TORCHEXT_CHECK(target.scalar_type() == input.scalar_type(),
                   "cross_entropy: expected probabilities of input's dtype (", dtype_string(input),
                   "), but got ", dtype_string(target));
  }
  if (weight) {
    TORCHEXT_CHECK(weight->dim() == 1 && weight->size(0) == shape.classes,
                   "cross_entropy: expected weight of shape [", shape.classes,
                   "], one for each class, but got shape ", shape_string(*weight));
    TORCHEXT_CHECK(weight->scalar_type() == input.scalar_type(),
                   "cross_entropy: expected weight "
                   "of input's dtype (",
                   dtype_string(input), "), but got ", dtype_string(*weight));
  }
  return shape;
}

// What a backward is given of its forward: contiguous numbers of the dtype of sums.
inline void check_stats(const char* op, const Tensor& stats, int64_t positions,
                        const Tensor& input) {
  const ScalarType sums = accumulation_dtype(input.scalar_type());
  TORCHEXT_CHECK(
      stats.numel() == 2 * positions && stats.is_contiguous() && stats.scalar_type() == sums, op,
      ": expected stats of shape [2, ", positions, "] and dtype ",
      torch::headeronly::toString(sums), ", but got shape ", shape_string(stats), " and dtype ",
      dtype_string(stats));
}

// Strides over (N, C, S) of a tensor of input's sizes; nullopt where d1, d2, ... have no common
// one.
inline std::optional<Strides> class_strides(const Tensor& tensor) {
  const int64_t dims = tensor.dim();
  Strides strides{0, tensor.stride(dims == 1 ? 0 : 1), 1};
  if (dims > 1) strides.outer = tensor.stride(0);
  int64_t expected = 0;  // 0: no dimension of more than one element seen yet
  for (int64_t i = dims - 1; i >= 2; --i) {
    if (tensor.size(i) == 1) continue;
    if (expected == 0) {
      strides.inner = tensor.stride(i);
    } else if (tensor.stride(i) != expected) {
      return std::nullopt;
    }
    expected = tensor.stride(i) * tensor.size(i);
  }
  return strides;
}

}  // namespace torchext
