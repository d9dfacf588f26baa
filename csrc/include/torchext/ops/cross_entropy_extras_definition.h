// The losses with what the stock ones do not have, values and gradients.
//
//   z = softcap tanh(logit_scale x / softcap)        the logits x, scaled, then capped
//   loss = cross_entropy(z, target) + z_loss lse^2   lse = log sum exp z; nothing where ignored
//
// Rows of logits go through one kernel, those of a linear transformation a chunk at a time;
// anything else is made of torch's ops.
//
// Siblings: torchext/ops/extras*.py, csrc/ops/cross_entropy_extras.cpp, tests/cpp/test_extras.cpp.
#pragma once

#include <torch/arg.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include <torchext/ops/linear_cross_entropy.h>

namespace torchext {

// torchext.cross_entropy's keyword-only arguments in Python.
struct LossExtras {
  TORCH_ARG(double, z_loss) = 0.0;
  TORCH_ARG(std::optional<double>, softcap);
  TORCH_ARG(double, logit_scale) = 1.0;
  TORCH_ARG(bool, inplace_backward) = false;  // of cross_entropy_extras alone
  TORCH_ARG(bool, return_lse) = false;
  TORCH_ARG(bool, return_argmax) = false;
  TORCH_ARG(std::string, ignored_mean) = "nan";  // what a mean over no target gives: or "zero"

 public:
  // Whether the loss is another, or has others beside it.
  bool change_loss() const {
    return z_loss_ != 0 || softcap_ || logit_scale_ != 1 || return_lse_ || return_argmax_ ||
           ignored_mean_ != "nan";
  }
};

// What a call returns; undefined what it was not asked for.
struct LossResult {
  at::Tensor loss{};    // as without extras
  at::Tensor lse{};     // of each position, float32 or wider, differentiable
  at::Tensor argmax{};  // of each position, int64
};

namespace detail {

// What a loss is called with beside its tensors.
struct LossOptions {
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing;
  LossExtras extras;

  bool zero_mean() const { return extras.ignored_mean() == "zero"; }
};

inline void check_extras(const char* op, const LossExtras& extras) {
  TORCH_CHECK_VALUE(
      !extras.softcap() || (*extras.softcap() > 0 && std::isfinite(*extras.softcap())), op,
      ": expected softcap above 0, finite, or none, but got ", *extras.softcap());
  TORCH_CHECK_VALUE(extras.ignored_mean() == "nan" || extras.ignored_mean() == "zero", op,
                    ": expected ignored_mean to be nan or zero, but got ", extras.ignored_mean());
}

// A divisor of zero is infinity for `ignored_mean("zero")`: the mean is 0, and so is its gradient.
// Else it is NaN, as stock's is: there the loss of the targets is 0/0, whatever label smoothing
// adds.
inline at::Tensor without_zero(const at::Tensor& mass, const LossOptions& options) {
  return mass.masked_fill(
      mass.eq(0), options.zero_mean() ? std::numeric_limits<double>::infinity() : std::nan(""));
}

// What a mean divides by, in float64, made of torch's ops.
inline at::Tensor loss_mass(const at::Tensor& target, const at::Tensor& weight, int64_t positions,
                            const LossOptions& options) {
  if (target.is_floating_point()) {
    const auto wide = target.options().dtype(at::kDouble);
    return without_zero(at::full({}, static_cast<double>(positions), wide), options);
  }
  const at::Tensor index = target.to(at::kLong);
  const at::Tensor kept = index.ne(options.ignore_index);
  at::Tensor chosen = kept;
  if (weight.defined()) {
    // A class that does not exist makes the loss NaN, or is refused by it.
    const at::Tensor safe = index.masked_fill(kept.logical_not(), 0).clamp(0, weight.size(0) - 1);
    chosen = weight.index({safe}).masked_fill(kept.logical_not(), 0);
  }
  return without_zero(chosen.sum(at::kDouble), options);
}

// By torch's ops on the logits (C), (N, C) or (N, C, d1, ...).
inline LossResult loss_definition(const at::Tensor& input, const at::Tensor& target,
                                  const at::Tensor& weight, const LossOptions& options) {
  const LossExtras& extras = options.extras;
  at::Tensor z = input;
  if (extras.logit_scale() != 1) z = z * extras.logit_scale();
  if (extras.softcap()) z = *extras.softcap() * at::tanh(z / *extras.softcap());
  const int64_t class_dim = z.dim() <= 1 ? 0 : 1;
  LossResult result;
  const auto stock = [&](int64_t reduction) {
    return cross_entropy_reference(z, target, weight, reduction, options.ignore_index,
                                   options.label_smoothing);
  };
  const bool own_mean = options.reduction == at::Reduction::Mean && options.zero_mean();
  if (extras.z_loss() == 0 && !own_mean) {
    result.loss = stock(options.reduction);
  } else {
    at::Tensor rows = stock(at::Reduction::None);
    const at::ScalarType dtype = rows.scalar_type();
    if (extras.z_loss() != 0) {
      result.lse = in_sums(z).logsumexp(class_dim);
      at::Tensor squares = extras.z_loss() * result.lse.square();
      if (!target.is_floating_point()) {
        const at::Tensor ignored = target.to(at::kLong).eq(options.ignore_index);
        squares = squares.masked_fill(ignored.reshape(squares.sizes()), 0);
      }
      rows = in_sums(rows) + squares.reshape(rows.sizes());
    }
    if (options.reduction != at::Reduction::None) rows = in_sums(rows).sum();
    if (options.reduction == at::Reduction::Mean) {
      const int64_t classes = std::max<int64_t>(z.dim() > 0 ? z.size(class_dim) : 1, 1);
      rows = rows / loss_mass(target, weight, target.numel() / classes, options);
    }
    result.loss = rows.to(dtype);
  }
  if (extras.return_lse() && !result.lse.defined()) result.lse = in_sums(z).logsumexp(class_dim);
  if (!extras.return_lse()) result.lse = at::Tensor();
  if (extras.return_argmax()) result.argmax = z.argmax(class_dim);
  return result;
}

}  // namespace detail
}  // namespace torchext
