#include "ops/sgd.h"

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  // One step of torch.optim.SGD for all parameters at once, to the bit. momentum_buffers: of the
  // steps before, one a parameter, or none without momentum.
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, float lr, "
      "float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()");
}
