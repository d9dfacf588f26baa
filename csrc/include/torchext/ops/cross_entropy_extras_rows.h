// The rows of a loss with extras by their kernel, those of a linear transformation a chunk at a
// time, and the node of autograd around them.
//
// Siblings: torchext/ops/extras_{autograd,chunks,source}.py, csrc/ops/cross_entropy_extras.cpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include <torchext/ops/cross_entropy_extras_definition.h>

namespace torchext::detail {

inline const auto& cross_entropy_extras_rows() {
  static const auto op = find_operator<void(
      const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t, double,
      double, double, double, const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
      const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
      const std::optional<at::Tensor>&)>("torchext::cross_entropy_extras_rows");
  return op;
}

// The tensors of a call, those with gradients first. Without linear_weight, input is the
// logits (N, C).
struct LossTensors {
  at::Tensor input, linear_weight, linear_bias, target, weight;

  const at::Tensor& operator[](int i) const {
    return i == 0 ? input : i == 1 ? linear_weight : linear_bias;
  }
  int64_t rows() const { return input.size(0); }
  int64_t classes() const {
    return linear_weight.defined() ? linear_weight.size(0) : input.size(1);
  }
};

// left @ right, with bias or what out held added.
inline void multiply(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias,
                     bool accumulate, at::Tensor out) {
  if (out.is_cpu()) {
    static const auto op =
        find_operator<void(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                           bool, const at::Tensor&)>("torchext::product_out");
    op.call(left, right, if_defined(bias), accumulate, out);
  } else if (bias.defined() || accumulate) {
    at::addmm_out(out, bias.defined() ? bias : out, left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

// How many rows of logits are made at once: torchext/ops/extras_source.py has the same.
inline int64_t loss_chunk(const LossTensors& tensors) {
  const int64_t size = tensors.classes() * (tensors.input.scalar_type() == at::kDouble ? 8 : 4);
  const int64_t bytes = int64_t{tensors.input.is_cpu() ? 64 : 512} << 20;
  int64_t fit = std::max<int64_t>(256, bytes / size / 256 * 256);
  if (tensors.input.is_cpu()) fit = std::min(fit, std::max<int64_t>(384, (8 << 20) / size));
  return std::max<int64_t>(1, std::min(tensors.rows(), fit));
}

using Needed = std::array<bool, 3>;

// Goes through the rows: writes loss, stats and argmax where loss is defined, else reads stats, and
// returns the gradients of input, linear_weight and linear_bias that are needed, for the gradients
// of each row's loss and lse.
inline variable_list loss_pass(const LossTensors& tensors, const LossOptions& options,
                               const Needed& needed, const at::Tensor& grad_loss,
                               const at::Tensor& grad_lse, const at::Tensor& loss,
                               const at::Tensor& stats, const at::Tensor& argmax,
                               bool overwrite = false) {
  const auto& [input, linear_weight, linear_bias, target, weight] = tensors;
  const LossExtras& extras = options.extras;
  const bool linear = linear_weight.defined();
  const int64_t chunk = linear ? loss_chunk(tensors) : std::max<int64_t>(1, tensors.rows());
  const at::ScalarType sums = stats.scalar_type();
  const auto empty = [&](at::IntArrayRef sizes) { return at::empty(sizes, input.options()); };
  const at::Tensor room = linear ? empty({chunk, tensors.classes()}) : at::Tensor();
  variable_list grads(3);
  if (needed[0]) grads[0] = overwrite ? input : empty(input.sizes());
  if (needed[1]) grads[1] = empty(linear_weight.sizes());
  const bool summed = needed[1] && sums != input.scalar_type() && chunk < tensors.rows();
  at::Tensor weight_sum, bias_sum;
  if (summed) weight_sum = at::zeros(linear_weight.sizes(), stats.options());
  if (needed[2]) bias_sum = at::zeros(linear_bias.sizes(), stats.options());
  for (int64_t first = 0; first < tensors.rows(); first += chunk) {
    const int64_t count = std::min(chunk, tensors.rows() - first);
    const auto part = [&](const at::Tensor& tensor) {
      return tensor.defined() ? tensor.narrow(0, first, count) : tensor;
    };
    at::Tensor logits = part(input), gradient = part(grads[0]);
    if (linear) {
      logits = gradient = room.narrow(0, 0, count);
      multiply(part(input), linear_weight.t(), linear_bias, false, logits);
    }
    const bool differentiate = needed[0] || needed[1] || needed[2];
    cross_entropy_extras_rows().call(
        logits, part(target), if_defined(weight), options.ignore_index, options.label_smoothing,
        extras.z_loss(), extras.softcap().value_or(0), extras.logit_scale(),
        if_defined(part(grad_loss)), if_defined(part(grad_lse)),
        differentiate ? std::optional(gradient) : std::nullopt, if_defined(part(loss)),
        stats.narrow(1, first, count), if_defined(part(argmax)));
    if (!linear || !differentiate) continue;
    if (needed[2]) bias_sum += gradient.sum(0, /*keepdim=*/false, sums);
    if (needed[0]) multiply(gradient, linear_weight, {}, false, part(grads[0]));
    if (needed[1]) {
      multiply(gradient.t(), part(input), {}, !summed && first > 0, grads[1]);
      if (summed) weight_sum += grads[1];
    }
  }
  if (summed) grads[1].copy_(weight_sum);
  if (needed[2]) grads[2] = bias_sum.to(input.scalar_type());
  return grads;
}

// What a mean divides by, in float64, of a sum 1. Refuses class indices that are none, on the CPU.
inline at::Tensor loss_divisor(const LossTensors& tensors, const LossOptions& options) {
  const auto& [input, linear_weight, linear_bias, target, weight] = tensors;
  at::Tensor mass;
  if (input.is_cpu() && !target.is_floating_point()) {
    static const auto op =
        find_operator<at::Tensor(const at::Tensor&, const std::optional<at::Tensor>&, int64_t,
                                 int64_t)>("torchext::cross_entropy_mass");
    const at::Tensor wide = weight.defined() ? in_sums(weight) : weight;
    mass = op.call(target, if_defined(wide), tensors.classes(), options.ignore_index);
    mass = without_zero(mass, options);
  }
  if (options.reduction != at::Reduction::Mean) {
    return at::ones({}, input.options().dtype(at::kDouble));
  }
  return mass.defined() ? mass : loss_mass(target, weight, tensors.rows(), options);
}

// Forward's results: what backward needs of the rows, and the gradients that were to come with
// them.
struct LossForward {
  LossResult result;
  at::Tensor stats, divisor;
  variable_list grads;
};

inline LossForward loss_forward(const LossTensors& tensors, const LossOptions& options,
                                const Needed& needed, bool overwrite = false) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t rows = tensors.rows();
  const at::TensorOptions sums = in_sums(tensors.input.new_empty({0})).options();
  LossForward found;
  found.divisor = loss_divisor(tensors, options);
  found.stats = at::empty({2, rows}, sums);
  at::Tensor loss = at::empty({rows}, sums), grad_rows;
  if (options.extras.return_argmax()) {
    found.result.argmax = at::empty({rows}, sums.dtype(at::kLong));
  }
  if (needed != Needed{}) grad_rows = found.divisor.reciprocal().to(sums).expand({rows});
  found.grads = loss_pass(tensors, options, needed, grad_rows, {}, loss, found.stats,
                          found.result.argmax, overwrite);
  if (options.reduction != at::Reduction::None) loss = loss.sum(at::kDouble) / found.divisor;
  found.result.loss = loss.to(tensors.input.scalar_type());
  if (options.extras.return_lse()) {
    // An infinite maximum is the lse; the sum is NaN there.
    const at::Tensor largest = found.stats[0];
    found.result.lse = at::where(largest.isinf(), largest, largest + found.stats[1].log());
  }
  return found;
}

// Where the loss is one number, and no lse is returned whose gradient only backward knows, forward
// makes the gradients with it. Otherwise backward makes the logits again.
class LossExtrasFunction : public torch::autograd::Function<LossExtrasFunction> {
  using Saved = std::tuple<int64_t, int64_t, double, double, std::optional<double>, double, bool,
                           std::string>;

 public:
  // The loss, and the lse and argmax that are asked for.
  static variable_list forward(AutogradContext* context, const at::Tensor& input,
                               const std::optional<at::Tensor>& linear_weight,
                               const std::optional<at::Tensor>& linear_bias,
                               const at::Tensor& target, const std::optional<at::Tensor>& weight,
                               const LossOptions& options) {
    const LossTensors tensors{input, linear_weight.value_or(at::Tensor()),
                              linear_bias.value_or(at::Tensor()), target,
                              weight.value_or(at::Tensor())};
    const LossExtras& extras = options.extras;
    // In float16 the gradients of a mean underflow before a loss scale can lift them; in bfloat16
    // they would be rounded twice where backward cannot look at what it multiplies them by.
    const at::ScalarType dtype = input.scalar_type();
    const bool one_pass = options.reduction != at::Reduction::None && !extras.return_lse() &&
                          dtype != at::kHalf && (dtype != at::kBFloat16 || input.is_cpu());
    Needed needed{};
    for (int i = 0; i < 3; ++i) needed[i] = one_pass && tensors[i].requires_grad();
    const auto [result, stats, divisor, grads] = loss_forward(tensors, options, needed);
    context->save_for_backward({input, tensors.linear_weight, tensors.linear_bias, target,
                                tensors.weight, stats, divisor, grads[0], grads[1], grads[2]});
    context->saved_data["options"] = Saved{
        options.reduction, options.ignore_index, options.label_smoothing, extras.z_loss(),
        extras.softcap(),  extras.logit_scale(), extras.return_lse(),     extras.ignored_mean()};
    context->saved_data["one_pass"] = one_pass;
    context->set_materialize_grads(false);
    variable_list outputs{result.loss};
    if (result.lse.defined()) outputs.push_back(result.lse);
    if (result.argmax.defined()) {
      outputs.push_back(result.argmax);
      context->mark_non_differentiable({result.argmax});
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grad_outputs) {
    variable_list grads(6);
    const auto [reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, return_lse,
                ignored_mean] = context->saved_data["options"].to<Saved>();
    const LossOptions options{reduction, ignore_index, label_smoothing,
                              LossExtras()
                                  .z_loss(z_loss)
                                  .softcap(softcap)
                                  .logit_scale(logit_scale)
                                  .return_lse(return_lse)
                                  .ignored_mean(ignored_mean)};
    const at::Tensor grad_loss =
        grad_outputs[0].defined() ? in_sums(grad_outputs[0]) : at::Tensor();
    const at::Tensor grad_lse = return_lse ? grad_outputs[1] : at::Tensor();
    if (!grad_loss.defined() && !grad_lse.defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const LossTensors tensors{saved[0], saved[1], saved[2], saved[3], saved[4]};
    Needed needed{};
    for (int i = 0; i < 3; ++i) needed[i] = tensors[i].defined() && context->needs_input_grad(i);
    variable_list found(3);
    if ((grad_loss.defined() && wants_reference(grad_loss)) ||
        (grad_lse.defined() && wants_reference(grad_lse))) {
      found = defined_gradients(tensors, options, needed, grad_loss, grad_lse);
    } else if (context->saved_data["one_pass"].toBool() &&
               may_scale(grad_loss, tensors.input.scalar_type())) {
      found = {saved[7], saved[8], saved[9]};
      scale(grad_loss, {&found[0], &found[1], &found[2]});
    } else {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      const at::Tensor &stats = saved[5], &divisor = saved[6];
      at::Tensor grad_rows;
      if (grad_loss.defined()) {
        grad_rows =
            (grad_loss.to(at::kDouble) / divisor).to(stats.options()).expand({tensors.rows()});
      }
      found = loss_pass(tensors, options, needed, grad_rows,
                        grad_lse.defined() ? grad_lse.resolve_neg() : grad_lse, {}, stats, {});
    }
    for (int i = 0; i < 3; ++i) grads[i] = std::move(found[i]);
    return grads;
  }

 private:
  static variable_list defined_gradients(const LossTensors& tensors, const LossOptions& options,
                                         const Needed& needed, const at::Tensor& grad_loss,
                                         const at::Tensor& grad_lse) {
    const at::Tensor target =
        tensors.target.is_floating_point() ? in_sums(tensors.target) : tensors.target;
    const at::Tensor weight = tensors.weight.defined() ? in_sums(tensors.weight) : tensors.weight;
    // One number, whose gradients are what both upstream gradients give.
    const auto definition = [&](const variable_list& own) {
      const at::Tensor logits = own[1].defined() ? whole_logits(own[0], own[1], own[2]) : own[0];
      const LossResult result = loss_definition(in_sums(logits), target, weight, options);
      at::Tensor total;
      if (grad_loss.defined()) total = (result.loss * grad_loss).sum();
      if (!grad_lse.defined()) return total;
      const at::Tensor second = (result.lse * grad_lse).sum();
      return total.defined() ? total + second : second;
    };
    const at::Tensor& like = grad_loss.defined() ? grad_loss : grad_lse;
    return reference_gradients(definition,
                               {tensors.input, tensors.linear_weight, tensors.linear_bias},
                               {needed[0], needed[1], needed[2]}, at::ones({}, like.options()));
  }
};

// Whether rows of these tensors have a kernel, and what is wrong none.
inline bool serves_rows(const LossTensors& tensors, const LossOptions& options) {
  const auto& [input, linear_weight, linear_bias, target, weight] = tensors;
  if (!serves(cross_entropy_extras_rows(), input) || input.dim() != 2 ||
      !serves_target(input, target, weight, options.ignore_index) || options.label_smoothing < 0 ||
      options.label_smoothing > 1) {
    return false;
  }
  const auto fits = [&](const at::Tensor& tensor, at::IntArrayRef sizes) {
    return !tensor.defined() || (is_plain(tensor, input) && tensor.sizes() == sizes &&
                                 tensor.scalar_type() == input.scalar_type());
  };
  if (linear_weight.defined()) {
    if (linear_weight.dim() != 2 || linear_weight.numel() == 0 ||
        !fits(linear_weight, {linear_weight.size(0), input.size(1)}) ||
        !fits(linear_bias, {linear_weight.size(0)})) {
      return false;
    }
  } else if (input.stride(1) != 1) {
    return false;
  }
  const int64_t rows = tensors.rows(), classes = tensors.classes();
  const at::ScalarType kind = target.scalar_type();
  const bool indices = kind == at::kLong || kind == at::kInt || kind == at::kByte;
  return classes >= (input.is_cpu() ? 16 : 1) && fits(weight, {classes}) &&
         (indices ? target.sizes() == at::IntArrayRef({rows}) : fits(target, {rows, classes}));
}

inline LossResult loss_by_rows(const LossTensors& tensors, const LossOptions& options) {
  if (!at::GradMode::is_enabled() ||
      !(tensors[0].requires_grad() || tensors[1].requires_grad() || tensors[2].requires_grad())) {
    return loss_forward(tensors, options, {}).result;
  }
  const variable_list outputs = LossExtrasFunction::apply(
      tensors.input, if_defined(tensors.linear_weight), if_defined(tensors.linear_bias),
      tensors.target, if_defined(tensors.weight), options);
  LossResult result{outputs[0], {}, {}};
  if (options.extras.return_lse()) result.lse = outputs[1];
  if (options.extras.return_argmax()) result.argmax = outputs.back();
  return result;
}

}  // namespace torchext::detail
