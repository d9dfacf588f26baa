// Every alias and shim over torch's stable ABI stands here, so that the rest of the code reads like
// ordinary torch code. A shim goes when the stable ABI (at TORCH_TARGET_VERSION) has its own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace torchext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A braced check: TORCH_ERROR_CODE_CHECK is a bare `if` at target 2.11.
#define TORCHEXT_AOTI_CHECK(call)   \
  do {                              \
    TORCH_ERROR_CODE_CHECK((call)); \
  } while (0)

// An uninitialised tensor with the dtype and device of `like`. Straight to the C shim: looking
// aten::empty up by name in the dispatcher costs more than the allocation of a small tensor.
inline Tensor empty_strided_like(const Tensor& like, const std::vector<int64_t>& sizes,
                                 const std::vector<int64_t>& strides, int32_t dtype) {
  int32_t device_type = 0;
  TORCHEXT_AOTI_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCHEXT_AOTI_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                               strides.data(), dtype, device_type,
                                               like.get_device_index(), &handle));
  return Tensor(handle);
}

inline int32_t dtype_code(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCHEXT_AOTI_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return strides;
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  return empty_strided_like(like, sizes, contiguous_strides(sizes), dtype);
}

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& sizes) {
  return empty_like(like, sizes, dtype_code(like));
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

// The tensor itself where it is contiguous: the dispatcher's own look costs a look-up by name.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A view of the same storage, from the tensor's own first element.
inline Tensor as_strided(const Tensor& tensor, const std::vector<int64_t>& sizes,
                         const std::vector<int64_t>& strides, int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  TORCHEXT_AOTI_CHECK(
      aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &handle));
  return Tensor(handle);
}

}  // namespace torchext
