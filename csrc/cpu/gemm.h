// Matrix products on the CPU, by torch's library (MKL, oneDNN).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/stable.h"
#include "cpu/dispatch.h"

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

// Products of a small batch with a weight, shared out over the weight's rows: a thread meets the
// same rows forward, in their gradient and in the optimiser's step, and finds them in its own
// cache. Large products are the library's to share out.
template <typename Block>
void by_weight_rows(int64_t weight_rows, int64_t work, const Block& block) {
  constexpr int64_t kLeast = int64_t{1} << 22, kMost = int64_t{1} << 24;  // multiplications
  constexpr int64_t kRows = 16;
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t units = (weight_rows + kRows - 1) / kRows;
  if (work < kLeast || work > kMost || threads < 2 || units < 2) return block(0, weight_rows);
  for_each_block(units, (units + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    block(begin * kRows, std::min(weight_rows, end * kRows) - begin * kRows);
  });
}

inline Tensor columns_of(const Tensor& matrix, int64_t first, int64_t count) {
  return as_strided(matrix, {matrix.size(0), count}, {matrix.stride(0), matrix.stride(1)},
                    first * matrix.stride(1));
}

}  // namespace torchext::cpu
