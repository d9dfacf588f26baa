// What the functions of every op share: finding operators, which calls the kernels serve, and
// gradients made of differentiable ops.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <cmath>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

namespace torchext::detail {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
class Operator;

// A registered operator. What its kernels refuse is raised in torch's classes: through the stable
// ABI it comes in the standard library's.
template <typename Result, typename... Arguments>
class Operator<Result(Arguments...)> {
 public:
  explicit Operator(c10::TypedOperatorHandle<Result(Arguments...)> handle) : handle_(handle) {}

  Result call(Arguments... arguments) const {
    try {
      return handle_.call(std::forward<Arguments>(arguments)...);
    } catch (const std::out_of_range& error) {
      C10_THROW_ERROR(IndexError, error.what());
    } catch (const std::invalid_argument& error) {
      C10_THROW_ERROR(ValueError, error.what());
    } catch (const std::runtime_error& error) {
      C10_THROW_ERROR(Error, error.what());
    }
  }

  bool has_kernel(c10::DispatchKey key) const { return handle_.hasKernelForDispatchKey(key); }

 private:
  c10::TypedOperatorHandle<Result(Arguments...)> handle_;
};

template <typename Signature>
Operator<Signature> find_operator(const char* name) {
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  TORCH_CHECK(op.has_value(), name,
              " is not registered: the library of torchext's kernels is not loaded. Link the "
              "program with the CMake target TorchExt::torchext, or dlopen the library");
  return Operator<Signature>(op->typed<Signature>());
}

inline std::optional<at::Tensor> if_defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

// Whether the tensor is plain memory on the device of `like`: no subclass, no lazy negation, no
// tangent of forward-mode AD.
inline bool is_plain(const at::Tensor& tensor, const at::Tensor& like) {
  return tensor.layout() == at::kStrided && tensor.device() == like.device() &&
         !at::isTensorSubclassLike(tensor) && !tensor.is_neg() && !tensor._fw_grad(0).defined();
}

inline bool is_plain_or_undefined(const at::Tensor& tensor, const at::Tensor& like) {
  return !tensor.defined() || is_plain(tensor, like);
}

// Whether a kernel of `op` serves the device and dtype of `input` in an eager call. Autocast and
// the transforms of functorch rewrite the eager definition's ops, and know nothing of ours.
template <typename Signature>
bool serves(const Operator<Signature>& op, const at::Tensor& input) {
  if (!input.is_cpu() && !input.is_cuda()) return false;
  const auto key = input.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::CUDA;
  const at::ScalarType dtype = input.scalar_type();
  return op.has_kernel(key) &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
          dtype == at::kHalf) &&
         !at::autocast::is_autocast_enabled(input.device().type()) &&
         !c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) &&
         is_plain(input, input);
}

// Whether the kernels serve a loss of these targets and class weights, or are the ones to refuse
// it.
inline bool serves_target(const at::Tensor& input, const at::Tensor& target,
                          const at::Tensor& weight, int64_t ignore_index) {
  const auto of_its_dtype = [&](const at::Tensor& tensor) {
    return tensor.scalar_type() == input.scalar_type();
  };
  if (!target.defined() || input.numel() == 0 || !is_plain(target, input)) return false;
  if (weight.defined() &&
      (!is_plain(weight, input) || weight.requires_grad() || !of_its_dtype(weight))) {
    return false;
  }
  return !target.is_floating_point() ||
         (!target.requires_grad() && ignore_index < 0 && of_its_dtype(target));
}

inline int64_t version_of(const at::Tensor& tensor) {
  return tensor.is_inference() ? 0 : static_cast<int64_t>(tensor._version());
}

// Whether backward must be made of differentiable ops: create_graph, or batched gradients.
inline bool wants_reference(const at::Tensor& grad_output) {
  return at::GradMode::is_enabled() || at::isTensorSubclassLike(grad_output);
}

// The differentiable gradients of an eager definition, a function of `tensors`. Each comes in as a
// view of its own, so that a tensor that stands in two places has a gradient for each.
template <typename Function>
variable_list reference_gradients(const Function& function, variable_list tensors,
                                  const std::vector<bool>& needed, const at::Tensor& grad_output) {
  const bool differentiable = at::GradMode::is_enabled();
  const at::AutoGradMode enable_grad(true);
  variable_list wanted;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!needed[i]) continue;
    tensors[i] = tensors[i].view_as(tensors[i]);
    wanted.push_back(tensors[i]);
  }
  variable_list found = torch::autograd::grad({function(tensors)}, wanted, {grad_output},
                                              /*retain_graph=*/true, /*create_graph=*/true);
  variable_list grads(tensors.size());
  for (size_t i = 0, next = 0; i < tensors.size(); ++i) {
    if (needed[i]) grads[i] = differentiable ? found[next++] : found[next++].detach();
  }
  return grads;
}

// As the sums of a loss are: float32 of float16 and bfloat16.
inline at::Tensor in_sums(const at::Tensor& tensor) {
  const bool narrow = tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
  return narrow ? tensor.to(at::kFloat) : tensor;
}

// Whether gradients of a dtype that were computed for a gradient of 1 may be multiplied by that of
// the loss: 0 times an infinity or a NaN is not stock's 0, and bfloat16 is rounded twice but by a
// power of two. On a GPU it may be: to look at the factor is to wait for it.
inline bool may_scale(const at::Tensor& grad_loss, at::ScalarType dtype) {
  if (!grad_loss.is_cpu()) return true;
  const double value = grad_loss.item<double>();
  int exponent = 0;
  const double fraction = std::abs(std::frexp(value, &exponent));
  return std::isfinite(value) && (dtype != at::kBFloat16 || fraction == 0.5 || fraction == 0.0);
}

// Multiplies gradients that were computed for a gradient of 1: in place where backward cannot come
// again. Not at all for the 1 of loss.backward(), if looking does not mean waiting for a GPU.
inline void scale(const at::Tensor& grad_loss, std::initializer_list<at::Tensor*> gradients) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const bool keep = torch::autograd::get_current_graph_task_keep_graph();
  if (!keep && grad_loss.is_cpu() && grad_loss.item<double>() == 1.0) return;
  for (at::Tensor* gradient : gradients) {
    if (!gradient->defined()) continue;
    if (keep) {
      *gradient = *gradient * grad_loss;
    } else {
      gradient->mul_(grad_loss);
    }
  }
}

}  // namespace torchext::detail
