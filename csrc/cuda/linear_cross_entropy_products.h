// The products of linear_cross_entropy on CUDA, and the sums of them that become gradients. What is
// summed over several products is summed in float32 (float64 for float64) and rounded once.
#pragma once

#include <algorithm>
#include <optional>

#include "cuda/cross_entropy_call.h"
#include "cuda/gemm.h"
#include "cuda/linear_cross_entropy.h"
#include "cuda/linear_cross_entropy_call.h"
#include "cuda/linear_relu.h"
#include "ops/linear_cross_entropy.h"

namespace torchext::cuda {

struct LinearCrossEntropyProblem {
  Tensor input;          // (N, H)
  Tensor linear_weight;  // (C, H)
  const Tensor& target;
  const std::optional<Tensor>& linear_bias;
  const std::optional<Tensor>& weight;
  LinearCrossEntropyShape shape;
  LinearCrossEntropyLimits limits;
};

// The gradients that are wanted; no elements where one is not.
struct LinearCrossEntropyGradients {
  Tensor input, linear_weight, linear_bias;
  bool any;

  LinearCrossEntropyGradients(const LinearCrossEntropyProblem& problem, bool input_grad,
                              bool linear_weight_grad, bool bias_grad)
      : input(of(problem.input, input_grad, problem.shape.rows)),
        linear_weight(of(problem.linear_weight, linear_weight_grad, problem.shape.rows)),
        linear_bias(empty_like(problem.input, {bias_grad ? problem.shape.classes : 0})),
        any(input_grad || linear_weight_grad || bias_grad) {
    if (problem.shape.rows == 0) torch::stable::zero_(linear_bias);
  }

 private:
  static Tensor of(const Tensor& like, bool wanted, int64_t rows) {
    if (!wanted) return empty_like(like, {0});
    Tensor gradient = empty_like(like, sizes_of(like));
    if (rows == 0) torch::stable::zero_(gradient);  // no product will write it
    return gradient;
  }
};

inline bool is_narrow(Dtype dtype) { return item_bytes(dtype) == 2; }
inline float* floats(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// logits (rows of input, classes [first, first + n)) into `to`.
inline void logits_into(const Tensor& to, const LinearCrossEntropyProblem& problem,
                        const Tensor& input, int64_t first) {
  const int64_t classes = to.size(1);
  const Tensor right = transposed(rows_of(problem.linear_weight, first, classes));
  if (problem.linear_bias) {
    const Tensor& bias = *problem.linear_bias;
    addmm_out(to, as_strided(bias, {classes}, {bias.stride(0)}, first * bias.stride(0)), input,
              right);
  } else {
    mm_out(to, input, right);
  }
}

// The gradient of the input from products over parts of the classes.
class InputSum {
 public:
  // For `rows` rows at once; of `parts` parts.
  InputSum(const LinearCrossEntropyProblem& problem, const Tensor& gradient, Dtype dtype,
           cudaStream_t stream, int64_t rows, int64_t parts)
      : problem_(problem), gradient_(gradient), dtype_(dtype), stream_(stream), parts_(parts) {
    if (gradient.numel() == 0 || parts == 1 || !is_narrow(dtype)) return;
    sum_ = empty_like(gradient, {rows, gradient.size(1)}, acc_dtype(dtype));
    block_ = std::min(rows, rows_at_once(problem, dtype));
    product_ = empty_like(gradient, {block_, gradient.size(1)}, acc_dtype(dtype));
  }

  // The rows that `input_product_bytes` have room for; all where none is needed.
  static int64_t rows_at_once(const LinearCrossEntropyProblem& problem, Dtype dtype) {
    if (!is_narrow(dtype)) return problem.shape.rows;
    const int64_t row_bytes = std::max<int64_t>(4 * problem.shape.features, 1);
    const int64_t fit = problem.limits.input_product_bytes / row_bytes;
    return std::min(problem.shape.rows, fit < 128 ? std::max<int64_t>(fit, 1) : fit / 128 * 128);
  }

  // Rows [row, row + left.size(0)) get what part number `part` gives them: `left` @ the weight's
  // rows from `first_class` on. Their sums begin at row `at` of those kept here.
  void add(int64_t part, const Tensor& left, int64_t first_class, int64_t row, int64_t at) const {
    if (gradient_.numel() == 0) return;
    const Tensor right = rows_of(problem_.linear_weight, first_class, left.size(1));
    const Tensor to = rows_of(gradient_, row, left.size(0));
    if (parts_ == 1) return mm_out(to, left, right);
    if (!is_narrow(dtype_)) {
      return part == 0 ? mm_out(to, left, right) : addmm_out(to, to, left, right);
    }
    if (part == 0) return mm_float_out(rows_of(sum_, at, left.size(0)), left, right);
    for (int64_t i = 0; i < left.size(0); i += block_) {
      const int64_t rows = std::min(block_, left.size(0) - i);
      const int64_t count = rows * gradient_.size(1);
      const Tensor product = rows_of(product_, 0, rows);
      const Tensor sum = rows_of(sum_, at + i, rows);
      mm_float_out(product, rows_of(left, i, rows), right);
      if (part + 1 < parts_) {
        STD_CUDA_CHECK(
            launch_add_product(floats(sum), floats(product), count, floats(sum), stream_));
      } else {
        STD_CUDA_CHECK(launch_add_rounded(floats(sum), floats(product), count,
                                          rows_of(to, i, rows).mutable_data_ptr(), dtype_,
                                          stream_));
      }
    }
  }

 private:
  const LinearCrossEntropyProblem& problem_;
  const Tensor& gradient_;
  Dtype dtype_;
  cudaStream_t stream_;
  int64_t parts_, block_ = 0;
  Tensor sum_, product_;
};

// The gradient of the weight from products over chunks of rows.
class WeightSum {
 public:
  WeightSum(const LinearCrossEntropyProblem& problem, const Tensor& gradient, Dtype dtype,
            cudaStream_t stream, int64_t chunks)
      : gradient_(gradient), dtype_(dtype), stream_(stream), chunks_(chunks) {
    if (!sums_apart()) return;
    const int64_t features = problem.shape.features;
    const int64_t fit = problem.limits.weight_product_bytes / std::max<int64_t>(4 * features, 1);
    const int64_t some = fit < 64 ? std::max<int64_t>(fit, 1) : fit / 64 * 64;
    const int64_t classes = std::min(problem.shape.classes, some);
    sum_ = empty_like(gradient, {problem.shape.classes, features}, acc_dtype(dtype));
    product_ = empty_like(gradient, {classes, features}, acc_dtype(dtype));
  }

  // Whether the gradient's own memory stays unused until the last chunk is done.
  bool sums_apart() const { return gradient_.numel() > 0 && chunks_ > 1 && is_narrow(dtype_); }

  // What chunk number `chunk` gives: left.T @ input.
  void add(int64_t chunk, const Tensor& left, const Tensor& input) const {
    if (gradient_.numel() == 0) return;
    if (!sums_apart()) {
      if (chunk == 0) return mm_out(gradient_, transposed(left), input);
      return addmm_out(gradient_, gradient_, transposed(left), input);
    }
    if (chunk == 0) return mm_float_out(sum_, transposed(left), input);
    for (int64_t i = 0; i < sum_.size(0); i += product_.size(0)) {
      const int64_t classes = std::min(product_.size(0), sum_.size(0) - i);
      const Tensor product = rows_of(product_, 0, classes);
      float* sum = floats(rows_of(sum_, i, classes));
      mm_float_out(product, transposed(columns_of(left, i, classes)), input);
      STD_CUDA_CHECK(
          launch_add_product(sum, floats(product), classes * sum_.size(1), sum, stream_));
    }
  }

  void finish() const {
    if (!sums_apart()) return;
    STD_CUDA_CHECK(launch_add_rounded(nullptr, floats(sum_), sum_.numel(),
                                      gradient_.mutable_data_ptr(), dtype_, stream_));
  }

 private:
  const Tensor& gradient_;
  Dtype dtype_;
  cudaStream_t stream_;
  int64_t chunks_;
  Tensor sum_, product_;
};

// The gradient of the bias: column sums of blocks of rows, then of those.
class BiasSum {
 public:
  // `blocks`: of rows, in all.
  BiasSum(const Tensor& gradient, Dtype dtype, cudaStream_t stream, int64_t blocks)
      : gradient_(gradient), dtype_(dtype), stream_(stream), blocks_(blocks) {
    if (gradient.numel() == 0) return;
    partial_ = empty_like(gradient, {blocks, gradient.numel()}, acc_dtype(dtype));
  }

  // `block`: the number of the first block of rows.
  void add(const Tensor& matrix, int64_t block, int64_t first_class) const {
    if (gradient_.numel() == 0) return;
    char* partial = static_cast<char*>(partial_.mutable_data_ptr());
    partial += (block * gradient_.numel() + first_class) * partial_.element_size();
    STD_CUDA_CHECK(launch_partial_column_sums(matrix.const_data_ptr(), matrix.size(0),
                                              matrix.size(1), matrix.stride(0), partial,
                                              gradient_.numel(), dtype_, stream_));
  }

  void finish() const {
    if (gradient_.numel() == 0) return;
    STD_CUDA_CHECK(launch_column_sums(partial_.const_data_ptr(), blocks_, gradient_.numel(),
                                      gradient_.mutable_data_ptr(), dtype_, stream_));
  }

 private:
  const Tensor& gradient_;
  Dtype dtype_;
  cudaStream_t stream_;
  int64_t blocks_;
  Tensor partial_;
};

}  // namespace torchext::cuda
