// Matrix products on CUDA, by torch's library (cuBLAS, cuBLASLt).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <array>

#include "common/checks.h"
#include "common/stable.h"

namespace torchext::cuda {

inline Tensor transposed(const Tensor& matrix) {
  return as_strided(matrix, {matrix.size(1), matrix.size(0)}, {matrix.stride(1), matrix.stride(0)});
}

// Rows [first, first + count) of a matrix; and columns.
inline Tensor rows_of(const Tensor& matrix, int64_t first, int64_t count) {
  return as_strided(matrix, {count, matrix.size(1)}, {matrix.stride(0), matrix.stride(1)},
                    first * matrix.stride(0));
}
inline Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  return as_strided(matrix, {matrix.size(0), count}, {matrix.stride(0), matrix.stride(1)},
                    first * matrix.stride(1));
}

// out = left @ right
inline void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  TORCHEXT_AOTI_CHECK(aoti_torch_cuda_mm_out(out.get(), left.get(), right.get()));
}

// out = added + left @ right; `added` may be `out`, or a vector that every row gets.
inline void addmm_out(const Tensor& out, const Tensor& added, const Tensor& left,
                      const Tensor& right) {
  TORCHEXT_AOTI_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), added.get(), left.get(), right.get(), 1.0, 1.0));
}

// out = left @ right in float32, of bfloat16 or float16. There is no shim for it at 2.11, and none
// that adds to `out`. The dispatcher must see tensors without a history: views of ours have none.
inline void mm_float_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  const auto plain = [](const Tensor& matrix) {
    return as_strided(matrix, sizes_of(matrix), {matrix.stride(0), matrix.stride(1)});
  };
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(plain(left)), torch::stable::detail::from(plain(right)),
      torch::stable::detail::from(ScalarType::Float), torch::stable::detail::from(plain(out))};
  TORCHEXT_AOTI_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // ours to drop
}

}  // namespace torchext::cuda
