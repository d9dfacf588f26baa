// How kernels step through logits; without torch's headers, so that device code can have it.
#pragma once

#include <cstdint>

namespace torchext {

// A position has one row of logits: element (n, c, s) of a tensor (N, C, S) stands at
// n * outer + c * channel + s * inner elements from its start.
struct Strides {
  int64_t outer;
  int64_t channel;
  int64_t inner;
};

}  // namespace torchext
