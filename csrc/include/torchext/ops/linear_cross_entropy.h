// Linear + cross-entropy, the logits never whole in memory.
//
//   loss = cross_entropy(input @ linear_weight.T + linear_bias, target)
//
// Siblings: torchext/ops/linear_cross_entropy.py, csrc/ops/linear_cross_entropy.cpp, tests/cpp/.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include <torchext/detail.h>
#include <torchext/ops/cross_entropy.h>

namespace torchext {
namespace detail {

inline const auto& linear_cross_entropy_forward() {
  static const auto op =
      find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
          const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
          const std::optional<at::Tensor>&, int64_t, int64_t, double, bool, bool, bool)>(
          "torchext::linear_cross_entropy_forward");
  return op;
}

inline const auto& linear_cross_entropy_backward() {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
      int64_t, int64_t, double, bool, bool, bool)>("torchext::linear_cross_entropy_backward");
  return op;
}

// (N, C), or (N, C, d1, ..., dK) of a linear_weight (C, d1, ..., dK, H).
inline at::Tensor whole_logits(const at::Tensor& input, const at::Tensor& linear_weight,
                               const at::Tensor& linear_bias) {
  TORCH_CHECK(linear_weight.dim() > 0, "linear_cross_entropy: expected linear_weight (C, ..., H)");
  const at::IntArrayRef inner = linear_weight.sizes().slice(0, linear_weight.dim() - 1);
  TORCH_CHECK(
      !linear_bias.defined() || linear_bias.sizes() == inner,
      "linear_cross_entropy: expected linear_bias of linear_weight's shape without its last "
      "dimension, ",
      inner, ", but got ", linear_bias.sizes());
  if (linear_weight.dim() <= 2) return at::linear(input, linear_weight, if_defined(linear_bias));
  std::vector<int64_t> sizes = input.sizes().slice(0, input.dim() - 1).vec();
  sizes.insert(sizes.end(), inner.begin(), inner.end());
  const at::Tensor flat_bias = linear_bias.defined() ? linear_bias.flatten() : linear_bias;
  return at::linear(input, linear_weight.flatten(0, -2), if_defined(flat_bias)).view(sizes);
}

inline at::Tensor linear_cross_entropy_reference(const at::Tensor& input,
                                                 const at::Tensor& linear_weight,
                                                 const at::Tensor& target,
                                                 const at::Tensor& linear_bias,
                                                 const at::Tensor& weight, int64_t reduction,
                                                 int64_t ignore_index, double label_smoothing) {
  return cross_entropy_reference(whole_logits(input, linear_weight, linear_bias), target, weight,
                                 reduction, ignore_index, label_smoothing);
}

inline void check_leading(const char* op, const at::Tensor& input, const at::Tensor& target) {
  const at::IntArrayRef leading = input.sizes().slice(0, input.dim() - 1);
  TORCH_CHECK(target.sizes() == leading, op,
              ": expected target of input's shape without its last dimension, ", leading,
              ", but got ", target.sizes());
}

// Where the loss is one number, forward makes the gradients with it, a chunk of rows at a time.
class LinearCrossEntropyFunction : public torch::autograd::Function<LinearCrossEntropyFunction> {
  using Options = std::tuple<int64_t, int64_t, double, bool>;

 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& linear_weight, const at::Tensor& target,
                            const std::optional<at::Tensor>& linear_bias,
                            const std::optional<at::Tensor>& weight, int64_t reduction,
                            int64_t ignore_index, double label_smoothing) {
    // In float16 the gradients of a mean underflow before a loss scale can lift them; in bfloat16
    // they would be rounded twice where backward cannot look at what it multiplies them by.
    const at::ScalarType dtype = input.scalar_type();
    const bool one_pass = reduction != at::Reduction::None && dtype != at::kHalf &&
                          (dtype != at::kBFloat16 || input.is_cpu());
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats, grad_input, grad_linear_weight, grad_linear_bias] =
        linear_cross_entropy_forward().call(
            input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
            label_smoothing, one_pass && input.requires_grad(),
            one_pass && linear_weight.requires_grad(),
            one_pass && linear_bias && linear_bias->requires_grad());
    context->save_for_backward({input, linear_weight, target, linear_bias.value_or(at::Tensor()),
                                weight.value_or(at::Tensor()), stats, grad_input,
                                grad_linear_weight, grad_linear_bias});
    context->saved_data["options"] = Options{reduction, ignore_index, label_smoothing, one_pass};
    context->set_materialize_grads(false);
    return loss.to(dtype);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    variable_list grads(8);
    if (!grad_outputs[0].defined()) return grads;
    const at::Tensor grad_loss = in_sums(grad_outputs[0]);
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &input = saved[0], &linear_weight = saved[1], &target = saved[2],
                     &linear_bias = saved[3], &weight = saved[4];
    const auto [reduction, ignore_index, label_smoothing, one_pass] =
        context->saved_data["options"].to<Options>();
    const std::vector<bool> needed = {context->needs_input_grad(0), context->needs_input_grad(1),
                                      linear_bias.defined() && context->needs_input_grad(3)};
    variable_list found(3);
    if (wants_reference(grad_loss)) {
      const auto definition = [&, reduction = reduction, ignore_index = ignore_index,
                               label_smoothing = label_smoothing](const variable_list& tensors) {
        const at::Tensor logits = whole_logits(tensors[0], tensors[1], tensors[2]);
        return cross_entropy_reference(in_sums(logits), in_sums(target),
                                       weight.defined() ? in_sums(weight) : weight, reduction,
                                       ignore_index, label_smoothing);
      };
      found =
          reference_gradients(definition, {input, linear_weight, linear_bias}, needed, grad_loss);
    } else if (one_pass && may_scale(grad_loss, input.scalar_type())) {
      found = {saved[6], saved[7], saved[8]};
      scale(grad_loss, {&found[0], &found[1], &found[2]});
    } else {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      std::tie(found[0], found[1], found[2]) = linear_cross_entropy_backward().call(
          grad_loss.resolve_neg(), input, linear_weight, target, if_defined(linear_bias),
          if_defined(weight), saved[5], reduction, ignore_index, label_smoothing, needed[0],
          needed[1], needed[2]);
    }
    if (needed[0]) grads[0] = std::move(found[0]);
    if (needed[1]) grads[1] = std::move(found[1]);
    if (needed[2]) grads[3] = std::move(found[2]);
    return grads;
  }
};

}  // namespace detail

// The cross-entropy of logits = input @ linear_weight.T + linear_bias that never exist as a whole.
//
// input (H) or (*, H); linear_weight (C, H); target class indices (*), or probabilities (N, C);
// linear_bias (C) or undefined; the rest as in cross_entropy. Or input (N, H); linear_weight
// (C, d1, ..., dK, H); target (N, d1, ..., dK) or (N, C, d1, ..., dK); linear_bias
// (C, d1, ..., dK).
inline at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& linear_weight,
                                       const at::Tensor& target, const at::Tensor& linear_bias = {},
                                       const at::Tensor& weight = {},
                                       int64_t reduction = at::Reduction::Mean,
                                       int64_t ignore_index = -100, double label_smoothing = 0.0) {
  using namespace detail;
  if (input.dim() > 2) {
    check_leading("linear_cross_entropy", input, target);
    const at::Tensor loss =
        linear_cross_entropy(input.flatten(0, -2), linear_weight, target.flatten(), linear_bias,
                             weight, reduction, ignore_index, label_smoothing);
    return reduction == at::Reduction::None ? loss.view(target.sizes()) : loss;
  }
  // Two inner dimensions and more are as one.
  const int64_t inner = linear_weight.dim() - 2, class_dims = target.is_floating_point() ? 1 : 0;
  if (inner > 1 && target.dim() == 1 + class_dims + inner &&
      target.sizes().slice(1 + class_dims) == linear_weight.sizes().slice(1, inner) &&
      (!linear_bias.defined() ||
       linear_bias.sizes() == linear_weight.sizes().slice(0, 1 + inner))) {
    std::vector<int64_t> sizes = target.sizes().vec();
    if (class_dims == 1) sizes.erase(sizes.begin() + 1);
    const at::Tensor flat_bias = linear_bias.defined() ? linear_bias.flatten(1) : linear_bias;
    const at::Tensor loss =
        linear_cross_entropy(input, linear_weight.flatten(1, -2), target.flatten(1 + class_dims),
                             flat_bias, weight, reduction, ignore_index, label_smoothing);
    return reduction == at::Reduction::None ? loss.view(sizes) : loss;
  }
  if (!serves(linear_cross_entropy_forward(), input) ||
      !serves_target(input, target, weight, ignore_index) || input.dim() != 2 ||
      (linear_weight.dim() != 2 && (inner != 1 || !input.is_cpu())) || linear_weight.numel() == 0 ||
      !is_plain(linear_weight, input) || !is_plain_or_undefined(linear_bias, input)) {
    return linear_cross_entropy_reference(input, linear_weight, target, linear_bias, weight,
                                          reduction, ignore_index, label_smoothing);
  }
  if (at::GradMode::is_enabled() &&
      (input.requires_grad() || linear_weight.requires_grad() || linear_bias.requires_grad())) {
    return LinearCrossEntropyFunction::apply(input, linear_weight, target, if_defined(linear_bias),
                                             if_defined(weight), reduction, ignore_index,
                                             label_smoothing);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto results = linear_cross_entropy_forward().call(
      input, linear_weight, target, if_defined(linear_bias), if_defined(weight), reduction,
      ignore_index, label_smoothing, false, false, false);
  return std::get<0>(results).to(input.scalar_type());
}

}  // namespace torchext
