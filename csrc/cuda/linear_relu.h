// linear_relu on CUDA: what stands around the matrix products, and its launchers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/launch.h"

namespace torchext::cuda {

// `scalar` is the dtype of the tensors, `acc` of sums: float, or double for double.
struct ReluMaskArgs {
  const void* grad_output;  // scalar (rows, columns)
  const void* output;       // scalar (rows, columns)
  void* grad_linear;        // scalar (rows, columns): grad_output where output > 0; or null
  void* partial;            // acc (relu_mask_blocks(...), columns): sums of rows; or null
  int64_t rows;
  int64_t columns;
};

// Blocks of rows whose column sums stand in `partial`: by the shape alone, so that the sums are the
// same from run to run and from device to device.
int64_t relu_mask_blocks(int64_t rows, int64_t columns);

// The mask, and the column sums of each block of rows, in one pass.
cudaError_t launch_relu_mask(const ReluMaskArgs& args, Dtype dtype, cudaStream_t stream);
// The sums of `blocks` rows of `partial`, in one order, to `total`, scalar (columns).
cudaError_t launch_column_sums(const void* partial, int64_t blocks, int64_t columns, void* total,
                               Dtype dtype, cudaStream_t stream);
// relu(bias) in every row: a product over no features. `bias` may be null.
cudaError_t launch_relu_of_bias(const void* bias, int64_t rows, int64_t columns, void* output,
                                Dtype dtype, cudaStream_t stream);

}  // namespace torchext::cuda
