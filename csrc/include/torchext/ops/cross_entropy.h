// Cross-entropy in one pass over the logits.
//
// Siblings: torchext/ops/cross_entropy.py (the formula), csrc/ops/cross_entropy.cpp, tests/cpp/.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include <torchext/detail.h>

namespace torchext {
namespace detail {

inline const auto& cross_entropy_forward() {
  static const auto op = find_operator<std::tuple<at::Tensor, at::Tensor, at::Tensor>(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, int64_t,
      double, bool)>("torchext::cross_entropy_forward");
  return op;
}

inline const auto& cross_entropy_backward() {
  static const auto op = find_operator<at::Tensor(
      const at::Tensor&, const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
      const at::Tensor&, int64_t, int64_t, double)>("torchext::cross_entropy_backward");
  return op;
}

inline at::Tensor cross_entropy_reference(const at::Tensor& input, const at::Tensor& target,
                                          const at::Tensor& weight, int64_t reduction,
                                          int64_t ignore_index, double label_smoothing) {
  // Stock takes uint8 by halves, and int32 not at all.
  const bool narrow = target.scalar_type() == at::kInt || target.scalar_type() == at::kByte;
  const at::Tensor indices = narrow ? target.to(at::kLong) : target;
  return at::cross_entropy_loss(input, indices, if_defined(weight), reduction, ignore_index,
                                label_smoothing);
}

// Where the loss is one number, forward writes the gradient of the logits while they are in cache,
// and backward has only to scale it.
class CrossEntropyFunction : public torch::autograd::Function<CrossEntropyFunction> {
  using Options = std::tuple<int64_t, int64_t, double, bool>;

 public:
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input,
                            const at::Tensor& target, const std::optional<at::Tensor>& weight,
                            int64_t reduction, int64_t ignore_index, double label_smoothing) {
    // In float16 the gradient of a mean underflows before a loss scale can lift it.
    const bool one_pass = reduction != at::Reduction::None && input.scalar_type() != at::kHalf;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    auto [loss, stats, gradient] = cross_entropy_forward().call(
        input, target, weight, reduction, ignore_index, label_smoothing, one_pass);
    // As with the stock op the logits may be changed after a loss whose gradient is there: they are
    // kept beside what is saved, for a second derivative.
    if (one_pass) context->saved_data["logits"] = std::make_tuple(input, version_of(input));
    context->save_for_backward({one_pass ? at::Tensor() : input, target,
                                weight.value_or(at::Tensor()), one_pass ? gradient : stats});
    context->saved_data["options"] = Options{reduction, ignore_index, label_smoothing, one_pass};
    context->set_materialize_grads(false);
    return loss;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    const at::Tensor& grad_loss = grad_outputs[0];
    variable_list grads(6);
    if (!grad_loss.defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &target = saved[1], &weight = saved[2];
    const auto [reduction, ignore_index, label_smoothing, one_pass] =
        context->saved_data["options"].to<Options>();
    at::Tensor input = saved[0];
    bool changed = false;
    if (one_pass) {
      int64_t version = 0;
      std::tie(input, version) =
          context->saved_data["logits"].to<std::tuple<at::Tensor, int64_t>>();
      changed = version_of(input) != version;
    }
    const bool differentiable = wants_reference(grad_loss);
    TORCH_CHECK(!differentiable || !changed,
                "one of the variables needed for gradient computation has been modified by an "
                "inplace operation: the logits of cross_entropy, of shape ",
                input.sizes());
    if (differentiable || (one_pass && !changed && !may_scale(grad_loss, at::kFloat))) {
      const auto definition = [&, reduction = reduction, ignore_index = ignore_index,
                               label_smoothing = label_smoothing](const variable_list& tensors) {
        return cross_entropy_reference(tensors[0], target, weight, reduction, ignore_index,
                                       label_smoothing);
      };
      grads[0] = reference_gradients(definition, {input}, {true}, grad_loss)[0];
    } else if (one_pass) {
      grads[0] = saved[3];
      scale(grad_loss, {&grads[0]});
    } else {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      grads[0] =
          cross_entropy_backward().call(grad_loss.resolve_neg(), input, target, if_defined(weight),
                                        saved[3], reduction, ignore_index, label_smoothing);
    }
    if (one_pass && !torch::autograd::get_current_graph_task_keep_graph()) {
      context->saved_data.erase("logits");
    }
    return grads;
  }
};

}  // namespace detail

// The cross-entropy between logits and targets, as at::cross_entropy_loss has it.
//
// input (C), (N, C) or (N, C, d1, ...); target class indices without the class dimension, or
// probabilities of input's shape; weight (C) or undefined; reduction at::Reduction::None, Mean,
// Sum.
inline at::Tensor cross_entropy(const at::Tensor& input, const at::Tensor& target,
                                const at::Tensor& weight = {},
                                int64_t reduction = at::Reduction::Mean,
                                int64_t ignore_index = -100, double label_smoothing = 0.0) {
  using namespace detail;
  if (!serves(cross_entropy_forward(), input) ||
      !serves_target(input, target, weight, ignore_index)) {
    return cross_entropy_reference(input, target, weight, reduction, ignore_index, label_smoothing);
  }
  if (at::GradMode::is_enabled() && input.requires_grad()) {
    return CrossEntropyFunction::apply(input, target, if_defined(weight), reduction, ignore_index,
                                       label_smoothing);
  }
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return std::get<0>(cross_entropy_forward().call(input, target, if_defined(weight), reduction,
                                                  ignore_index, label_smoothing, false));
}

}  // namespace torchext
