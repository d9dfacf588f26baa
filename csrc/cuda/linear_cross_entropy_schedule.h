// linear_cross_entropy on CUDA: what is made when, and where it lies. The products are the
// library's; the loss is cross_entropy's kernels, which put the gradient in the logits' place.
// Nothing waits for the device. There are three ways; N rows, H features, C classes, b bytes an
// element.
//
// By rows: a chunk's logits, their loss and gradient, and the products with it. What is small or
// has no gradient of the weight goes so, in `chunk_bytes`. Over several chunks the gradient of the
// weight is summed apart, in float32 (4 C H bytes; 16 C H moved for each chunk), and lends its own
// memory to the chunks.
//
// In pieces, where the gradient of the weight is wanted and a row fits a cluster of blocks: the
// logits' gradient is kept for all rows, so that each row of the weight's gradient is one product,
// rounded once and written once. About half of it lies in the weight's gradient itself
// (linear_cross_entropy_plan.cpp), the rest in `piece_bytes` at most. Only the input's gradient is
// a sum of products, one for each of at most four pieces, in float32, some rows at a time.
//   N = 8192, H = 4096, C = 128256, bfloat16, beside inputs and gradients: 2.101 GB of logits,
//   1.121 GB of them outside the weight's gradient; 0.034 GB for the sum: 1.155 GB.
//   At 790 TFLOP/s and 4.3 TB/s: products 32.7 ms; the loss, 2 N C b, 0.98 ms; the sum, 50 N H,
//   0.39 ms, or next to nothing where 0.034 GB stay in the cache: 33.7 to 34.1 ms. The whole logits
//   in 2.1 GB would take 33.7 ms, two chunks of rows 36.9 ms and 2.2 GB; for 33.5 ms the products
//   themselves must come out at 795 TFLOP/s.
//
// By classes, where the stats are there (backward of "none", and of what came without gradients):
// the logits once more, all rows of some classes in `chunk_bytes`, so that each row of the weight's
// gradient is one product here, too; 4 N H bytes for the input's sum. The least memory, 0.69 GB
// there; with the forward four products, and N C b more for the loss: 11 ms more than in pieces.
#pragma once

#include "cuda/linear_cross_entropy_products.h"

namespace torchext::cuda {

constexpr int64_t kLeastRows = 256, kLeastClasses = 256;

template <typename Integer>
const void* advanced(const void* data, Integer bytes) {
  return data ? static_cast<const char*>(data) + bytes : nullptr;
}
template <typename Integer>
void* advanced(void* data, Integer bytes) {
  return data ? static_cast<char*>(data) + bytes : nullptr;
}

class LinearCrossEntropyCall {
 public:
  CrossEntropyCall loss;

  LinearCrossEntropyCall(const LinearCrossEntropyProblem& problem,
                         const LinearCrossEntropyGradients& gradients, int64_t ignore_index,
                         double label_smoothing)
      : loss(problem.input, Walk::kRows, problem.target, problem.weight,
             {problem.shape.rows, problem.shape.classes, 1, problem.shape.probabilities},
             ignore_index, label_smoothing),
        problem_(problem),
        gradients_(gradients),
        bytes_(item_bytes(loss.dtype())) {}

  void forward() {
    const int64_t bytes = problem_.shape.rows * row_bytes();
    if (gradients_.linear_weight.numel() > 0 && bytes > problem_.limits.whole_bytes) {
      const RowPlan rows = loss.plan();
      const PiecePlan pieces =
          plan_pieces(problem_.shape.rows, problem_.shape.features, problem_.shape.classes);
      const int64_t outside = problem_.shape.rows * up(pieces.outside, kAlign) * bytes_;
      if (may_have_pieces(rows) && outside <= problem_.limits.piece_bytes) {
        return in_pieces(rows, pieces);
      }
    }
    by_rows(false);
  }

  void backward() {
    const int64_t bytes = problem_.shape.rows * row_bytes();
    if (gradients_.linear_weight.numel() > 0 && bytes > problem_.limits.whole_bytes) {
      by_classes();
    } else {
      by_rows(true);
    }
  }

 private:
  int64_t row_bytes() const { return up(problem_.shape.classes, kAlign) * bytes_; }

  void by_rows(bool from_stats) {
    const int64_t rows = problem_.shape.rows, classes = problem_.shape.classes;
    if (rows == 0) return;
    const int64_t stride = up(classes, kAlign);
    int64_t chunk = rows;
    if (rows * row_bytes() > problem_.limits.whole_bytes) {
      chunk = std::max(down(problem_.limits.chunk_bytes / row_bytes(), 128), kLeastRows);
    }
    const bool lent = chunk < rows && gradients_.linear_weight.numel() / stride >= chunk &&
                      is_narrow(loss.dtype());
    if (lent) chunk = down(gradients_.linear_weight.numel() / stride, 128);
    // Chunks of nearly one size: a short last one would be no faster than a long one.
    chunk = std::min(rows, up(ceil_div(rows, ceil_div(rows, chunk)), 128));
    const int64_t chunks = ceil_div(rows, chunk);
    const WeightSum weight_sum(problem_, gradients_.linear_weight, loss.dtype(), loss.stream(),
                               chunks);
    const InputSum input_sum(problem_, gradients_.input, loss.dtype(), loss.stream(), chunk, 1);
    const BiasSum bias_sum(
        gradients_.linear_bias, loss.dtype(), loss.stream(),
        (chunks - 1) * column_sum_blocks(chunk) + column_sum_blocks(rows - (chunks - 1) * chunk));
    const Tensor buffer = lent && weight_sum.sums_apart()
                              ? gradients_.linear_weight
                              : empty_like(problem_.input, {chunk, stride});
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = i * chunk;
      const int64_t count = std::min(chunk, rows - first);
      const Tensor logits = as_strided(buffer, {count, classes}, {stride, 1});
      const Tensor input = rows_of(problem_.input, first, count);
      logits_into(logits, problem_, input, 0);
      const CrossEntropyArgs all = loss.args;
      to_rows(logits, first);
      from_stats ? loss.backward() : loss.forward();
      loss.args = all;
      if (!gradients_.any) continue;
      input_sum.add(0, logits, 0, first, 0);
      weight_sum.add(i, logits, input);
      bias_sum.add(logits, i * column_sum_blocks(chunk), 0);
    }
    weight_sum.finish();
    bias_sum.finish();
  }

  // The arguments of some rows, whose logits are there.
  void to_rows(const Tensor& logits, int64_t first) {
    CrossEntropyArgs& args = loss.args;
    const int64_t acc_bytes = loss.dtype() == Dtype::kDouble ? 8 : 4;
    args.positions = logits.size(0);
    to_logits(logits);
    args.indices = advanced(args.indices, first * args.index_bytes);
    args.probabilities =
        advanced(args.probabilities, first * args.probability_strides.outer * bytes_);
    args.grad_output = advanced(args.grad_output, first * args.grad_output_stride * acc_bytes);
    args.losses = advanced(args.losses, first * acc_bytes);
    args.stats = advanced(args.stats, first * acc_bytes);
  }

  void to_logits(const Tensor& logits) {
    CrossEntropyArgs& args = loss.args;
    args.input = logits.const_data_ptr();
    args.input_strides = {logits.stride(0), 1, 1};
    if (!gradients_.any) return;
    args.gradient = logits.mutable_data_ptr();
    args.gradient_strides = args.input_strides;
  }

  void in_pieces(const RowPlan& plan, const PiecePlan& pieces) {
    const int64_t rows = problem_.shape.rows, features = problem_.shape.features,
                  classes = problem_.shape.classes;
    const int64_t count = static_cast<int64_t>(pieces.begin.size()) - 1;
    Tensor outside;
    std::vector<Tensor> logits;
    Pieces places{};
    places.count = static_cast<int>(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = pieces.begin[i], width = pieces.begin[i + 1] - begin;
      if (begin < classes - pieces.outside) {
        logits.push_back(as_strided(gradients_.linear_weight, {rows, width}, {width, 1},
                                    piece_offset(pieces, rows, features, i)));
      } else {
        const int64_t stride = up(width, kAlign);
        outside = empty_like(problem_.input, {rows, stride});
        logits.push_back(as_strided(outside, {rows, width}, {stride, 1}));
      }
      logits_into(logits[i], problem_, problem_.input, begin);
      places.begin[i] = static_cast<int>(begin);
      places.data[i] = advanced(logits[i].mutable_data_ptr(), -begin * bytes_);
      places.row_stride[i] = static_cast<int>(logits[i].stride(0));
    }
    loss.args.gradient = logits[0].mutable_data_ptr();
    STD_CUDA_CHECK(
        launch_cross_entropy_pieces(loss.args, places, loss.dtype(), plan, loss.stream()));
    const int64_t block = InputSum::rows_at_once(problem_, loss.dtype());
    const InputSum input_sum(problem_, gradients_.input, loss.dtype(), loss.stream(), block, count);
    for (int64_t row = 0; row < rows; row += block) {
      for (int64_t i = 0; i < count; ++i) {
        input_sum.add(i, rows_of(logits[i], row, std::min(block, rows - row)), pieces.begin[i], row,
                      0);
      }
    }
    const BiasSum bias_sum(gradients_.linear_bias, loss.dtype(), loss.stream(),
                           column_sum_blocks(rows));
    for (int64_t i = 0; i < count; ++i) bias_sum.add(logits[i], 0, pieces.begin[i]);
    bias_sum.finish();
    // In order: each product ends before the piece that it is made of, and those after it.
    for (int64_t i = 0; i < count; ++i) {
      mm_out(rows_of(gradients_.linear_weight, pieces.begin[i], logits[i].size(1)),
             transposed(logits[i]), problem_.input);
    }
  }

  void by_classes() {
    const int64_t rows = problem_.shape.rows, classes = problem_.shape.classes;
    const int64_t fit = down(problem_.limits.chunk_bytes / (rows * bytes_), kAlign);
    const int64_t step = std::min(classes, std::max(fit, kLeastClasses));
    const int64_t parts = ceil_div(classes, step);
    const int64_t stride = up(step, kAlign);
    const Tensor buffer = empty_like(problem_.input, {rows, stride});
    const InputSum input_sum(problem_, gradients_.input, loss.dtype(), loss.stream(), rows, parts);
    const BiasSum bias_sum(gradients_.linear_bias, loss.dtype(), loss.stream(),
                           column_sum_blocks(rows));
    const Tensor mass = loss.sum_dense_target();  // lives as long as what is launched with it
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t first = i * step;
      const int64_t count = std::min(step, classes - first);
      const Tensor logits = as_strided(buffer, {rows, count}, {stride, 1});
      logits_into(logits, problem_, problem_.input, first);
      const CrossEntropyArgs all = loss.args;
      loss.args.classes = count;
      loss.args.first_class = first;
      loss.args.weight = advanced(loss.args.weight, first * bytes_);
      loss.args.probabilities = advanced(loss.args.probabilities, first * bytes_);
      to_logits(logits);
      loss.backward();
      loss.args = all;
      input_sum.add(i, logits, first, 0, 0);
      if (gradients_.linear_weight.numel() > 0) {
        mm_out(rows_of(gradients_.linear_weight, first, count), transposed(logits), problem_.input);
      }
      bias_sum.add(logits, 0, first);
    }
    bias_sum.finish();
  }

  const LinearCrossEntropyProblem& problem_;
  const LinearCrossEntropyGradients& gradients_;
  int64_t bytes_;
};

}  // namespace torchext::cuda
