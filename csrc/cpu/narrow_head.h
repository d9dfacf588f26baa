// The three products of a head of few classes (the ten of a digit classifier), without the library:
// its call alone costs more than these take. The classes stand side by side in a vector forward,
// the features backward. Every sum has one order, whatever the number of threads.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/product.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"

namespace torchext::cpu {

// One vector of AVX-512; past it, and past this many features, the library's blocking wins.
constexpr int64_t kHeadClasses = 16;
constexpr int64_t kHeadFeatures = 1024;
// Classes up to which logits are dot products where those serve products of any number of rows. Of
// the time with classes side by side, forward of 128 x 768 x 2, 4096 x 768 x 4, 512 x 256 x 8 and
// 512 x 768 x 10 0.55, 0.42, 0.86 and 0.83 (most 1.08), but of 4096 x 768 x 12 and 16 1.16 and 1.52
// (2 cores of Zen 5, float32).
constexpr int64_t kDotClasses = 10;
// Rows whose weight gradients are summed together, at the least, and how many such sums at the
// most.
constexpr int64_t kHeadRows = 128;
constexpr int64_t kHeadBlocks = 64;
// Multiplications below which another thread costs more than it saves.
constexpr int64_t kHeadGrain = int64_t{1} << 19;

template <typename scalar_t>
struct HeadArgs {
  const scalar_t* input;  // (rows, features), rows `input_stride` apart
  int64_t input_stride;
  const scalar_t* weight;  // (classes, features), rows `weight_stride` apart
  int64_t weight_stride;
  const scalar_t* packed;  // (features, kHeadClasses): the weight transposed, then zeros
  const scalar_t* bias;    // (kHeadClasses): the bias, then zeros
  scalar_t* logits;        // (rows, kHeadClasses): forward's result, and backward's gradient
  scalar_t* grad_input;    // (rows, features) dense, or null
  scalar_t* weight_sums;   // (blocks, classes, features), or null
  double* bias_sums;       // (blocks, kHeadClasses), or null
  int64_t rows, features, classes;

  int64_t block_rows() const { return std::max(kHeadRows, (rows + kHeadBlocks - 1) / kHeadBlocks); }
  int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
};

// logits = input @ weight.T + bias, for kRows rows.
template <class Isa, typename scalar_t, int kRows>
TORCHEXT_INLINE void head_logits(const HeadArgs<scalar_t>& args, int64_t row) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  constexpr int kVectors = kHeadClasses / kLanes;
  using Acc = simd::Vector<scalar_t, kLanes>;
  for (int v = 0; v < kVectors; ++v) {
    Acc sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = simd::load<kLanes>(args.bias + v * kLanes);
    for (int64_t k = 0; k < args.features; ++k) {
      const Acc weight = simd::load<kLanes>(args.packed + k * kHeadClasses + v * kLanes);
      for (int i = 0; i < kRows; ++i) {
        sum[i] += args.input[(row + i) * args.input_stride + k] * weight;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      simd::store<kLanes>(args.logits + (row + i) * kHeadClasses + v * kLanes, sum[i]);
    }
  }
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void head_forward_blocks(const HeadArgs<scalar_t>& args, int64_t begin,
                                         int64_t end) {
  int64_t row = begin * args.block_rows();
  const int64_t last = std::min(args.rows, end * args.block_rows());
  for (; row + 8 <= last; row += 8) head_logits<Isa, scalar_t, 8>(args, row);
  for (; row < last; ++row) head_logits<Isa, scalar_t, 1>(args, row);
}
TORCHEXT_SIMD_FUNCTION(head_forward, head_forward_blocks, HeadArgs)

// grad_input = grad_logits @ weight, for kRows rows.
template <class Isa, typename scalar_t, int kRows>
TORCHEXT_INLINE void head_grad_input(const HeadArgs<scalar_t>& args, int64_t row) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Acc = simd::Vector<scalar_t, kLanes>;
  const scalar_t* grad = args.logits + row * kHeadClasses;
  scalar_t* result = args.grad_input + row * args.features;
  // Two vectors at a time: sums enough to hide the additions' latency; the last one overlaps.
  const auto write = [&](int64_t k, auto vectors) __attribute__((always_inline)) {
    Acc sum[kRows][vectors] = {};
    for (int64_t c = 0; c < args.classes; ++c) {
      const scalar_t* row_of_weight = args.weight + c * args.weight_stride + k;
      for (int v = 0; v < vectors; ++v) {
        const Acc weight = simd::load<kLanes>(row_of_weight + v * kLanes);
        for (int i = 0; i < kRows; ++i) sum[i][v] += grad[i * kHeadClasses + c] * weight;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < vectors; ++v) {
        simd::store<kLanes>(result + i * args.features + k + v * kLanes, sum[i][v]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * kLanes <= args.features; k += 2 * kLanes) {
    write(k, std::integral_constant<int, 2>{});
  }
  if (args.features >= kLanes) {
    for (; k < args.features; k += kLanes) {
      write(std::min(k, args.features - kLanes), std::integral_constant<int, 1>{});
    }
    return;
  }
  for (; k < args.features; ++k) {
    for (int i = 0; i < kRows; ++i) {
      scalar_t sum = 0;
      for (int64_t c = 0; c < args.classes; ++c) {
        sum += grad[i * kHeadClasses + c] * args.weight[c * args.weight_stride + k];
      }
      result[i * args.features + k] = sum;
    }
  }
}

// sums = grad_logits.T @ input over rows [begin, end), for kClasses classes.
template <class Isa, typename scalar_t, int kClasses>
TORCHEXT_INLINE void head_grad_weight(const HeadArgs<scalar_t>& args, int64_t begin, int64_t end,
                                      int64_t c, scalar_t* sums) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Acc = simd::Vector<scalar_t, kLanes>;
  // Two vectors of features at a time, then one; the last one overlaps.
  const auto add = [&](int64_t k, auto vectors) __attribute__((always_inline)) {
    Acc sum[kClasses][vectors] = {};
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t* grad = args.logits + row * kHeadClasses + c;
      for (int v = 0; v < vectors; ++v) {
        const Acc x = simd::load<kLanes>(args.input + row * args.input_stride + k + v * kLanes);
        for (int i = 0; i < kClasses; ++i) sum[i][v] += grad[i] * x;
      }
    }
    for (int i = 0; i < kClasses; ++i) {
      for (int v = 0; v < vectors; ++v) {
        simd::store<kLanes>(sums + (c + i) * args.features + k + v * kLanes, sum[i][v]);
      }
    }
  };
  int64_t k = 0;
  for (; k + 2 * kLanes <= args.features; k += 2 * kLanes) {
    add(k, std::integral_constant<int, 2>{});
  }
  if (args.features >= kLanes) {
    for (; k < args.features; k += kLanes) {
      add(std::min(k, args.features - kLanes), std::integral_constant<int, 1>{});
    }
    return;
  }
  for (; k < args.features; ++k) {
    scalar_t sum[kClasses] = {};
    for (int64_t row = begin; row < end; ++row) {
      const scalar_t x = args.input[row * args.input_stride + k];
      for (int i = 0; i < kClasses; ++i) sum[i] += args.logits[row * kHeadClasses + c + i] * x;
    }
    for (int i = 0; i < kClasses; ++i) sums[(c + i) * args.features + k] = sum[i];
  }
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void head_backward_blocks(const HeadArgs<scalar_t>& args, int64_t begin,
                                          int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_rows();
    const int64_t last = std::min(args.rows, first + args.block_rows());
    if (args.grad_input) {
      int64_t row = first;
      for (; row + 4 <= last; row += 4) head_grad_input<Isa, scalar_t, 4>(args, row);
      for (; row < last; ++row) head_grad_input<Isa, scalar_t, 1>(args, row);
    }
    if (args.weight_sums) {
      scalar_t* sums = args.weight_sums + block * args.classes * args.features;
      // Groups of about as many classes, up to what registers hold the sums of: ten are two of 5.
      constexpr int kMost = 6;
      const int64_t groups = (args.classes + kMost - 1) / kMost;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t c = args.classes * group / groups;
        const auto run = [&](auto count) __attribute__((always_inline)) {
          head_grad_weight<Isa, scalar_t, count>(args, first, last, c, sums);
        };
        switch (args.classes * (group + 1) / groups - c) {
          case 1:
            run(std::integral_constant<int, 1>{});
            break;
          case 2:
            run(std::integral_constant<int, 2>{});
            break;
          case 3:
            run(std::integral_constant<int, 3>{});
            break;
          case 4:
            run(std::integral_constant<int, 4>{});
            break;
          case 5:
            run(std::integral_constant<int, 5>{});
            break;
          default:
            run(std::integral_constant<int, kMost>{});
        }
      }
    }
    if (args.bias_sums) {
      // In double: a long sum of one sign would lose digits.
      double* sums = args.bias_sums + block * kHeadClasses;
      for (int64_t row = first; row < last; ++row) {
        for (int64_t c = 0; c < args.classes; ++c) sums[c] += args.logits[row * kHeadClasses + c];
      }
    }
  }
}
TORCHEXT_SIMD_FUNCTION(head_backward, head_backward_blocks, HeadArgs)

// A head of one call: what the products keep beside the tensors.
template <typename scalar_t>
class NarrowHead {
 public:
  // The narrow dtypes round as the library does: they stay with it.
  static constexpr bool kServed = std::is_same_v<scalar_t, simd::acc_type<scalar_t>>;

  // Whether these products serve a call: few classes but some, rows that are contiguous.
  static bool serves(const Tensor& input, const Tensor& weight) {
    return kServed && weight.size(0) > 0 && weight.size(0) <= kHeadClasses &&
           weight.size(1) <= kHeadFeatures && weight.size(1) > 0 && input.stride(1) == 1 &&
           weight.stride(1) == 1;
  }

  NarrowHead(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
    args_.input = static_cast<const scalar_t*>(input.const_data_ptr());
    args_.input_stride = input.stride(0);
    args_.weight = static_cast<const scalar_t*>(weight.const_data_ptr());
    args_.weight_stride = weight.stride(0);
    args_.classes = weight.size(0);
    args_.features = weight.size(1);
    product_.left = {args_.input, args_.input_stride, 1};
    product_.right = {args_.weight, 1, args_.weight_stride};
    product_.inner = args_.features;
    product_.columns = args_.classes;
    if constexpr (kServed) {
      dots_ =
          args_.classes <= kDotClasses && all_products_serve<scalar_t>() && dots_serve(product_);
    }
    const int64_t features = dots_ ? 0 : args_.features;
    packed_.resize((features + 1) * kHeadClasses);
    if constexpr (kServed) {
      copy_transposed<16 / sizeof(scalar_t)>(
          Matrix<const scalar_t>{args_.weight, args_.weight_stride, 1}, args_.classes, features,
          packed_.data(), kHeadClasses);
    }
    scalar_t* padded_bias = packed_.data() + features * kHeadClasses;
    if (bias) {
      const auto* values = static_cast<const scalar_t*>(bias->const_data_ptr());
      for (int64_t c = 0; c < args_.classes; ++c) padded_bias[c] = values[c * bias->stride(0)];
    }
    args_.packed = packed_.data();
    args_.bias = product_.bias = padded_bias;
  }

  // Logits (rows, kHeadClasses) of rows [first, first + rows); past the classes anything.
  void forward(scalar_t* logits, int64_t first, int64_t rows) const {
    if (dots_) {
      Product<scalar_t> product = product_;
      product.out = {logits, kHeadClasses, 1};
      product.left.data += first * args_.input_stride;
      product.rows = rows;
      return product.run();
    }
    HeadArgs<scalar_t> args = chunk(logits, first, rows);
    for_each_block(args.blocks(), grain(args), [&](int64_t begin, int64_t end) {
      if constexpr (kServed) head_forward<scalar_t>(args, begin, end);
    });
  }

  // From the logits' gradient: grad_input's rows (or null), and what the rows add to the gradients
  // of weight (classes, features) and bias (classes), or null.
  void backward(scalar_t* grad_logits, int64_t first, int64_t rows, scalar_t* grad_input,
                scalar_t* grad_weight, scalar_t* grad_bias) {
    HeadArgs<scalar_t> args = chunk(grad_logits, first, rows);
    const int64_t blocks = args.blocks(), elements = args.classes * args.features;
    if (grad_input) args.grad_input = grad_input + first * args.features;
    // The first chunk's first block stands in the gradient itself.
    const bool alone = blocks == 1 && first == 0;
    if (grad_weight && !alone) sums_.resize(blocks * elements);
    if (grad_weight) args.weight_sums = alone ? grad_weight : sums_.data();
    std::vector<double> bias_sums(grad_bias ? blocks * kHeadClasses : 0);
    if (grad_bias) args.bias_sums = bias_sums.data();
    for_each_block(blocks, grain(args), [&](int64_t begin, int64_t end) {
      if constexpr (kServed) head_backward<scalar_t>(args, begin, end);
    });
    for (int64_t block = 0; block < blocks; ++block) {
      const bool set = first == 0 && block == 0;
      if (grad_weight && !alone) {
        const scalar_t* sums = sums_.data() + block * elements;
        for (int64_t i = 0; i < elements; ++i)
          grad_weight[i] = set ? sums[i] : grad_weight[i] + sums[i];
      }
    }
    for (int64_t c = 0; grad_bias && c < args.classes; ++c) {
      double sum = first == 0 ? 0.0 : static_cast<double>(grad_bias[c]);
      for (int64_t block = 0; block < blocks; ++block) sum += bias_sums[block * kHeadClasses + c];
      grad_bias[c] = static_cast<scalar_t>(sum);
    }
  }

 private:
  HeadArgs<scalar_t> chunk(scalar_t* logits, int64_t first, int64_t rows) const {
    HeadArgs<scalar_t> args = args_;
    args.input += first * args.input_stride;
    args.logits = logits;
    args.rows = rows;
    return args;
  }
  static int64_t grain(const HeadArgs<scalar_t>& args) {
    return kHeadGrain / (args.block_rows() * args.features * args.classes);
  }

  HeadArgs<scalar_t> args_{};
  std::vector<scalar_t> packed_, sums_;
  Product<scalar_t> product_{};  // the logits', without rows
  bool dots_ = false;            // it serves
};

}  // namespace torchext::cpu
