#include "common/stable.h"

STABLE_TORCH_LIBRARY_FRAGMENT(torchext, m) {
  // out = left @ right + bias, or with accumulate += left @ right: by our own kernel where it is
  // the faster one, else by the library's. For what walks chunks in Python.
  m.def(
      "product_out(Tensor left, Tensor right, Tensor? bias, bool accumulate, Tensor(a!) out) -> "
      "()");
}
