// A product of matrices as an operator.
#include "cpu/gemm.h"

namespace torchext {
namespace {

void product_out_cpu(const Tensor& left, const Tensor& right, const std::optional<Tensor>& bias,
                     bool accumulate, const Tensor& out) {
  check_memory("product_out", {{"left", &left}, {"right", &right}, {"out", &out}});
  if (bias) check_memory("product_out", {{"bias", &*bias}});
  const auto fits = [&](const Tensor& tensor) {
    return tensor.dim() == 2 && tensor.scalar_type() == left.scalar_type();
  };
  TORCHEXT_CHECK(fits(left) && fits(right) && fits(out) && left.size(1) == right.size(0) &&
                     out.size(0) == left.size(0) && out.size(1) == right.size(1),
                 "product_out: expected matrices of one dtype that go together, but got left, "
                 "right and out of shapes ",
                 shape_string(left), ", ", shape_string(right), " and ", shape_string(out));
  TORCHEXT_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == out.size(1) && !accumulate &&
                           bias->scalar_type() == left.scalar_type()),
                 "product_out: expected bias of out's columns, and no accumulate with it");
  cpu::Also also;
  also.accumulate = accumulate;
  also.bias = bias ? &*bias : nullptr;
  dispatch_floating(left.scalar_type(), "product_out",
                    [&](auto zero) { cpu::multiply<decltype(zero)>(out, left, right, also); });
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("product_out", TORCH_BOX(&torchext::product_out_cpu));
}
