// Which instruction set the kernels use here, for `torchext info` and the tests.
#include "cpu/simd.h"

#include "common/stable.h"

namespace torchext {
namespace {
int64_t simd_level_cpu() { return static_cast<int64_t>(simd::level()); }
}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) { m.def("simd_level() -> int"); }

STABLE_TORCH_LIBRARY_IMPL(torchext, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&torchext::simd_level_cpu));
}
