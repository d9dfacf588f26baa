// The backward of linear_relu before its products: the ReLU mask and the bias gradient in one pass.
// Column sums are made in two stages, each in a fixed order: no atomics, the same bits every time.
//
// Bytes moved, for (M, N) of b bytes: 2 M N b read, M N b written where a product follows;
// the bias gradient adds 4 N (8 N in double) for each block of rows, written and read. relu(bias),
// where there are no features: M N b written.
#include "cuda/device.cuh"
#include "cuda/linear_relu.h"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // of rows: what the second stage sums
constexpr int64_t kLeastRows = 64;     // of a block
constexpr int kBatch = 4;              // rows whose loads are under way together
constexpr int kColumns = 32;           // of a block of the second stage

// `<= 0`, not `> 0`, decides: NaN counts as positive, as in torch.
template <typename acc_t>
__device__ inline acc_t masked(acc_t grad, acc_t output) {
  return output <= 0 ? acc_t{0} : grad;
}

int64_t rows_of_block(int64_t rows) {
  const int64_t wanted = ceil_div(rows, kMostBlocks);
  return wanted > kLeastRows ? wanted : kLeastRows;
}

// `lanes` threads go along a row, the others take further rows.
template <typename scalar_t, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    relu_mask_kernel(const __grid_constant__ ReluMaskArgs args, int lanes, int64_t block_rows,
                     unsigned column_blocks) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  constexpr int kSize = Memory::kSize;
  TORCHEXT_SHARED(acc_t, shared, kThreads * kSize);
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int first = static_cast<int>(threadIdx.x) / lanes;
  const int step = kThreads / lanes;
  const int64_t row_block = blockIdx.x / column_blocks;
  const int64_t column = (static_cast<int64_t>(blockIdx.x % column_blocks) * lanes + lane) * kSize;
  const bool real = column < args.columns;  // all of an access or none of it
  const int64_t begin = row_block * block_rows + first;
  const int64_t wanted_end = (row_block + 1) * block_rows;
  const int64_t end = !real ? 0 : wanted_end < args.rows ? wanted_end : args.rows;
  const scalar_t* grad_output = static_cast<const scalar_t*>(args.grad_output) + column;
  const scalar_t* output = static_cast<const scalar_t*>(args.output) + column;
  scalar_t* grad_linear = static_cast<scalar_t*>(args.grad_linear);

  acc_t sums[kSize] = {};
  for (int64_t row = begin; row < end; row += step * kBatch) {
    typename Memory::Raw grads[kBatch], outputs[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = (row + i * step) * args.columns;
      if (row + i * step < end) {
        grads[i] = Memory::load(grad_output + at);
        outputs[i] = Memory::load(output + at);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row + i * step >= end) break;
      acc_t grad[kSize], y[kSize];
      Memory::unpack(grads[i], grad);
      Memory::unpack(outputs[i], y);
#pragma unroll
      for (int k = 0; k < kSize; ++k) {
        grad[k] = masked(grad[k], y[k]);
        sums[k] += grad[k];
      }
      if (grad_linear) {
        Memory::store(grad_linear + column + (row + i * step) * args.columns, Memory::pack(grad));
      }
    }
  }
  if (args.partial == nullptr) return;
  acc_t* mine = shared + (first * lanes + lane) * kSize;
#pragma unroll
  for (int k = 0; k < kSize; ++k) mine[k] = sums[k];
  for (int half = step / 2; half > 0; half /= 2) {
    sync_block();
    if (first < half) {
#pragma unroll
      for (int k = 0; k < kSize; ++k) mine[k] += mine[half * lanes * kSize + k];
    }
  }
  if (first > 0 || !real) return;
  acc_t* partial = static_cast<acc_t*>(args.partial) + row_block * args.columns + column;
#pragma unroll
  for (int k = 0; k < kSize; ++k) partial[k] = mine[k];
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    column_sums_kernel(const acc_type<scalar_t>* partial, int64_t blocks, int64_t columns,
                       scalar_t* total) {
  using acc_t = acc_type<scalar_t>;
  constexpr int kSteps = kThreads / kColumns;
  TORCHEXT_SHARED(acc_t, shared, kThreads);
  const int lane = static_cast<int>(threadIdx.x) % kColumns;
  const int first = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  acc_t sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t block = first; block < blocks; block += kSteps) {
      sum += partial[block * columns + column];
    }
  }
  shared[threadIdx.x] = sum;
  sync_block();
  if (first > 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kSteps; ++i) sum += shared[i * kColumns + lane];
  total[column] = from_acc<scalar_t>(sum);
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    relu_of_bias_kernel(const scalar_t* bias, int64_t columns, int64_t count, scalar_t* output) {
  using acc_t = acc_type<scalar_t>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const acc_t x = bias ? to_acc(bias[i % columns]) : acc_t{0};
  output[i] = from_acc<scalar_t>(masked(x, x));
}

template <typename scalar_t, bool kWide>
cudaError_t launch_mask(const ReluMaskArgs& args, cudaStream_t stream) {
  const int64_t accesses = args.columns / Access<scalar_t, kWide>::kSize;
  int lanes = 1;
  while (lanes < 32 && lanes < accesses) lanes *= 2;
  const int64_t column_blocks = ceil_div(accesses, lanes);
  return launch(relu_mask_kernel<scalar_t, kWide>,
                relu_mask_blocks(args.rows, args.columns) * column_blocks, kThreads, 1, stream,
                args, lanes, rows_of_block(args.rows), static_cast<unsigned>(column_blocks));
}

}  // namespace

int64_t relu_mask_blocks(int64_t rows, int64_t columns) {
  return columns == 0 ? 0 : ceil_div(rows, rows_of_block(rows));
}

cudaError_t launch_relu_mask(const ReluMaskArgs& args, Dtype dtype, cudaStream_t stream) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  const bool wide = args.columns * item_bytes(dtype) % 16 == 0 && aligned(args.grad_output) &&
                    aligned(args.output) && aligned(args.grad_linear);
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return wide ? launch_mask<scalar_t, true>(args, stream)
                : launch_mask<scalar_t, false>(args, stream);
  });
}

cudaError_t launch_column_sums(const void* partial, int64_t blocks, int64_t columns, void* total,
                               Dtype dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return launch(column_sums_kernel<scalar_t>, ceil_div(columns, kColumns), kThreads, 1, stream,
                  static_cast<const acc_type<scalar_t>*>(partial), blocks, columns,
                  static_cast<scalar_t*>(total));
  });
}

cudaError_t launch_relu_of_bias(const void* bias, int64_t rows, int64_t columns, void* output,
                                Dtype dtype, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return launch(relu_of_bias_kernel<scalar_t>, ceil_div(rows * columns, kThreads), kThreads, 1,
                  stream, static_cast<const scalar_t*>(bias), columns, rows * columns,
                  static_cast<scalar_t*>(output));
  });
}

}  // namespace torchext::cuda
