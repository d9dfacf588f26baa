// linear_relu on the CPU. The products are our own, with bias and ReLU in them, or the library's
// (MKL, oneDNN; gemm.h), and then ReLU is a pass while the product is in cache. Backward the ReLU
// mask and the bias gradient are one pass.
#include "ops/linear_relu.h"

#include <algorithm>

#include "cpu/dispatch.h"
#include "cpu/gemm.h"
#include "cpu/simd.h"

namespace torchext {
namespace {

using cpu::addmm_out;
using cpu::mm_out;
using cpu::transposed;
using simd::acc_type;
using simd::kLanesOf;
using simd::Vector;

// Rows whose bias gradients are summed together: fixed, so that the sum does not depend on the
// number of threads.
constexpr int64_t kRowsPerBlock = 64;
// Elements below which another thread costs more than it saves.
constexpr int64_t kGrain = 32768;
// Multiplications from which on `linear_with_bias` is asked.
constexpr int64_t kLinearWithBias = int64_t{1} << 15;

// Of a register of bfloat16 or float16 as bits: all ones where a value is negative and no NaN.
template <typename scalar_t, typename Bits>
TORCHEXT_INLINE Bits negative(Bits bits) {
  constexpr uint16_t kInfinity = std::is_same_v<scalar_t, simd::Half> ? 0x7c00 : 0x7f80;
  return (bits ^ uint16_t{0x8000}) <= kInfinity;
}

template <typename scalar_t>
struct BiasReluArgs {
  scalar_t* output;      // (rows, columns), the product, overwritten
  const scalar_t* bias;  // (columns) or null
  int64_t columns;
};

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void bias_relu_rows(const BiasReluArgs<scalar_t>& args, int64_t begin,
                                    int64_t end) {
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_type<scalar_t>, kLanes>;
  // `<= 0`, not `> 0`, decides: NaN stays NaN.
  const auto relu = [](Acc x) __attribute__((always_inline)) { return x <= 0 ? Acc{} : x; };
  const int64_t columns = args.columns;
  for (int64_t row = begin; row < end; ++row) {
    scalar_t* output = args.output + row * columns;
    int64_t i = 0;
    if constexpr (sizeof(scalar_t) == 2) {
      // Nothing to add: the bits of what stays are not touched. Half the time of a conversion.
      constexpr int kWide = Isa::kBytes / 2;
      for (; !args.bias && i + kWide <= columns; i += kWide) {
        auto* pointer = reinterpret_cast<uint16_t*>(output + i);
        const auto bits = simd::load_raw<uint16_t, kWide>(pointer);
        simd::store_raw(pointer, bits & ~negative<scalar_t>(bits));
      }
    }
    for (; i + kLanes <= columns; i += kLanes) {
      Acc x = simd::load<kLanes>(output + i);
      if (args.bias) x += simd::load<kLanes>(args.bias + i);
      simd::store<kLanes>(output + i, relu(x));
    }
    if (const int64_t rest = columns - i; rest > 0) {
      Acc x = simd::load_tail<kLanes>(output + i, rest, 0);
      if (args.bias) x += simd::load_tail<kLanes>(args.bias + i, rest, 0);
      simd::store_tail<kLanes>(output + i, relu(x), rest);
    }
  }
}
TORCHEXT_SIMD_FUNCTION(bias_relu, bias_relu_rows, BiasReluArgs)

template <typename scalar_t>
struct MaskArgs {
  const scalar_t* grad_output;  // (rows, columns); may be grad_linear
  const scalar_t* output;       // (rows, columns)
  scalar_t* grad_linear;        // (rows, columns): grad_output where output > 0
  acc_type<scalar_t>* partial;  // (blocks, columns), zeroed: column sums of a block; or null
  int64_t rows;
  int64_t columns;
};

// Rows of less than a vector, as the one row that they are in memory.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void mask_narrow(const MaskArgs<scalar_t>& args, int64_t begin, int64_t end,
                                 acc_type<scalar_t>* partial) {
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using Acc = Vector<acc_type<scalar_t>, kLanes>;
  const int64_t columns = args.columns, last = end * columns;
  int64_t i = begin * columns;
  for (; i + kLanes <= last; i += kLanes) {
    const Acc y = simd::load<kLanes>(args.output + i);
    simd::store<kLanes>(args.grad_linear + i,
                        y <= 0 ? Acc{} : simd::load<kLanes>(args.grad_output + i));
  }
  if (const int64_t rest = last - i; rest > 0) {
    const Acc y = simd::load_tail<kLanes>(args.output + i, rest, 0);
    const Acc grad = y <= 0 ? Acc{} : simd::load_tail<kLanes>(args.grad_output + i, rest, 0);
    simd::store_tail<kLanes>(args.grad_linear + i, grad, rest);
  }
  if (!partial) return;
  for (int64_t row = begin; row < end; ++row) {
    const scalar_t* grad = args.grad_linear + row * columns;
    for (int64_t j = 0; j < columns; ++j) partial[j] += static_cast<acc_type<scalar_t>>(grad[j]);
  }
}

// One pass over blocks [begin, end) of kRowsPerBlock rows.
template <class Isa, typename scalar_t>
TORCHEXT_INLINE void mask_blocks(const MaskArgs<scalar_t>& args, int64_t begin, int64_t end) {
  constexpr int kLanes = kLanesOf<Isa, scalar_t>;
  using acc_t = acc_type<scalar_t>;
  using Acc = Vector<acc_t, kLanes>;
  const int64_t columns = args.columns;
  for (int64_t block = begin; block < end; ++block) {
    acc_t* partial = args.partial ? args.partial + block * columns : nullptr;
    const int64_t row_end = std::min(args.rows, (block + 1) * kRowsPerBlock);
    if (columns < kLanes) {
      mask_narrow<Isa>(args, block * kRowsPerBlock, row_end, partial);
      continue;
    }
    for (int64_t row = block * kRowsPerBlock; row < row_end; ++row) {
      const scalar_t* grad_output = args.grad_output + row * columns;
      const scalar_t* output = args.output + row * columns;
      scalar_t* grad_linear = args.grad_linear + row * columns;
      int64_t i = 0;
      if constexpr (sizeof(scalar_t) == 2) {
        constexpr int kWide = Isa::kBytes / 2;
        for (; i + kWide <= columns; i += kWide) {
          const auto y =
              simd::load_raw<uint16_t, kWide>(reinterpret_cast<const uint16_t*>(output + i));
          const auto grad =
              simd::load_raw<uint16_t, kWide>(reinterpret_cast<const uint16_t*>(grad_output + i)) &
              ~(negative<scalar_t>(y) | (y == 0));
          simd::store_raw(reinterpret_cast<uint16_t*>(grad_linear + i), grad);
          if (!partial) continue;
#pragma GCC unroll 2
          for (int part = 0; part < 2; ++part) {
            acc_t* sums = partial + i + part * kLanes;
            const Acc wide = simd::widen<scalar_t, kLanes>(simd::half<kWide, uint16_t>(grad, part));
            simd::store<kLanes>(sums, simd::load<kLanes>(sums) + wide);
          }
        }
      }
      for (; i + kLanes <= columns; i += kLanes) {
        const Acc y = simd::load<kLanes>(output + i);
        const Acc grad = y <= 0 ? Acc{} : simd::load<kLanes>(grad_output + i);
        simd::store<kLanes>(grad_linear + i, grad);
        if (partial) simd::store<kLanes>(partial + i, simd::load<kLanes>(partial + i) + grad);
      }
      if (const int64_t rest = columns - i; rest > 0) {
        const Acc y = simd::load_tail<kLanes>(output + i, rest, 0);
        const Acc grad = y <= 0 ? Acc{} : simd::load_tail<kLanes>(grad_output + i, rest, 0);
        simd::store_tail<kLanes>(grad_linear + i, grad, rest);
        if (partial) {
          for (int64_t j = 0; j < rest; ++j) partial[i + j] += grad[j];
        }
      }
    }
  }
}
TORCHEXT_SIMD_FUNCTION(mask, mask_blocks, MaskArgs)

// (*, features) as (rows, features), a view where it can be.
Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t features) {
  if (tensor.dim() == 2) return tensor;
  return as_strided(as_contiguous(tensor), {rows, features}, {features, 1});
}

Tensor linear_relu_forward_cpu(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias) {
  check_memory("linear_relu", {{"input", &input}, {"weight", &weight}});
  if (bias) check_memory("linear_relu", {{"bias", &*bias}});
  const LinearShape shape = check_linear_relu(input, weight, bias);
  auto sizes = sizes_of(input);
  sizes.back() = shape.out_features;
  if (shape.rows * shape.out_features == 0) return empty_like(input, sizes);
  Tensor output;
  const Tensor dense_bias = bias ? as_contiguous(*bias) : Tensor();
  dispatch_floating(input.scalar_type(), "linear_relu", [&](auto zero) {
    using scalar_t = decltype(zero);
    BiasReluArgs<scalar_t> args{nullptr, nullptr, shape.out_features};
    const Tensor matrix = as_matrix(input, shape.rows, shape.in_features);
    cpu::Also also;
    also.bias = bias ? &dense_bias : nullptr;
    also.relu = true;
    also.pairs = true;
    const int64_t multiplications = shape.rows * shape.in_features * shape.out_features;
    if (cpu::product_may_serve<scalar_t>(multiplications)) {
      output = empty_like(input, sizes);
      const Tensor product = as_matrix(output, shape.rows, shape.out_features);
      if (cpu::own_product<scalar_t>(product, matrix, transposed(weight), also)) return;
    }
    std::optional<Tensor> linear;
    // Its call costs 12 us, addmm's copy of the bias less where there is little of it.
    if (bias && multiplications >= kLinearWithBias) {
      linear = cpu::linear_with_bias<scalar_t>(input, weight, dense_bias);
    }
    if (linear) {
      output = *linear;
    } else {
      if (!output.defined()) output = empty_like(input, sizes);
      const Tensor product = as_matrix(output, shape.rows, shape.out_features);
      if (bias && sizeof(scalar_t) == 2) {
        // The product and the bias are rounded once, together, as eager rounds them.
        addmm_out(product, *bias, matrix, transposed(weight));
      } else {
        mm_out(product, matrix, transposed(weight));
        if (bias) args.bias = static_cast<const scalar_t*>(dense_bias.const_data_ptr());
      }
    }
    args.output = static_cast<scalar_t*>(output.mutable_data_ptr());
    for_each_block(shape.rows, kGrain / shape.out_features,
                   [&](int64_t begin, int64_t end) { bias_relu<scalar_t>(args, begin, end); });
  });
  return output;
}

// Whether all elements are one in memory.
bool is_one_number(const Tensor& tensor) {
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) != 0) return false;
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> linear_relu_backward_cpu(const Tensor& grad_output,
                                                            const Tensor& output,
                                                            const Tensor& input,
                                                            const Tensor& weight, bool input_grad,
                                                            bool weight_grad, bool bias_grad) {
  check_memory(
      "linear_relu_backward",
      {{"grad_output", &grad_output}, {"output", &output}, {"input", &input}, {"weight", &weight}});
  const LinearShape shape =
      check_linear_relu_backward(grad_output, output, input, weight, weight_grad);
  const int64_t rows = shape.rows;
  const int64_t columns = shape.out_features;
  // Before what is returned: freed from between the others, the C library keeps its memory for the
  // next call, where it would give the heap's end back to the system and fault it in again.
  const Tensor grad_linear = empty_like(grad_output, {rows, columns});
  Tensor grad_input = empty_like(
      grad_output, input_grad ? input_sizes(grad_output, shape) : std::vector<int64_t>{0});
  Tensor grad_weight = empty_like(weight, weight_grad ? sizes_of(weight) : std::vector<int64_t>{0});
  Tensor grad_bias = empty_like(weight, {bias_grad ? columns : 0});
  // One number for all, as a sum's gradient is, is written out here: the dispatcher takes as long
  // as a small product.
  const bool one_number = rows * columns > 1 && is_one_number(grad_output);
  const Tensor grad = one_number ? grad_linear : as_contiguous(grad_output);
  const Tensor result = as_contiguous(output);

  // The input may be none of this call's (see the check): the weight's dtype is everyone's.
  dispatch_floating(weight.scalar_type(), "linear_relu", [&](auto zero) {
    using scalar_t = decltype(zero);
    using acc_t = acc_type<scalar_t>;
    const int64_t blocks = (rows + kRowsPerBlock - 1) / kRowsPerBlock;
    std::vector<acc_t> partial(bias_grad ? blocks * columns : 0);
    const MaskArgs<scalar_t> args{static_cast<const scalar_t*>(grad.const_data_ptr()),
                                  static_cast<const scalar_t*>(result.const_data_ptr()),
                                  static_cast<scalar_t*>(grad_linear.mutable_data_ptr()),
                                  bias_grad ? partial.data() : nullptr,
                                  rows,
                                  columns};
    const auto* number = static_cast<const scalar_t*>(grad_output.const_data_ptr());
    for_each_block(blocks, kGrain / (kRowsPerBlock * std::max<int64_t>(columns, 1)),
                   [&](int64_t begin, int64_t end) {
                     if (one_number) {
                       std::fill(args.grad_linear + begin * kRowsPerBlock * columns,
                                 args.grad_linear + std::min(rows, end * kRowsPerBlock) * columns,
                                 *number);
                     }
                     mask<scalar_t>(args, begin, end);
                   });
    if (bias_grad) {
      scalar_t* bias = static_cast<scalar_t*>(grad_bias.mutable_data_ptr());
      // In double: the blocks of a million rows are many, too.
      std::vector<double> total(columns);
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t i = 0; i < columns; ++i) total[i] += partial[block * columns + i];
      }
      for (int64_t i = 0; i < columns; ++i) bias[i] = static_cast<scalar_t>(total[i]);
    }
  });

  dispatch_floating(weight.scalar_type(), "linear_relu", [&](auto zero) {
    using scalar_t = decltype(zero);
    cpu::Also also;
    also.pairs = true;
    if (input_grad && grad_input.numel() > 0) {
      cpu::multiply<scalar_t>(
          as_strided(grad_input, {rows, shape.in_features}, {shape.in_features, 1}), grad_linear,
          weight, also);
    }
    if (weight_grad && grad_weight.numel() > 0) {
      // A thread meets the weight's rows here that it updates in the optimiser's step.
      also.by_rows = true;
      cpu::multiply<scalar_t>(grad_weight, transposed(grad_linear),
                              as_matrix(input, rows, shape.in_features), also);
    }
  });
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) {
  m.impl("linear_relu_forward", TORCH_BOX(&torchext::linear_relu_forward_cpu));
  m.impl("linear_relu_backward", TORCH_BOX(&torchext::linear_relu_backward_cpu));
}
