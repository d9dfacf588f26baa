// The dtypes that kernels are made for, and the choice among them; for host code of .cu and .cpp.
#pragma once

#include <cstdint>

namespace torchext::cuda {

enum class Dtype { kFloat, kDouble, kBFloat16, kHalf };

inline int item_bytes(Dtype dtype) {
  if (dtype == Dtype::kDouble) return 8;
  return dtype == Dtype::kFloat ? 4 : 2;
}

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace torchext::cuda
