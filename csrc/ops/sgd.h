// sgd_: schema arguments and their checks.
#pragma once

#include <vector>

#include "common/checks.h"
#include "common/stable.h"

namespace torchext {

inline void check_sgd(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                      const std::vector<Tensor>& momentum_buffers, double momentum) {
  const size_t wanted = momentum == 0 ? 0 : params.size();
  TORCHEXT_CHECK(grads.size() == params.size() && momentum_buffers.size() == wanted,
                 "sgd_: expected as many grads as params (", params.size(), ") and ", wanted,
                 " momentum_buffers, but got ", grads.size(), " and ", momentum_buffers.size());
  const auto check = [&](const Tensor& tensor, const Tensor& param, const char* name, size_t i) {
    TORCHEXT_CHECK(tensor.scalar_type() == param.scalar_type() && tensor.is_contiguous() &&
                       sizes_of(tensor) == sizes_of(param),
                   "sgd_: expected ", name, "[", i, "] to be contiguous, of shape ",
                   shape_string(param), " and dtype ", dtype_string(param), ", but got shape ",
                   shape_string(tensor), " and dtype ", dtype_string(tensor));
  };
  for (size_t i = 0; i < params.size(); ++i) {
    TORCHEXT_CHECK(params[i].scalar_type() == ScalarType::Float ||
                       params[i].scalar_type() == ScalarType::Double,
                   "sgd_: expected params of dtype float32 or float64, but got ",
                   dtype_string(params[i]));
    check(params[i], params[i], "params", i);
    check(grads[i], params[i], "grads", i);
    if (wanted) check(momentum_buffers[i], params[i], "momentum_buffers", i);
  }
}

}  // namespace torchext
