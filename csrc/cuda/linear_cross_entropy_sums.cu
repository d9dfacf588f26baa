// linear_cross_entropy on CUDA: sums of products in float32, and the bias gradient's column sums,
// in two stages in a fixed order (the second is launch_column_sums of linear_relu.h).
//
// Bytes moved: sums 12 for each element (8 without a sum before), or 8 + b (4 + b) where the result
// is rounded to a dtype of b bytes; column sums N C b read, and 4 C (8 C in double) for each block
// of rows, written and read.
#include "cuda/device.cuh"
#include "cuda/linear_cross_entropy.h"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 8;           // of a thread: 16 bytes of bfloat16
constexpr int64_t kLeastRows = 256;  // of a block of column sums
constexpr int64_t kMostBlocks = 64;
constexpr int kBatch = 4;  // rows whose loads are under way together

template <typename out_t, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    add_product_kernel(const float* sum, const float* product, int64_t count, out_t* total) {
  constexpr int kSize = kWide ? kValues : 1;
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize;
  if (i >= count) return;
  if constexpr (kWide) {
    using In = Access<float, true>;
    using Out = Access<out_t, true>;
    float x[kValues];
#pragma unroll
    for (int k = 0; k < kValues; k += 4) {
      float part[4], before[4] = {};
      In::unpack(In::load(product + i + k), part);
      if (sum) In::unpack(In::load(sum + i + k), before);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[k + j] = before[j] + part[j];
    }
#pragma unroll
    for (int k = 0; k < kValues; k += Out::kSize) {
      float part[Out::kSize];
#pragma unroll
      for (int j = 0; j < Out::kSize; ++j) part[j] = x[k + j];
      Out::store(total + i + k, Out::pack(part));
    }
  } else {
    total[i] = from_acc<out_t>(sum ? sum[i] + product[i] : product[i]);
  }
}

template <typename out_t>
cudaError_t add(const float* sum, const float* product, int64_t count, out_t* total,
                cudaStream_t stream) {
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  if (count % kValues == 0 && aligned(sum) && aligned(product) && aligned(total)) {
    return launch(add_product_kernel<out_t, true>, ceil_div(count / kValues, kThreads), kThreads, 1,
                  stream, sum, product, count, total);
  }
  return launch(add_product_kernel<out_t, false>, ceil_div(count, kThreads), kThreads, 1, stream,
                sum, product, count, total);
}

int64_t rows_of_block(int64_t rows) {
  const int64_t wanted = ceil_div(rows, kMostBlocks);
  return wanted > kLeastRows ? wanted : kLeastRows;
}

// `lanes` threads go along a row, the others take further rows.
template <typename scalar_t, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    partial_column_sums_kernel(const scalar_t* matrix, int64_t rows, int64_t columns,
                               int64_t row_stride, acc_type<scalar_t>* partial,
                               int64_t partial_stride, int lanes, int64_t block_rows,
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
  const bool real = column < columns;  // all of an access or none of it
  const int64_t wanted_end = (row_block + 1) * block_rows;
  const int64_t end = !real ? 0 : wanted_end < rows ? wanted_end : rows;
  matrix += column;

  acc_t sums[kSize] = {};
  for (int64_t row = row_block * block_rows + first; row < end; row += step * kBatch) {
    typename Memory::Raw raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row + i * step < end) raw[i] = Memory::load(matrix + (row + i * step) * row_stride);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (row + i * step >= end) break;
      acc_t x[kSize];
      Memory::unpack(raw[i], x);
#pragma unroll
      for (int k = 0; k < kSize; ++k) sums[k] += x[k];
    }
  }
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
  partial += row_block * partial_stride + column;
#pragma unroll
  for (int k = 0; k < kSize; ++k) partial[k] = mine[k];
}

template <typename scalar_t, bool kWide>
cudaError_t partial_sums_of(const void* matrix, int64_t rows, int64_t columns, int64_t row_stride,
                            void* partial, int64_t partial_stride, cudaStream_t stream) {
  const int64_t accesses = columns / Access<scalar_t, kWide>::kSize;
  int lanes = 1;
  while (lanes < 32 && lanes < accesses) lanes *= 2;
  const int64_t column_blocks = ceil_div(accesses, lanes);
  return launch(partial_column_sums_kernel<scalar_t, kWide>,
                column_sum_blocks(rows) * column_blocks, kThreads, 1, stream,
                static_cast<const scalar_t*>(matrix), rows, columns, row_stride,
                static_cast<acc_type<scalar_t>*>(partial), partial_stride, lanes,
                rows_of_block(rows), static_cast<unsigned>(column_blocks));
}

}  // namespace

cudaError_t launch_add_product(const float* sum, const float* product, int64_t count, float* total,
                               cudaStream_t stream) {
  return add(sum, product, count, total, stream);
}

cudaError_t launch_add_rounded(const float* sum, const float* product, int64_t count, void* total,
                               Dtype dtype, cudaStream_t stream) {
  if (dtype == Dtype::kBFloat16) {
    return add(sum, product, count, static_cast<BFloat16*>(total), stream);
  }
  return add(sum, product, count, static_cast<Half*>(total), stream);
}

int64_t column_sum_blocks(int64_t rows) { return ceil_div(rows, rows_of_block(rows)); }

cudaError_t launch_partial_column_sums(const void* matrix, int64_t rows, int64_t columns,
                                       int64_t row_stride, void* partial, int64_t partial_stride,
                                       Dtype dtype, cudaStream_t stream) {
  const int bytes = item_bytes(dtype);
  const bool wide = columns * bytes % 16 == 0 && row_stride * bytes % 16 == 0 &&
                    reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return wide ? partial_sums_of<scalar_t, true>(matrix, rows, columns, row_stride, partial,
                                                  partial_stride, stream)
                : partial_sums_of<scalar_t, false>(matrix, rows, columns, row_stride, partial,
                                                   partial_stride, stream);
  });
}

}  // namespace torchext::cuda
