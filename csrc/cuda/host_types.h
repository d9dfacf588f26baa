// Dtypes and workspace of a call, for host code.
#pragma once

#include "common/checks.h"
#include "common/stable.h"
#include "cuda/launch.h"

namespace torchext::cuda {

inline Dtype dtype_of(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kHalf;
    default:
      TORCHEXT_CHECK(false, op, ": expected dtype float32, float64, bfloat16 or float16, but got ",
                     dtype_string(tensor));
  }
  return Dtype::kFloat;
}

// The dtype that sums have.
inline int32_t acc_dtype(Dtype dtype) {
  return dtype == Dtype::kDouble ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Memory of so many doubles on a tensor's device; null of none. From torch's allocator, which
// knows the stream, so that it may be dropped before the kernels have run.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t doubles) : count_(doubles) {
    if (count_ > 0) tensor_ = empty_like(like, {count_}, aoti_torch_dtype_float64());
  }
  double* data() const {
    return count_ > 0 ? static_cast<double*>(tensor_.mutable_data_ptr()) : nullptr;
  }

 private:
  Tensor tensor_;
  int64_t count_;
};

}  // namespace torchext::cuda
