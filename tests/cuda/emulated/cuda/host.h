// The host's half of csrc/cuda/host.h for tensors on the CPU, on which the emulated kernels run.
#pragma once

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <utility>

#include "common/checks.h"
#include "common/stable.h"
#include "cuda/launch.h"

#define STD_CUDA_CHECK(call) TORCHEXT_CHECK((call) == cudaSuccess, "an emulated launch failed")

namespace torchext::cuda {

inline void check_memory(const char*, const Tensor&,
                         std::initializer_list<std::pair<const char*, const Tensor*>>) {}
struct NoGuard {
  ~NoGuard() {}
};
inline NoGuard on_device_of(const Tensor&) { return {}; }
inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

}  // namespace torchext::cuda

#include "cuda/host_types.h"
