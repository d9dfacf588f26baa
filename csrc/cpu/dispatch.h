// What every CPU kernel does with a call: choose the dtype, split the work.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "common/checks.h"
#include "common/stable.h"

namespace torchext {

// Calls `body` with a zero of the C++ type of `dtype`; `op` names the caller in the error.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      TORCHEXT_CHECK(false, op, ": expected dtype float32, float64, bfloat16 or float16, but got ",
                     torch::headeronly::toString(dtype));
  }
}

// Refuses tensors that the kernels cannot read: other devices, and tensors without memory of their
// own (lazy zeros, functional wrappers), whose callers come past the dispatcher.
inline void check_memory(const char* op,
                         std::initializer_list<std::pair<const char*, const Tensor*>> tensors) {
  for (const auto& [name, tensor] : tensors) {
    TORCHEXT_CHECK(tensor->is_cpu(), op, ": expected ", name, " on the CPU");
    TORCHEXT_CHECK(tensor->numel() == 0 || tensor->const_data_ptr() != nullptr, op, ": expected ",
                   name, " with memory of its own");
  }
}

// Runs `body(begin, end)` over [0, count), in one thread where it has less than `grain` to do.
template <typename Body>
void for_each_block(int64_t count, int64_t grain, const Body& body) {
  grain = std::max<int64_t>(grain, 1);
  if (count <= grain) {
    if (count > 0) body(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace torchext
