// The fused ops as differentiable C++ functions: torch::autograd::Functions over the registered
// operators. Python's gradients of those operators do not exist in a C++ process.
//
// As in Python, a call that the kernels do not serve takes the eager definition, and so does a
// second derivative.
#pragma once

#include <torchext/ops/cross_entropy.h>
#include <torchext/ops/cross_entropy_extras.h>
#include <torchext/ops/linear_cross_entropy.h>
#include <torchext/ops/linear_relu.h>
