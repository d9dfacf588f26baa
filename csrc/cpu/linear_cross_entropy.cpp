// linear_cross_entropy on the CPU: a chunk of rows at a time, the logits in one reused buffer,
// where the cross_entropy kernels put the gradient in their place while they are warm; the products
// with it follow at once. Forward with gradients is three products, as many as the layers alone.
#include "cpu/linear_cross_entropy_products.h"

namespace torchext {
namespace {

using cpu::CrossEntropyArgs;
using cpu::head::Gradients;
using cpu::head::Problem;
using cpu::head::Products;
using simd::acc_type;

// A chunk has 384 rows, or more where those take less than 8 MiB: each chunk streams the gradient
// of the weight once. No more than 64 MiB, but for 256 rows. 2048 x 512 x 32000 floats on Zen 4:
// chunks of 256 rows 1.25 to 1.34 s, of 512 1.20; the bare products in such chunks 1.18 and 1.09,
// whole 1.06. On an Intel Xeon (family 6, model 207), whose library takes memory of its own, 677 ms
// and 151 MiB in chunks of 512, 685 ms and 136 MiB of 384, where torch's chunked op takes 138. No
// huge pages are asked for here: a buffer that is new in each call would wait for them.
constexpr int64_t kSmallBytes = int64_t{8} << 20;
constexpr int64_t kMostBytes = int64_t{64} << 20;
constexpr int64_t kEnoughRows = 384;
constexpr int64_t kMinRows = 256;

int64_t rows_per_chunk(int64_t rows, int64_t classes, int64_t element_size) {
  const auto fit = [&](int64_t bytes) {
    const int64_t rows = bytes / std::max<int64_t>(classes * element_size, 1);
    return rows / cpu::kPositionsPerBlock * cpu::kPositionsPerBlock;
  };
  const int64_t most = std::max(kMinRows, fit(kMostBytes));
  return std::clamp<int64_t>(rows, 1, std::min(most, std::max(kEnoughRows, fit(kSmallBytes))));
}

// Walks the chunks: makes the logits (or takes those of all rows that are `kept`), runs the kernels
// on them (`set` gives a chunk's arguments what the direction needs, from its first position on),
// and multiplies the gradient that they leave.
template <typename scalar_t, typename Set>
void for_each_chunk(Products<scalar_t>& products, const Gradients& gradients,
                    const LinearCrossEntropyShape& shape, cpu::Prepared<scalar_t>& prepared,
                    const Tensor& buffer, const Tensor* kept, const Set& set) {
  const int64_t chunk = buffer.size(0), columns = buffer.size(1), inner = shape.inner;
  for (int64_t first = 0; first < shape.rows; first += chunk) {
    const int64_t rows = std::min(chunk, shape.rows - first);
    CrossEntropyArgs<scalar_t> args = prepared.args;
    if (kept) {
      args.input = static_cast<const scalar_t*>(kept->const_data_ptr());
    } else {
      products.logits(buffer, first, rows);
    }
    if (prepared.transposed()) {
      args.input_strides = {0, 1, columns};
      args.shape.inner = rows;
    } else {
      args.input_strides.outer = columns;
      args.shape.outer = rows;
    }
    if (args.indices) {
      args.indices = static_cast<const char*>(args.indices) + first * inner * args.index_bytes;
    } else {
      args.probabilities += first * (prepared.transposed() ? args.probability_strides.inner
                                                           : args.probability_strides.outer);
    }
    if (gradients.any) {
      args.gradient = static_cast<scalar_t*>(buffer.mutable_data_ptr());
      args.gradient_strides = args.input_strides;
    }
    set(args, first * inner);
    cpu::run_blocks(args, prepared.walk);
    if (gradients.any) products.gradients(buffer, first, rows);
  }
}

// One chunk's logits, or those of all rows, and what the kernels need that is the same for every
// chunk. The rows of the tensor that `Prepared` sees are all the buffer's first: it looks at
// shapes, targets and weights.
template <typename scalar_t>
struct Workspace {
  Tensor buffer;
  Tensor view;
  cpu::Prepared<scalar_t> prepared;

  Workspace(const Problem& problem, int64_t columns, bool whole)
      : buffer(empty_like(problem.input,
                          {whole ? problem.shape.rows
                                 : rows_per_chunk(problem.shape.rows, columns, sizeof(scalar_t)),
                           columns})),
        view(view_of(buffer, problem.shape)),
        prepared({"linear_cross_entropy", view, problem.target, problem.weight, problem.reduction,
                  problem.ignore_index, problem.label_smoothing},
                 {problem.shape.rows, problem.shape.classes, problem.shape.inner,
                  problem.shape.probabilities}) {}

  static Tensor view_of(const Tensor& buffer, const LinearCrossEntropyShape& shape) {
    if (shape.inner == 1) return as_strided(buffer, {shape.rows, shape.classes}, {0, 1});
    return as_strided(buffer, {shape.rows, shape.classes, shape.inner}, {0, shape.inner, 1});
  }
};

struct Forward {
  Tensor loss, stats, logits;  // logits: of all rows where they are kept
};

// The loss of a call; `gradients` are written, of a mean or sum.
Forward run_forward(const Problem& problem, Gradients& gradients, bool keep) {
  const int64_t positions = problem.shape.positions();
  const bool none = problem.reduction == Reduction::kNone;
  std::vector<int64_t> loss_sizes;
  if (none) loss_sizes.push_back(problem.shape.rows);
  if (none && problem.inner_dimension) loss_sizes.push_back(problem.shape.inner);
  Forward done;
  dispatch_floating(problem.input.scalar_type(), "linear_cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    Products<scalar_t> products(problem, gradients);
    Workspace<scalar_t> work(problem, products.columns(), keep);
    // Of a narrow head nobody need write what is past the classes: kept, it is somebody's.
    if (keep && products.columns() > problem.columns()) torch::stable::zero_(work.buffer);
    const auto wide =
        std::is_same_v<acc_t, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    done = {empty_like(problem.input, loss_sizes, wide),
            empty_like(problem.input, {2, positions}, wide), work.buffer};
    acc_t* losses = static_cast<acc_t*>(done.loss.mutable_data_ptr());
    acc_t* stats_data = static_cast<acc_t*>(done.stats.mutable_data_ptr());
    std::vector<double> block_losses;
    double total = 0;
    for_each_chunk<scalar_t>(products, gradients, problem.shape, work.prepared, work.buffer,
                             nullptr, [&](CrossEntropyArgs<scalar_t>& args, int64_t first) {
                               // The chunk before is done: its blocks, in order.
                               for (const double value : block_losses) total += value;
                               block_losses.assign(cpu::block_count(args, work.prepared.walk), 0.0);
                               args.block_losses = block_losses.data();
                               if (none) args.losses = losses + first;
                               args.stats = stats_data + first;
                               args.stats_stride = positions;
                             });
    for (const double value : block_losses) total += value;
    if (problem.reduction == Reduction::kMean) total = work.prepared.mean(total);
    if (!none) *losses = static_cast<acc_t>(total);
  });
  return done;
}

// The gradients of a call, from the logits that are `kept`, or that are made again.
void run_backward(const Problem& problem, Gradients& gradients, const Tensor& grad_output,
                  const Tensor& stats, const Tensor* kept) {
  constexpr const char* kOp = "linear_cross_entropy_backward";
  const int64_t positions = problem.shape.positions();
  const bool none = problem.reduction == Reduction::kNone;
  const ScalarType sums = accumulation_dtype(problem.input.scalar_type());
  TORCHEXT_CHECK(grad_output.numel() == (none ? positions : 1) && grad_output.scalar_type() == sums,
                 kOp, ": expected grad_output of ", none ? positions : 1, " elements of dtype ",
                 torch::headeronly::toString(sums), ", but got shape ", shape_string(grad_output),
                 " and dtype ", dtype_string(grad_output));
  check_stats(kOp, stats, positions, problem.input);
  const Tensor grad = as_contiguous(grad_output);
  dispatch_floating(problem.input.scalar_type(), "linear_cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    Products<scalar_t> products(problem, gradients);
    Workspace<scalar_t> work(problem, products.columns(), kept != nullptr);
    if (kept) {
      TORCHEXT_CHECK(sizes_of(*kept) == sizes_of(work.buffer) && kept->is_contiguous() &&
                         kept->scalar_type() == problem.input.scalar_type() && kept->is_cpu(),
                     kOp, ": expected logits as forward kept them, of shape ",
                     shape_string(work.buffer), ", but got ", shape_string(*kept));
    }
    auto* stats_data = static_cast<acc_t*>(const_cast<void*>(stats.const_data_ptr()));
    const auto* upstream = static_cast<const acc_t*>(grad.const_data_ptr());
    for_each_chunk<scalar_t>(products, gradients, problem.shape, work.prepared, work.buffer, kept,
                             [&](CrossEntropyArgs<scalar_t>& args, int64_t first) {
                               args.backward = true;
                               args.stats = stats_data + first;
                               args.stats_stride = positions;
                               if (none) {
                                 args.grad_output = upstream + first;
                               } else {
                                 args.gradient_scale *= static_cast<double>(*upstream);
                               }
                             });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_cpu(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing, bool input_grad,
    bool linear_weight_grad, bool linear_bias_grad) {
  const Problem problem(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                        label_smoothing);
  Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  TORCHEXT_CHECK(reduction != 0 || !gradients.any,
                 "linear_cross_entropy: expected reduction mean or sum where gradients come with "
                 "the loss, but got none");
  const Forward done = run_forward(problem, gradients, false);
  return std::tuple_cat(std::tuple{done.loss, done.stats}, gradients.shaped_like(linear_weight));
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_kept_forward_cpu(
    const Tensor& input, const Tensor& linear_weight, const Tensor& target,
    const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
    int64_t reduction, int64_t ignore_index, double label_smoothing) {
  const Problem problem(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                        label_smoothing);
  Gradients gradients(problem, false, false, false);
  const Forward done = run_forward(problem, gradients, true);
  return {done.loss, done.stats, done.logits};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  const Problem problem(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                        label_smoothing);
  Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  run_backward(problem, gradients, grad_output, stats, nullptr);
  return gradients.shaped_like(linear_weight);
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_kept_backward_cpu(
    const Tensor& grad_output, const Tensor& logits, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  const Problem problem(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                        label_smoothing);
  Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  run_backward(problem, gradients, grad_output, stats, &logits);
  return gradients.shaped_like(linear_weight);
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&torchext::linear_cross_entropy_forward_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&torchext::linear_cross_entropy_backward_cpu));
  m.impl("linear_cross_entropy_kept_forward",
         TORCH_BOX(&torchext::linear_cross_entropy_kept_forward_cpu));
  m.impl("linear_cross_entropy_kept_backward",
         TORCH_BOX(&torchext::linear_cross_entropy_kept_backward_cpu));
}
