// cross_entropy's extras (z_loss, softcap, logit_scale) on CUDA: what the host gives the kernel.
// Formulas: torchext/ops/extras_chunks.py.
#pragma once

#include "cuda/cross_entropy.h"

namespace torchext::cuda {

// acc is the dtype of the sums.
struct ExtrasArgs {
  // Rows (inner is 1). Class weights are acc here; losses and stats are written unless from_stats.
  CrossEntropyArgs rows;
  const void* wide_probabilities;  // acc, in the place of rows.probabilities; or null
  const void* grad_loss;           // acc (positions), or null
  int64_t grad_loss_stride;
  const void* grad_lse;  // likewise
  int64_t grad_lse_stride;
  int64_t* argmax;   // (positions), or null
  bool from_stats;   // gradients alone, from the maxima and sums that are there
  bool wide_stores;  // the gradient's rows are aligned as the logits' are
  Number z_loss;
  Number softcap;  // 0: none
  Number logit_scale;
};

cudaError_t launch_cross_entropy_extras(const ExtrasArgs& args, Dtype dtype, cudaStream_t stream);

}  // namespace torchext::cuda
