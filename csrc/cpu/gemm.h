// Matrix products on the CPU: by torch's library (MKL, oneDNN), or by our own kernel.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <optional>

#include "common/stable.h"
#include "cpu/dispatch.h"
#include "cpu/product.h"
#include "cpu/simd.h"

// As in torch's shim_cpu.h, one of the functions that its ahead-of-time compiler has packages call,
// but that header takes no TORCH_STABLE_ONLY. Weak: null where torch is built without oneDNN.
extern "C" [[gnu::weak]] AOTITorchError aoti_torch_cpu__linear_pointwise(
    AtenTensorHandle X, AtenTensorHandle W, AtenTensorHandle* B, const char* attr,
    const double** scalars, int64_t scalars_len_, const char** algorithm, AtenTensorHandle* ret0);

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

// input @ weight.T + bias by oneDNN, rounded once, for bfloat16 where torch's own linear would come
// to oneDNN, too. Unlike addmm it does not first copy the bias to every row and then read it back.
// Nothing where it does not serve. It could apply ReLU as well, but its ReLU turns NaN into 0.
template <typename scalar_t>
std::optional<Tensor> linear_with_bias(const Tensor& input, const Tensor& weight,
                                       const Tensor& bias) {
  if (!std::is_same_v<scalar_t, simd::BFloat16> || simd::level() != simd::Level::kAvx512 ||
      !aoti_torch_cpu__linear_pointwise || !input.is_contiguous() || !weight.is_contiguous() ||
      !bias.is_contiguous()) {
    return std::nullopt;
  }
  AtenTensorHandle with = bias.get(), result = nullptr;
  const AOTITorchError error = aoti_torch_cpu__linear_pointwise(
      input.get(), weight.get(), &with, "none", nullptr, 0, nullptr, &result);
  if (error != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Tensor(result);
}

// What may go with a product.
struct Also {
  bool accumulate = false;       // adds to what stands in out; not with a bias
  const Tensor* bias = nullptr;  // (columns), added to every row
  bool relu = false;
  bool by_rows = false;  // see Product
  bool pairs = false;    // our own kernel for bfloat16, too
};

// out = left @ right and what goes with it, by our own kernel where it serves the call
// and measured faster than the library's (product_choice.cpp); returns whether it did.
// Otherwise nothing has happened.
template <typename scalar_t>
bool own_product(const Tensor& out, const Tensor& left, const Tensor& right,
                 const Also& also = {}) {
  if (out.stride(1) != 1) return false;
  Product<scalar_t> product{};
  product.out = {static_cast<scalar_t*>(out.mutable_data_ptr()), out.stride(0), 1};
  const auto matrix = [](const Tensor& x) {
    return Matrix<const scalar_t>{static_cast<const scalar_t*>(x.const_data_ptr()), x.stride(0),
                                  x.stride(1)};
  };
  Tensor copy;
  product.left = matrix(left);
  product.by_pairs = also.pairs && std::is_same_v<scalar_t, simd::BFloat16> && multiplies_pairs();
  if (product.by_pairs && left.stride(0) != 1 && left.stride(1) != 1) {
    copy = as_contiguous(left);  // pairs must be side by side, or rows
    product.left = matrix(copy);
  }
  product.right = matrix(right);
  product.rows = left.size(0);
  product.inner = left.size(1);
  product.columns = right.size(1);
  product.accumulate = also.accumulate;
  const Tensor bias = also.bias ? as_contiguous(*also.bias) : Tensor();
  if (also.bias) product.bias = static_cast<const scalar_t*>(bias.const_data_ptr());
  product.relu = also.relu;
  product.by_rows = also.by_rows;
  if (!product_serves(product)) return false;
  product.run();
  return true;
}

// out = left @ right and what goes with it (no ReLU), by whichever is faster.
template <typename scalar_t>
void multiply(const Tensor& out, const Tensor& left, const Tensor& right, const Also& also = {}) {
  if (own_product<scalar_t>(out, left, right, also)) return;
  if (also.bias || also.accumulate) {
    addmm_out(out, also.bias ? *also.bias : out, left, right);
  } else {
    mm_out(out, left, right);
  }
}

}  // namespace torchext::cpu
