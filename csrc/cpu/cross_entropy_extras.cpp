// The rows of a loss with extras on the CPU: from tensors to one call of the kernels.
#include "ops/cross_entropy_extras.h"

#include <limits>

#include "cpu/cross_entropy_call.h"
#include "cpu/cross_entropy_extras_kernel.h"

namespace torchext {
namespace {

using cpu::CrossEntropyArgs;
using cpu::ExtrasArgs;
using simd::acc_type;

TORCHEXT_SIMD_FUNCTION(extras_rows, cpu::extras_range, ExtrasArgs)

template <typename T>
T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<T*>(tensor->mutable_data_ptr()) : nullptr;
}

// Class indices, class weights and smoothing.
template <typename acc_t>
void set_targets(CrossEntropyArgs<acc_t>& args, const Tensor& target, const acc_t* weight,
                 int64_t rows, int64_t classes, int64_t ignore_index, double label_smoothing) {
  args.shape = {rows, classes, 1, !is_class_index(target.scalar_type())};
  if (!args.shape.probabilities) {
    args.indices = target.const_data_ptr();
    args.index_bytes = static_cast<int>(target.element_size());
  }
  args.ignore_index = ignore_index;
  cpu::set_weight(args, weight, label_smoothing);
}

// Memory that the kernels read row by row; the tensor itself where its rows are contiguous.
Tensor with_rows(const Tensor& tensor) {
  return tensor.dim() < 2 || tensor.stride(1) != 1 ? as_contiguous(tensor) : tensor;
}

// What the kernels need of a call, and what they must find alive.
template <typename scalar_t>
struct PreparedExtras {
  using acc_t = acc_type<scalar_t>;
  Tensor target;
  std::vector<acc_t> weight;
  ExtrasArgs<scalar_t> args{};
  double mass = 0;  // a mean divides by it

  explicit PreparedExtras(const ExtrasRows& call) : target(with_rows(call.target)) {
    const int64_t rows = call.input.size(0), classes = call.input.size(1);
    set_targets<acc_t>(args.targets, target, cpu::copied_weight<scalar_t>(call.weight, weight),
                       rows, classes, call.ignore_index, call.label_smoothing);
    mass = cpu::target_mass("cross_entropy", args.targets);  // refuses what is no class
    if (!args.targets.indices) {
      const bool narrow = target.scalar_type() != accumulation_dtype(call.input.scalar_type());
      args.narrow_probabilities =
          narrow ? static_cast<const scalar_t*>(target.const_data_ptr()) : nullptr;
      args.targets.probabilities =
          narrow ? nullptr : static_cast<const acc_t*>(target.const_data_ptr());
      args.targets.probability_strides.outer = target.stride(0);
    }
    args.targets.stats = static_cast<acc_t*>(call.stats.mutable_data_ptr());
    args.targets.stats_stride = call.stats.stride(0);
    args.targets.losses = data_of<acc_t>(call.loss);
    args.targets.backward = !call.loss;
    args.input = static_cast<const scalar_t*>(call.input.const_data_ptr());
    args.input_stride = call.input.stride(0);
    args.z_loss = static_cast<acc_t>(call.z_loss);
    args.softcap = static_cast<acc_t>(call.softcap);
    args.logit_scale = static_cast<acc_t>(call.logit_scale);
    args.grad_loss = data_of<acc_t>(call.grad_loss);
    args.grad_lse = data_of<acc_t>(call.grad_lse);
    if (call.grad_loss) args.grad_loss_stride = call.grad_loss->stride(0);
    if (call.grad_lse) args.grad_lse_stride = call.grad_lse->stride(0);
    args.gradient = data_of<scalar_t>(call.gradient);
    if (call.gradient) {
      args.gradient_stride = call.gradient->stride(0);
      if (static_cast<const void*>(args.gradient) != args.input) cpu::advise(*call.gradient);
    }
    args.argmax = data_of<int64_t>(call.argmax);
  }

  void run() const {
    for_each_block(args.targets.shape.outer, cpu::kGrain / args.targets.shape.classes,
                   [&](int64_t begin, int64_t end) { extras_rows<scalar_t>(args, begin, end); });
  }
};

void cross_entropy_extras_rows_cpu(const Tensor& input, const Tensor& target,
                                   const std::optional<Tensor>& weight, int64_t ignore_index,
                                   double label_smoothing, double z_loss, double softcap,
                                   double logit_scale, const std::optional<Tensor>& grad_loss,
                                   const std::optional<Tensor>& grad_lse,
                                   const std::optional<Tensor>& gradient,
                                   const std::optional<Tensor>& loss, const Tensor& stats,
                                   const std::optional<Tensor>& argmax) {
  const char* op = "cross_entropy_extras_rows";
  check_memory(op, {{"input", &input}, {"target", &target}, {"stats", &stats}});
  for (const auto* tensor : {&weight, &grad_loss, &grad_lse, &gradient, &loss, &argmax}) {
    if (*tensor) check_memory(op, {{"what goes with it", &**tensor}});
  }
  const ExtrasRows call{input,    target,   weight,      ignore_index, label_smoothing,
                        z_loss,   softcap,  logit_scale, stats,        grad_loss,
                        grad_lse, gradient, loss,        argmax};
  check_extras_rows(call, kFewestClassesOfExtras);
  dispatch_floating(input.scalar_type(), op,
                    [&](auto zero) { PreparedExtras<decltype(zero)>(call).run(); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cross_entropy_extras_forward_cpu(
    const Tensor& input, const Tensor& target, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
    double logit_scale, bool ignored_mean_zero, bool return_lse, bool return_argmax,
    bool save_gradient) {
  const char* op = "cross_entropy_extras_forward";
  check_memory(op, {{"input", &input}, {"target", &target}});
  if (weight) check_memory(op, {{"weight", &*weight}});
  TORCHEXT_CHECK(
      input.dim() == 2 && reduction >= 0 && reduction <= 2 && (reduction != 0 || !save_gradient),
      op, ": expected logits (N, C), and reduction mean or sum with save_gradient");
  const int64_t rows = input.size(0);
  const Reduction how = static_cast<Reduction>(reduction);
  const int32_t sums = accumulation_dtype(input.scalar_type()) == ScalarType::Double
                           ? aoti_torch_dtype_float64()
                           : aoti_torch_dtype_float32();
  const Tensor stats = empty_like(input, {2, rows}, sums);
  const Tensor losses = empty_like(input, {rows}, sums);
  const Tensor lse = empty_like(input, {return_lse ? rows : 0}, sums);
  const Tensor argmax = empty_like(input, {return_argmax ? rows : 0}, aoti_torch_dtype_int64());
  const Tensor mass = empty_like(input, {}, aoti_torch_dtype_float64());
  const Tensor gradient =
      save_gradient ? empty_like(input, sizes_of(input)) : empty_like(input, {0});
  ExtrasRows call{
      input, target, weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale,
      stats, {},     {},     {},           losses,          {}};
  if (save_gradient) call.gradient = gradient;
  if (return_argmax) call.argmax = argmax;
  check_extras_rows(call, kFewestClassesOfExtras);
  Tensor loss = losses;
  dispatch_floating(input.scalar_type(), op, [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    PreparedExtras<scalar_t> prepared(call);
    double& divisor = *static_cast<double*>(mass.mutable_data_ptr());
    divisor = how == Reduction::kMean ? prepared.mass : 1.0;
    // As in torchext/ops/extras.py, mean_or.
    if (divisor == 0) {
      using Limits = std::numeric_limits<double>;
      divisor = ignored_mean_zero ? Limits::infinity() : Limits::quiet_NaN();
    }
    const acc_t share = static_cast<acc_t>(1.0 / divisor);
    if (save_gradient) prepared.args.grad_loss = &share;  // every row's: its stride is 0
    prepared.run();
    const acc_t* of_rows = prepared.args.targets.losses;
    if (how != Reduction::kNone) {
      double total = 0;
      for (int64_t p = 0; p < rows; ++p) total += of_rows[p];
      loss = empty_like(input, {}, sums);
      *static_cast<acc_t*>(loss.mutable_data_ptr()) = static_cast<acc_t>(total / divisor);
    }
    acc_t* values = static_cast<acc_t*>(lse.mutable_data_ptr());
    const acc_t* maxima = prepared.args.targets.stats;
    for (int64_t p = 0; p < lse.numel(); ++p) {
      values[p] = cpu::lse_of(maxima[p], maxima[rows + p]);
    }
  });
  return {loss, lse, argmax, stats, mass, gradient};
}

Tensor cross_entropy_mass_cpu(const Tensor& target, const std::optional<Tensor>& weight,
                              int64_t classes, int64_t ignore_index) {
  const char* op = "cross_entropy_mass";
  check_memory(op, {{"target", &target}});
  TORCHEXT_CHECK(is_class_index(target.scalar_type()), op,
                 ": expected target of class indices, but got ", dtype_string(target));
  if (weight) {
    check_memory(op, {{"weight", &*weight}});
    TORCHEXT_CHECK(weight->dim() == 1 && weight->size(0) == classes, op,
                   ": expected weight of shape [", classes, "], but got ", shape_string(*weight));
  }
  const Tensor indices = as_contiguous(target);
  const Tensor mass = empty_like(target, {}, aoti_torch_dtype_float64());
  const auto run = [&](auto zero) {
    using acc_t = acc_type<decltype(zero)>;
    std::vector<acc_t> copies;
    const acc_t* values = cpu::copied_weight<decltype(zero)>(weight, copies);
    CrossEntropyArgs<acc_t> args{};
    set_targets<acc_t>(args, indices, values, indices.numel(), classes, ignore_index, 0.0);
    *static_cast<double*>(mass.mutable_data_ptr()) = cpu::target_mass("cross_entropy", args);
  };
  if (weight) {
    dispatch_floating(weight->scalar_type(), op, run);
  } else {
    run(float{});
  }
  return mass;
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("cross_entropy_extras_rows", TORCH_BOX(&torchext::cross_entropy_extras_rows_cpu));
  m.impl("cross_entropy_extras_forward", TORCH_BOX(&torchext::cross_entropy_extras_forward_cpu));
  m.impl("cross_entropy_mass", TORCH_BOX(&torchext::cross_entropy_mass_cpu));
}
