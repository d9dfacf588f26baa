// How the kernels go through rows of logits, for the test that holds Python's rule to it.
#include "cuda/cross_entropy_call.h"

namespace torchext {
namespace {

bool stays_in_registers(const Tensor& input, const Tensor& target, double label_smoothing) {
  const auto shape = check_cross_entropy(input, target, std::nullopt, 1, -100, label_smoothing);
  auto call = cuda::CrossEntropyCall::of(input, target, std::nullopt, shape, -100, label_smoothing);
  call.new_gradient();
  return call.plan().route != cuda::RowRoute::kTwoPass;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_FRAGMENT(torchext_emulated, m) {
  m.def("stays_in_registers(Tensor input, Tensor target, float label_smoothing) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(torchext_emulated, CPU, m) {
  m.impl("stays_in_registers", TORCH_BOX(&torchext::stays_in_registers));
}
