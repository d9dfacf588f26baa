// What the kernels use here, for `torchext info` and the tests.
#include "cpu/simd.h"

#include "cpu/dispatch.h"
#include "cpu/product.h"

namespace torchext {
namespace {
int64_t simd_level_cpu() { return static_cast<int64_t>(simd::level()); }
bool multiplies_pairs_cpu() { return cpu::multiplies_pairs(); }
bool own_products_cpu(const Tensor& like) {
  bool own = false;
  dispatch_floating(like.scalar_type(), "own_products",
                    [&](auto zero) { own = cpu::all_products_serve<decltype(zero)>(); });
  return own;
}
}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  m.def("simd_level() -> int");
  m.def("multiplies_pairs() -> bool");
  m.def("own_products(Tensor like) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(torchext, CompositeExplicitAutograd, m) {
  m.impl("simd_level", TORCH_BOX(&torchext::simd_level_cpu));
  m.impl("multiplies_pairs", TORCH_BOX(&torchext::multiplies_pairs_cpu));
  m.impl("own_products", TORCH_BOX(&torchext::own_products_cpu));
}
