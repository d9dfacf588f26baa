// cross_entropy on the CPU: from tensors to one call of the kernels, and back.
#include "ops/cross_entropy.h"

#include "cpu/cross_entropy_call.h"

namespace torchext {
namespace {

using cpu::CrossEntropyArgs;
using simd::acc_type;

CrossEntropyShape checked(const Tensor& input, const Tensor& target,
                          const std::optional<Tensor>& weight, int64_t reduction,
                          int64_t ignore_index, double label_smoothing) {
  check_memory("cross_entropy", {{"input", &input}, {"target", &target}});
  if (weight) check_memory("cross_entropy", {{"weight", &*weight}});
  return check_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing);
}

// The loss in input's dtype: every position's, or their sum or mean.
template <typename scalar_t>
Tensor run_forward(const cpu::Call& call, cpu::Prepared<scalar_t>& prepared) {
  using acc_t = acc_type<scalar_t>;
  CrossEntropyArgs<scalar_t>& args = prepared.args;
  const int64_t positions = args.shape.positions();
  if (call.reduction == Reduction::kNone) {
    std::vector<int64_t> sizes = sizes_of(call.input);
    sizes.erase(sizes.begin() + (sizes.size() == 1 ? 0 : 1));
    const Tensor loss = empty_like(call.input, sizes);
    scalar_t* values = static_cast<scalar_t*>(loss.mutable_data_ptr());
    std::vector<acc_t> wide;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      args.losses = values;
    } else {
      wide.resize(positions);
      args.losses = wide.data();
    }
    prepared.run();
    for (size_t i = 0; i < wide.size(); ++i) values[i] = static_cast<scalar_t>(wide[i]);
    return loss;
  }
  const Tensor loss = empty_like(call.input, {});
  std::vector<double> block_losses(prepared.blocks());
  args.block_losses = block_losses.data();
  prepared.run();
  double total = 0;
  for (const double value : block_losses) total += value;
  if (call.reduction == Reduction::kMean) total = prepared.mean(total);
  *static_cast<scalar_t*>(loss.mutable_data_ptr()) = static_cast<scalar_t>(total);
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_cpu(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool save_gradient) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCHEXT_CHECK(!save_gradient || reduction != 0,
                 "cross_entropy: expected reduction mean or sum "
                 "with save_gradient, but got none");
  const cpu::Call call{
      "cross_entropy", input,          target, weight, static_cast<Reduction>(reduction),
      ignore_index,    label_smoothing};
  Tensor loss, stats, gradient;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    cpu::Prepared<scalar_t> prepared(call, shape);
    const auto acc_dtype =
        std::is_same_v<acc_t, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    if (save_gradient) {
      stats = empty_like(input, {2, 0}, acc_dtype);
      gradient = prepared.new_gradient();
    } else {
      stats = empty_like(input, {2, shape.positions()}, acc_dtype);
      gradient = empty_like(input, {0});
      prepared.args.stats = static_cast<acc_t*>(stats.mutable_data_ptr());
    }
    loss = run_forward(call, prepared);
  });
  return {loss, stats, gradient};
}

Tensor cross_entropy_forward_inplace_cpu(Tensor input, const Tensor& target,
                                         const std::optional<Tensor>& weight, int64_t reduction,
                                         int64_t ignore_index, double label_smoothing) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  TORCHEXT_CHECK(reduction != 0,
                 "cross_entropy_forward_: expected reduction mean or sum, but got "
                 "none");
  const cpu::Call call{
      "cross_entropy", input,          target, weight, static_cast<Reduction>(reduction),
      ignore_index,    label_smoothing};
  Tensor loss;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    cpu::Prepared<scalar_t> prepared(call, shape);
    TORCHEXT_CHECK(prepared.input.const_data_ptr() == input.const_data_ptr(),
                   "cross_entropy_forward_: expected input whose classes or positions are "
                   "contiguous, but got shape ",
                   shape_string(input), " with other strides");
    prepared.write_gradient_to(input);
    loss = run_forward(call, prepared);
  });
  return loss;
}

Tensor cross_entropy_backward_cpu(const Tensor& grad_output, const Tensor& input,
                                  const Tensor& target, const std::optional<Tensor>& weight,
                                  const Tensor& stats, int64_t reduction, int64_t ignore_index,
                                  double label_smoothing) {
  const auto shape = checked(input, target, weight, reduction, ignore_index, label_smoothing);
  const int64_t wanted = reduction == 0 ? shape.positions() : 1;
  TORCHEXT_CHECK(grad_output.numel() == wanted && grad_output.scalar_type() == input.scalar_type(),
                 "cross_entropy_backward: expected grad_output of ", wanted, " elements of dtype ",
                 dtype_string(input), ", but got shape ", shape_string(grad_output), " and dtype ",
                 dtype_string(grad_output));
  check_stats("cross_entropy_backward", stats, shape.positions(), input);
  const cpu::Call call{
      "cross_entropy", input,          target, weight, static_cast<Reduction>(reduction),
      ignore_index,    label_smoothing};
  const Tensor grad = as_contiguous(grad_output);
  Tensor gradient;
  dispatch_floating(input.scalar_type(), "cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    cpu::Prepared<scalar_t> prepared(call, shape);
    gradient = prepared.new_gradient();
    const auto* values = static_cast<const scalar_t*>(grad.const_data_ptr());
    std::vector<acc_type<scalar_t>> wide;
    if (reduction == 0) {
      prepared.args.grad_output = cpu::widened(values, wanted, wide);
    } else {
      prepared.args.gradient_scale *= static_cast<double>(*values);
    }
    prepared.args.stats =
        static_cast<acc_type<scalar_t>*>(const_cast<void*>(stats.const_data_ptr()));
    prepared.args.backward = true;
    prepared.run();
  });
  return gradient;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&torchext::cross_entropy_forward_cpu));
  m.impl("cross_entropy_forward_", TORCH_BOX(&torchext::cross_entropy_forward_inplace_cpu));
  m.impl("cross_entropy_backward", TORCH_BOX(&torchext::cross_entropy_backward_cpu));
}
