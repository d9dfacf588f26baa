// One step of SGD for all parameters in one call.
#pragma once

#include <ATen/ATen.h>

#include <torchext/detail.h>

namespace torchext {

// torch.optim.SGD's update, to the bit, of contiguous float32 or float64 parameters on the CPU:
//   g += weight_decay p;  v = momentum v + (1 - dampening) g;  p -= lr v
// `momentum_buffers` holds v: zeros before the first step, and empty where momentum is 0.
inline void sgd_(at::TensorList params, at::TensorList grads, at::TensorList momentum_buffers,
                 double lr, double momentum = 0, double dampening = 0, double weight_decay = 0,
                 bool nesterov = false, bool maximize = false) {
  static const auto op =
      detail::find_operator<void(at::TensorList, at::TensorList, at::TensorList, double, double,
                                 double, double, bool, bool)>("torchext::sgd_");
  const at::NoGradGuard no_grad;
  op.call(params, grads, momentum_buffers, lr, momentum, dampening, weight_decay, nesterov,
          maximize);
}

}  // namespace torchext
