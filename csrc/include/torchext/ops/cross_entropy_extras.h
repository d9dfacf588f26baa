// The losses with what the stock ones do not have, values and gradients.
//
// Rows of logits go through one kernel, those of a linear transformation a chunk at a time;
// anything else is made of torch's ops. Formulas: cross_entropy_extras_definition.h.
//
// Siblings: torchext/ops/extras.py, csrc/ops/cross_entropy_extras.cpp, tests/cpp/test_extras.cpp.
#pragma once

#include <cstdint>
#include <optional>

#include <torchext/ops/cross_entropy_extras_rows.h>

namespace torchext {
namespace detail {

// The gradient in the place of the logits. What saved them before must not use them again, and
// backward must not use a gradient that was changed after: their version says both.
class CrossEntropyInplaceFunction : public torch::autograd::Function<CrossEntropyInplaceFunction> {
 public:
  // The loss, and the argmax if it is asked for.
  static variable_list forward(AutogradContext* context, const at::Tensor& input,
                               const at::Tensor& target, const std::optional<at::Tensor>& weight,
                               const LossOptions& options) {
    LossResult result;
    if (options.extras.change_loss()) {
      const LossTensors tensors{input, {}, {}, target, weight.value_or(at::Tensor())};
      result = loss_forward(tensors, options, {true, false, false}, /*overwrite=*/true).result;
    } else {
      static const auto op =
          find_operator<at::Tensor(const at::Tensor&, const at::Tensor&,
                                   const std::optional<at::Tensor>&, int64_t, int64_t, double)>(
              "torchext::cross_entropy_forward_");
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      result.loss = op.call(input, target, weight, options.reduction, options.ignore_index,
                            options.label_smoothing);
    }
    input.unsafeGetTensorImpl()->bump_version();
    context->save_for_backward({input.detach()});
    context->set_materialize_grads(false);
    variable_list outputs{result.loss};
    if (result.argmax.defined()) {
      outputs.push_back(result.argmax);
      context->mark_non_differentiable({result.argmax});
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    variable_list grads(4);
    if (!grad_outputs[0].defined()) return grads;
    TORCH_CHECK(!wants_reference(grad_outputs[0]),
                "cross_entropy_extras: a second derivative needs the logits, but "
                "inplace_backward(true) overwrote them; call it with inplace_backward(false)");
    grads[0] = context->get_saved_variables()[0];
    scale(grad_outputs[0], {&grads[0]});
    return grads;
  }
};

// Whether the gradient of a call may take the place of its logits.
inline bool may_overwrite(const LossTensors& tensors, const LossOptions& options) {
  const at::Tensor &input = tensors.input, &target = tensors.target;
  return options.extras.inplace_backward() && !options.extras.return_lse() &&
         at::GradMode::is_enabled() && input.requires_grad() &&
         options.reduction != at::Reduction::None && input.scalar_type() != at::kHalf &&
         serves(cross_entropy_forward(), input) && input.is_contiguous() &&
         serves_target(input, target, tensors.weight, options.ignore_index) &&
         !target.is_alias_of(input) &&
         (!options.extras.change_loss() || serves_rows(tensors, options));
}

}  // namespace detail

// cross_entropy with extras, as torchext.cross_entropy has them in Python.
//
//   auto [loss, lse, argmax] = cross_entropy_extras(
//       logits, target, LossExtras().z_loss(1e-4).softcap(30).return_lse(true));
inline LossResult cross_entropy_extras(const at::Tensor& input, const at::Tensor& target,
                                       const LossExtras& extras, const at::Tensor& weight = {},
                                       int64_t reduction = at::Reduction::Mean,
                                       int64_t ignore_index = -100, double label_smoothing = 0.0) {
  detail::check_extras("cross_entropy_extras", extras);
  const detail::LossOptions options{reduction, ignore_index, label_smoothing, extras};
  const detail::LossTensors tensors{input, {}, {}, target, weight};
  if (detail::may_overwrite(tensors, options)) {
    const auto outputs = detail::CrossEntropyInplaceFunction::apply(
        input, target, detail::if_defined(weight), options);
    return {outputs[0], {}, extras.return_argmax() ? outputs[1] : at::Tensor()};
  }
  if (!extras.change_loss()) {
    return {cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)};
  }
  if (detail::serves_rows(tensors, options)) return detail::loss_by_rows(tensors, options);
  return detail::loss_definition(input, target, weight, options);
}

// linear_cross_entropy with extras, its logits a chunk at a time where they are rows.
inline LossResult linear_cross_entropy_extras(
    const at::Tensor& input, const at::Tensor& linear_weight, const at::Tensor& target,
    const LossExtras& extras, const at::Tensor& linear_bias = {}, const at::Tensor& weight = {},
    int64_t reduction = at::Reduction::Mean, int64_t ignore_index = -100,
    double label_smoothing = 0.0) {
  const char* op = "linear_cross_entropy_extras";
  detail::check_extras(op, extras);
  if (input.dim() > 2) {
    detail::check_leading(op, input, target);
    LossResult result =
        linear_cross_entropy_extras(input.flatten(0, -2), linear_weight, target.flatten(), extras,
                                    linear_bias, weight, reduction, ignore_index, label_smoothing);
    if (reduction == at::Reduction::None) result.loss = result.loss.view(target.sizes());
    if (result.lse.defined()) result.lse = result.lse.view(target.sizes());
    if (result.argmax.defined()) result.argmax = result.argmax.view(target.sizes());
    return result;
  }
  const detail::LossOptions options{reduction, ignore_index, label_smoothing, extras};
  if (!extras.change_loss()) {
    return {linear_cross_entropy(input, linear_weight, target, linear_bias, weight, reduction,
                                 ignore_index, label_smoothing)};
  }
  const detail::LossTensors tensors{input, linear_weight, linear_bias, target, weight};
  if (detail::serves_rows(tensors, options)) return detail::loss_by_rows(tensors, options);
  return cross_entropy_extras(detail::whole_logits(input, linear_weight, linear_bias), target,
                              extras, weight, reduction, ignore_index, label_smoothing);
}

}  // namespace torchext
