// Fused linear + ReLU.
//
//   output = max(input @ weight.T + bias, 0)        input (*, K), weight (N, K), bias (N)
//
// Siblings: torchext/ops/linear_relu.py (the same formula), csrc/ops/linear_relu.cpp, tests/cpp/.
#pragma once

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torchext/detail.h>

namespace torchext {
namespace detail {

inline const auto& linear_relu_forward() {
  static const auto op =
      find_operator<at::Tensor(const at::Tensor&, const at::Tensor&,
                               const std::optional<at::Tensor>&)>("torchext::linear_relu_forward");
  return op;
}

inline const auto& linear_relu_backward() {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool,
      bool)>("torchext::linear_relu_backward");
  return op;
}

inline at::Tensor linear_relu_reference(const at::Tensor& input, const at::Tensor& weight,
                                        const at::Tensor& bias) {
  return at::relu(at::linear(input, weight, if_defined(bias)));
}

class LinearReLUFunction : public torch::autograd::Function<LinearReLUFunction> {
 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    at::Tensor output = linear_relu_forward().call(input, weight, bias);
    context->save_for_backward({input, weight, bias.value_or(at::Tensor()), output});
    context->set_materialize_grads(false);
    return output;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const at::Tensor& grad_output = grad_outputs[0];
    if (!grad_output.defined()) return variable_list(3);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &weight = saved[1], &bias = saved[2], &output = saved[3];
    const std::vector<bool> needed = {context->needs_input_grad(0), context->needs_input_grad(1),
                                      bias.defined() && context->needs_input_grad(2)};
    if (wants_reference(grad_output)) {
      const auto definition = [](const variable_list& tensors) {
        return linear_relu_reference(tensors[0], tensors[1], tensors[2]);
      };
      return reference_gradients(definition, {input, weight, bias}, needed, grad_output);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [grad_input, grad_weight, grad_bias] = linear_relu_backward().call(
        grad_output.resolve_neg(), output, input, weight, needed[0], needed[1], needed[2]);
    variable_list grads(3);
    if (needed[0]) grads[0] = std::move(grad_input);
    if (needed[1]) grads[1] = std::move(grad_weight);
    if (needed[2]) grads[2] = std::move(grad_bias);
    return grads;
  }
};

}  // namespace detail

// relu(input @ weight.T + bias); bias may be undefined.
inline at::Tensor linear_relu(const at::Tensor& input, const at::Tensor& weight,
                              const at::Tensor& bias = {}) {
  using namespace detail;
  // A bias of another shape is broadcast, or refused, by the stock op.
  if (!serves(linear_relu_forward(), input) || weight.dim() != 2 || !is_plain(weight, input) ||
      !is_plain_or_undefined(bias, input) ||
      (bias.defined() && bias.sizes() != weight.sizes().slice(0, 1))) {
    return linear_relu_reference(input, weight, bias);
  }
  if (at::GradMode::is_enabled() &&
      (input.requires_grad() || weight.requires_grad() || bias.requires_grad())) {
    return LinearReLUFunction::apply(input, weight, if_defined(bias));
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return linear_relu_forward().call(input, weight, if_defined(bias));
}

}  // namespace torchext
