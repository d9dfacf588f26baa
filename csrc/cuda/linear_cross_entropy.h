// linear_cross_entropy on CUDA: what stands around its products, and its launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/cross_entropy.h"

namespace torchext::cuda {

constexpr int kMostPieces = 4;

// Logits in pieces: all rows of the classes from begin[i] on are a matrix of their own.
struct Pieces {
  int count;
  int begin[kMostPieces];
  void* data[kMostPieces];      // scalar: where class 0 would be
  int row_stride[kMostPieces];  // elements
};

// A row's losses, stats and gradient (in the logits' place) with one read of the logits, wherever
// their pieces are. args.input, args.gradient and their strides are not looked at; a piece begins
// at a multiple of 16 bytes, and so does each of its rows; `plan` is one that may_have_pieces.
bool may_have_pieces(const RowPlan& plan);
cudaError_t launch_cross_entropy_pieces(const CrossEntropyArgs& args, const Pieces& pieces,
                                        Dtype dtype, const RowPlan& plan, cudaStream_t stream);

// sum + product (sum may be null), float (count), to float, or rounded to `dtype`.
cudaError_t launch_add_product(const float* sum, const float* product, int64_t count, float* total,
                               cudaStream_t stream);
cudaError_t launch_add_rounded(const float* sum, const float* product, int64_t count, void* total,
                               Dtype dtype, cudaStream_t stream);

// Blocks of rows whose column sums are made first: by the number of rows alone.
int64_t column_sum_blocks(int64_t rows);
// The sums of each block of a matrix's rows, to partial (blocks, partial_stride), acc.
cudaError_t launch_partial_column_sums(const void* matrix, int64_t rows, int64_t columns,
                                       int64_t row_stride, void* partial, int64_t partial_stride,
                                       Dtype dtype, cudaStream_t stream);

}  // namespace torchext::cuda
