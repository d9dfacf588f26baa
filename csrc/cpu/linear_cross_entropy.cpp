// linear_cross_entropy on the CPU: a chunk of rows at a time, the logits in one reused buffer,
// where the cross_entropy kernels put the gradient in their place while they are warm; the products
// with it follow at once. Forward with gradients is three products, as many as the layers alone.
#include "ops/linear_cross_entropy.h"

#include "cpu/cross_entropy_call.h"
#include "cpu/gemm.h"
#include "cpu/narrow_head.h"
#include "cpu/wide_sum.h"

namespace torchext {
namespace {

using cpu::CrossEntropyArgs;
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
constexpr int64_t kColumnsPerBlock = 512;
constexpr int64_t kRowsPerSum = 64;
// Multiplications of a product up to which bfloat16 is our own kernel's where that multiplies
// pairs: forward and backward of 100 x 100 x 32 takes 0.58 of eager's time so, 1.10 by oneDNN, of
// 256 x 512 x 64 0.72 and 1.01, of 512 x 512 x 1000 0.95 and 0.97 (2 cores of Zen 4). 1024 x 512
// x 32000 takes 280 ms and 281, another day 316 and 269 to 306.
constexpr int64_t kMostPairs = int64_t{1} << 29;

int64_t rows_per_chunk(int64_t rows, int64_t classes, int64_t element_size) {
  const auto fit = [&](int64_t bytes) {
    const int64_t rows = bytes / std::max<int64_t>(classes * element_size, 1);
    return rows / cpu::kPositionsPerBlock * cpu::kPositionsPerBlock;
  };
  const int64_t most = std::max(kMinRows, fit(kMostBytes));
  return std::clamp<int64_t>(rows, 1, std::min(most, std::max(kEnoughRows, fit(kSmallBytes))));
}

// sums[c] += the sum of column c: of kRowsPerSum rows in order, and of those, so that no thread
// count changes it, and a million rows of one sign lose no digits.
template <typename scalar_t>
void add_column_sums(const scalar_t* data, int64_t rows, int64_t columns, double* sums) {
  const int64_t blocks = (columns + kColumnsPerBlock - 1) / kColumnsPerBlock;
  for_each_block(blocks, cpu::kGrain / (rows * kColumnsPerBlock + 1),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t block = begin; block < end; ++block) {
                     const int64_t first = block * kColumnsPerBlock;
                     const int64_t count = std::min(columns - first, kColumnsPerBlock);
                     for (int64_t row = 0; row < rows; row += kRowsPerSum) {
                       acc_type<scalar_t> part[kColumnsPerBlock] = {};
                       const int64_t last = std::min(rows, row + kRowsPerSum);
                       for (int64_t r = row; r < last; ++r) {
                         const scalar_t* values = data + r * columns + first;
                         for (int64_t c = 0; c < count; ++c)
                           part[c] += static_cast<acc_type<scalar_t>>(values[c]);
                       }
                       for (int64_t c = 0; c < count; ++c) sums[first + c] += part[c];
                     }
                   }
                 });
}

// A call, checked. The logits of a linear_weight (C, D, H) are those of (C * D, H), in an order
// that the cross_entropy kernels read as (N, C, D).
struct Problem {
  Tensor input;
  Tensor linear_weight;  // (C * D, H)
  Tensor target;
  std::optional<Tensor> linear_bias;  // (C * D)
  std::optional<Tensor> weight;
  LinearCrossEntropyShape shape;
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;

  Problem(const Tensor& input, const Tensor& linear_weight, const Tensor& target,
          const std::optional<Tensor>& linear_bias, const std::optional<Tensor>& weight,
          int64_t reduction, int64_t ignore_index, double label_smoothing)
      : input(input),
        linear_weight(linear_weight),
        target(target),
        linear_bias(linear_bias),
        weight(weight),
        shape(check_linear_cross_entropy(input, linear_weight, target, linear_bias, weight,
                                         reduction, label_smoothing, true)),
        reduction(static_cast<Reduction>(reduction)),
        ignore_index(ignore_index),
        label_smoothing(label_smoothing) {
    check_memory("linear_cross_entropy",
                 {{"input", &input}, {"linear_weight", &linear_weight}, {"target", &target}});
    if (linear_bias) check_memory("linear_cross_entropy", {{"linear_bias", &*linear_bias}});
    if (weight) check_memory("linear_cross_entropy", {{"weight", &*weight}});
    if (linear_weight.dim() == 2) return;
    this->linear_weight =
        as_strided(as_contiguous(linear_weight), {columns(), shape.features}, {shape.features, 1});
    if (linear_bias) this->linear_bias = as_strided(as_contiguous(*linear_bias), {columns()}, {1});
  }

  int64_t columns() const { return shape.classes * shape.inner; }  // of the logits
};

// The gradients that are wanted; no elements where one is not.
struct Gradients {
  Tensor input, linear_weight, linear_bias;
  bool any = false;

  Gradients(const Problem& problem, bool input_grad, bool linear_weight_grad, bool bias_grad)
      : input(empty(problem.input, input_grad, problem.shape.rows)),
        linear_weight(empty(problem.linear_weight, linear_weight_grad, problem.shape.rows)),
        linear_bias(empty_like(problem.input, {bias_grad ? problem.columns() : 0})),
        any(input_grad || linear_weight_grad || bias_grad) {
    if (bias_grad && problem.shape.rows == 0) torch::stable::zero_(linear_bias);
  }

  // The gradients with the shape of linear_weight and linear_bias, of which Problem has two and one
  // dimensions.
  std::tuple<Tensor, Tensor, Tensor> shaped_like(const Tensor& weight) const {
    if (weight.dim() == 2) return {input, linear_weight, linear_bias};
    std::vector<int64_t> sizes = sizes_of(weight);
    const auto shaped = [](const Tensor& gradient, const std::vector<int64_t>& to) {
      return gradient.numel() == 0 ? gradient : as_strided(gradient, to, contiguous_strides(to));
    };
    const Tensor first = shaped(linear_weight, sizes);
    sizes.pop_back();
    return {input, first, shaped(linear_bias, sizes)};
  }

  static Tensor empty(const Tensor& like, bool wanted, int64_t rows) {
    if (!wanted) return empty_like(like, {0});
    Tensor gradient = empty_like(like, sizes_of(like));
    cpu::advise(gradient);
    if (rows == 0) torch::stable::zero_(gradient);  // no chunk will write it
    return gradient;
  }
};

// The products of one call: the library's, or for few classes our own. The logits stand in rows of
// `columns` elements.
template <typename scalar_t>
class Products {
 public:
  using acc_t = acc_type<scalar_t>;
  using Head = cpu::NarrowHead<scalar_t>;

  Products(const Problem& problem, Gradients& gradients)
      : problem_(problem), gradients_(gradients) {
    if (problem.shape.inner == 1 && Head::serves(problem.input, problem.linear_weight)) {
      head_.emplace(problem.input, problem.linear_weight, problem.linear_bias);
    } else {
      bias_sums_.resize(gradients.linear_bias.numel());
    }
    also_.pairs = problem.shape.rows * problem.shape.features * problem.columns() <= kMostPairs;
  }

  int64_t columns() const { return head_ ? cpu::kHeadClasses : problem_.columns(); }

  // The logits of rows [first, first + rows) into the buffer's first rows.
  void logits(const Tensor& buffer, int64_t first, int64_t rows) const {
    if (head_) return head_->forward(data_of(buffer), first, rows);
    const Tensor logits = cpu::rows_of(buffer, 0, rows);
    const Tensor x = cpu::rows_of(problem_.input, first, rows);
    cpu::Also also = also_;
    also.bias = problem_.linear_bias ? &*problem_.linear_bias : nullptr;
    cpu::multiply<scalar_t>(logits, x, cpu::transposed(problem_.linear_weight), also);
  }

  // What these rows give the gradients, from the logits' gradient in the buffer.
  void gradients(const Tensor& buffer, int64_t first, int64_t rows) {
    if (head_) {
      const auto wanted = [](const Tensor& gradient) {
        return gradient.numel() > 0 ? data_of(gradient) : nullptr;
      };
      return head_->backward(data_of(buffer), first, rows, wanted(gradients_.input),
                             wanted(gradients_.linear_weight), wanted(gradients_.linear_bias));
    }
    const Tensor logits = cpu::rows_of(buffer, 0, rows);
    if (gradients_.input.numel() > 0) {
      cpu::multiply<scalar_t>(cpu::rows_of(gradients_.input, first, rows), logits,
                              problem_.linear_weight, also_);
    }
    if (const Tensor& gradient = gradients_.linear_weight; gradient.numel() > 0) {
      constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
      cpu::Also also = also_;
      also.accumulate = !kNarrow && first > 0;
      cpu::multiply<scalar_t>(gradient, cpu::transposed(logits),
                              cpu::rows_of(problem_.input, first, rows), also);
      if constexpr (kNarrow) {
        weight_sum_.add(gradient, first == 0, first + rows == problem_.shape.rows);
      }
    }
    if (bias_sums_.empty()) return;
    add_column_sums<scalar_t>(data_of(logits), rows, problem_.columns(), bias_sums_.data());
    if (first + rows == problem_.shape.rows) {
      scalar_t* bias = data_of(gradients_.linear_bias);
      for (size_t c = 0; c < bias_sums_.size(); ++c) bias[c] = static_cast<scalar_t>(bias_sums_[c]);
    }
  }

 private:
  static scalar_t* data_of(const Tensor& tensor) {
    return static_cast<scalar_t*>(tensor.mutable_data_ptr());
  }

  const Problem& problem_;
  Gradients& gradients_;
  std::vector<double> bias_sums_;
  cpu::WideSum<scalar_t> weight_sum_;  // of narrow chunks
  std::optional<Head> head_;
  cpu::Also also_;
};

// Walks the chunks: makes the logits, runs the kernels on them (`set` gives a chunk's arguments
// what the direction needs, from its first position on), and multiplies the gradient that they
// leave.
template <typename scalar_t, typename Set>
void for_each_chunk(Products<scalar_t>& products, const Gradients& gradients,
                    const LinearCrossEntropyShape& shape, cpu::Prepared<scalar_t>& prepared,
                    const Tensor& buffer, const Set& set) {
  const int64_t chunk = buffer.size(0), columns = buffer.size(1), inner = shape.inner;
  for (int64_t first = 0; first < shape.rows; first += chunk) {
    const int64_t rows = std::min(chunk, shape.rows - first);
    products.logits(buffer, first, rows);
    CrossEntropyArgs<scalar_t> args = prepared.args;
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

// One chunk's logits, and what the kernels need that is the same for every chunk. The rows of the
// tensor that `Prepared` sees are all the buffer's first: it looks at shapes, targets and weights.
template <typename scalar_t>
struct Workspace {
  Tensor buffer;
  Tensor view;
  cpu::Prepared<scalar_t> prepared;

  Workspace(const Problem& problem, int64_t columns)
      : buffer(
            empty_like(problem.input,
                       {rows_per_chunk(problem.shape.rows, columns, sizeof(scalar_t)), columns})),
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
  const int64_t positions = problem.shape.positions();
  const bool none = problem.reduction == Reduction::kNone;
  std::vector<int64_t> loss_sizes;
  if (none) loss_sizes.push_back(problem.shape.rows);
  if (none && linear_weight.dim() == 3) loss_sizes.push_back(problem.shape.inner);
  Tensor loss, stats;
  dispatch_floating(input.scalar_type(), "linear_cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    Products<scalar_t> products(problem, gradients);
    Workspace<scalar_t> work(problem, products.columns());
    const auto wide =
        std::is_same_v<acc_t, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
    loss = empty_like(input, loss_sizes, wide);
    stats = empty_like(input, {2, positions}, wide);
    acc_t* losses = static_cast<acc_t*>(loss.mutable_data_ptr());
    acc_t* stats_data = static_cast<acc_t*>(stats.mutable_data_ptr());
    std::vector<double> block_losses;
    double total = 0;
    for_each_chunk<scalar_t>(products, gradients, problem.shape, work.prepared, work.buffer,
                             [&](CrossEntropyArgs<scalar_t>& args, int64_t first) {
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
  return std::tuple_cat(std::tuple{loss, stats}, gradients.shaped_like(linear_weight));
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad) {
  const Problem problem(input, linear_weight, target, linear_bias, weight, reduction, ignore_index,
                        label_smoothing);
  const int64_t positions = problem.shape.positions();
  const bool none = problem.reduction == Reduction::kNone;
  const ScalarType sums = accumulation_dtype(input.scalar_type());
  TORCHEXT_CHECK(grad_output.numel() == (none ? positions : 1) && grad_output.scalar_type() == sums,
                 "linear_cross_entropy_backward: expected grad_output of ", none ? positions : 1,
                 " elements of dtype ", torch::headeronly::toString(sums), ", but got shape ",
                 shape_string(grad_output), " and dtype ", dtype_string(grad_output));
  check_stats("linear_cross_entropy_backward", stats, positions, input);
  Gradients gradients(problem, input_grad, linear_weight_grad, linear_bias_grad);
  const Tensor grad = as_contiguous(grad_output);
  dispatch_floating(input.scalar_type(), "linear_cross_entropy", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    Products<scalar_t> products(problem, gradients);
    Workspace<scalar_t> work(problem, products.columns());
    auto* stats_data = static_cast<acc_t*>(const_cast<void*>(stats.const_data_ptr()));
    const auto* upstream = static_cast<const acc_t*>(grad.const_data_ptr());
    for_each_chunk<scalar_t>(products, gradients, problem.shape, work.prepared, work.buffer,
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
  return gradients.shaped_like(linear_weight);
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("linear_cross_entropy_forward", TORCH_BOX(&torchext::linear_cross_entropy_forward_cpu));
  m.impl("linear_cross_entropy_backward", TORCH_BOX(&torchext::linear_cross_entropy_backward_cpu));
}
