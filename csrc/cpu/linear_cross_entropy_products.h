// What one call of linear_cross_entropy is made of on the CPU: its tensors, checked, the gradients
// that it wants, and its products.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/cross_entropy_call.h"
#include "cpu/gemm.h"
#include "cpu/narrow_head.h"
#include "cpu/wide_sum.h"
#include "ops/linear_cross_entropy.h"

namespace torchext::cpu::head {

using simd::acc_type;

constexpr int64_t kColumnsPerBlock = 512;
constexpr int64_t kRowsPerSum = 64;
// Multiplications of a product up to which bfloat16 is our own kernel's where that multiplies
// pairs: forward and backward of 100 x 100 x 32 takes 0.58 of eager's time so, 1.10 by oneDNN, of
// 256 x 512 x 64 0.72 and 1.01, of 512 x 512 x 1000 0.95 and 0.97 (2 cores of Zen 4). 1024 x 512
// x 32000 takes 280 ms and 281, another day 316 and 269 to 306.
constexpr int64_t kMostPairs = int64_t{1} << 29;

// sums[c] += the sum of column c: of kRowsPerSum rows in order, and of those, so that no thread
// count changes it, and a million rows of one sign lose no digits.
template <typename scalar_t>
void add_column_sums(const scalar_t* data, int64_t rows, int64_t columns, double* sums) {
  const int64_t blocks = (columns + kColumnsPerBlock - 1) / kColumnsPerBlock;
  for_each_block(blocks, kGrain / (rows * kColumnsPerBlock + 1), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumnsPerBlock;
      const int64_t count = std::min(columns - first, kColumnsPerBlock);
      for (int64_t row = 0; row < rows; row += kRowsPerSum) {
        acc_type<scalar_t> part[kColumnsPerBlock] = {};
        const int64_t last = std::min(rows, row + kRowsPerSum);
        for (int64_t r = row; r < last; ++r) {
          const scalar_t* values = data + r * columns + first;
          for (int64_t c = 0; c < count; ++c) part[c] += static_cast<acc_type<scalar_t>>(values[c]);
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
  bool inner_dimension;  // linear_weight had three

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
        label_smoothing(label_smoothing),
        inner_dimension(linear_weight.dim() == 3) {
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
    advise(gradient);
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
  using Head = NarrowHead<scalar_t>;

  Products(const Problem& problem, Gradients& gradients)
      : problem_(problem), gradients_(gradients) {
    if (problem.shape.inner == 1 && Head::serves(problem.input, problem.linear_weight)) {
      head_.emplace(problem.input, problem.linear_weight, problem.linear_bias);
    } else {
      bias_sums_.resize(gradients.linear_bias.numel());
    }
    also_.pairs = problem.shape.rows * problem.shape.features * problem.columns() <= kMostPairs;
  }

  int64_t columns() const { return head_ ? kHeadClasses : problem_.columns(); }

  // The logits of rows [first, first + rows) into the buffer's first rows.
  void logits(const Tensor& buffer, int64_t first, int64_t rows) const {
    if (head_) return head_->forward(data_of(buffer), first, rows);
    const Tensor logits = rows_of(buffer, 0, rows);
    const Tensor x = rows_of(problem_.input, first, rows);
    Also also = also_;
    also.bias = problem_.linear_bias ? &*problem_.linear_bias : nullptr;
    multiply<scalar_t>(logits, x, transposed(problem_.linear_weight), also);
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
    const Tensor logits = rows_of(buffer, 0, rows);
    if (gradients_.input.numel() > 0) {
      multiply<scalar_t>(rows_of(gradients_.input, first, rows), logits, problem_.linear_weight,
                         also_);
    }
    if (const Tensor& gradient = gradients_.linear_weight; gradient.numel() > 0) {
      constexpr bool kNarrow = !std::is_same_v<scalar_t, acc_t>;
      Also also = also_;
      also.accumulate = !kNarrow && first > 0;
      multiply<scalar_t>(gradient, transposed(logits), rows_of(problem_.input, first, rows), also);
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
  WideSum<scalar_t> weight_sum_;  // of narrow chunks
  std::optional<Head> head_;
  Also also_;
};

}  // namespace torchext::cpu::head
