// Matrix products on the CPU, by torch's library (MKL, oneDNN).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/stable.h"

namespace torchext::cpu {

inline Tensor transposed(const Tensor& matrix) {
  return as_strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// Rows [first, first + count) of a matrix.
inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  return as_strided(matrix, {count, matrix.size(1)}, {matrix.stride(0), matrix.stride(1)},
                    first * matrix.stride(0));
}

// out = left @ right
inline void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  TORCHEXT_AOTI_CHECK(aoti_torch_cpu_mm_out(out.get(), left.get(), right.get()));
}

// out = added + left @ right; `added` may be `out`.
inline void addmm_out(const Tensor& out, const Tensor& added, const Tensor& left,
                      const Tensor& right) {
  TORCHEXT_AOTI_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), added.get(), left.get(), right.get(), 1.0, 1.0));
}

}  // namespace torchext::cpu
