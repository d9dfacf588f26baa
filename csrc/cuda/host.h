// What every CUDA operator does with a call on the host: its tensors' device, and the stream.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <initializer_list>
#include <utility>

#include "common/checks.h"
#include "common/stable.h"
#include "cuda/host_types.h"

namespace torchext::cuda {

// Refuses tensors that the kernels cannot read: those on other devices, and tensors without memory
// of their own (lazy zeros, functional wrappers), whose callers come past the dispatcher.
inline void check_memory(const char* op, const Tensor& input,
                         std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  TORCHEXT_CHECK(input.is_cuda(), op, ": expected input on a CUDA device");
  for (const auto& [name, tensor] : tensors) {
    TORCHEXT_CHECK(tensor->is_cuda() && tensor->get_device_index() == input.get_device_index(), op,
                   ": expected ", name, " on input's device, cuda:", input.get_device_index());
    TORCHEXT_CHECK(tensor->numel() == 0 || tensor->const_data_ptr() != nullptr, op, ": expected ",
                   name, " with memory of its own");
  }
}

// Makes a tensor's device the current one for its lifetime.
inline torch::stable::accelerator::DeviceGuard on_device_of(const Tensor& tensor) {
  return torch::stable::accelerator::DeviceGuard(tensor.get_device_index());
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCHEXT_AOTI_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace torchext::cuda
