// The operators of linear_cross_entropy on CUDA, with what they may use of memory: tests give them
// little, so that small problems are cut as large ones are.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "common/stable.h"
#include "cuda/launch.h"

namespace torchext::cuda {

struct LinearCrossEntropyLimits {
  int64_t whole_bytes = int64_t{64} << 20;           // logits up to here are made in one piece
  int64_t piece_bytes = int64_t{1072} << 20;         // of logits outside the weight's gradient
  int64_t chunk_bytes = int64_t{512} << 20;          // of a chunk of rows, or of classes
  int64_t input_product_bytes = int64_t{16} << 20;   // of a float32 product, and of the sum it
  int64_t weight_product_bytes = int64_t{64} << 20;  // is added to where that is for rows alone
};

inline constexpr int64_t kAlign = 64;  // classes: what pieces begin at, and rows of logits
inline int64_t down(int64_t value, int64_t to) { return value / to * to; }
inline int64_t up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

// Where logits in pieces begin; all but the last `outside` classes lie in the weight's gradient.
struct PiecePlan {
  std::vector<int64_t> begin;  // and the end
  int64_t outside = 0;
};
PiecePlan plan_pieces(int64_t rows, int64_t features, int64_t classes);
// The first element of a piece in the gradient.
int64_t piece_offset(const PiecePlan& plan, int64_t rows, int64_t features, size_t piece);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward_within(
    const LinearCrossEntropyLimits& limits, const Tensor& input, const Tensor& linear_weight,
    const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, int64_t reduction, int64_t ignore_index,
    double label_smoothing, bool input_grad, bool linear_weight_grad, bool linear_bias_grad);

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward_within(
    const LinearCrossEntropyLimits& limits, const Tensor& grad_output, const Tensor& input,
    const Tensor& linear_weight, const Tensor& target, const std::optional<Tensor>& linear_bias,
    const std::optional<Tensor>& weight, const Tensor& stats, int64_t reduction,
    int64_t ignore_index, double label_smoothing, bool input_grad, bool linear_weight_grad,
    bool linear_bias_grad);

}  // namespace torchext::cuda
