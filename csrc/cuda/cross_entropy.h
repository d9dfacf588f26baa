// cross_entropy on CUDA: what the host gives the kernels, and their launchers. No torch header:
// device code is compiled once for every architecture, and torch's headers take ten seconds each.
//
// Formulas, for a row x with maximum m and S = sum_c exp(x_c - m):
//
//   loss       = W_t (log S - (x_t - m)) + sum_c q_c (log S - (x_c - m))
//   gradient_c = g (exp(x_c - m) (W_t + sum q) / S - q_c - [c = t] W_t)
//
// with W_t = (1 - smoothing) weight_t of a class index t (0 for probabilities), the dense target
// q_c = weight_c ((1 - smoothing) probability_c + smoothing / C) (none for a plain class index),
// and g the gradient of the row's loss.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/strides.h"
#include "cuda/launch.h"

namespace torchext::cuda {

// A number of the host's in both widths: kernels take the one that they compute in.
struct Number {
  double wide;
  float narrow;

  Number() = default;
  explicit Number(double value) : wide(value), narrow(static_cast<float>(value)) {}
};

// What a mean divides by, where only the device knows it.
struct Mean {
  double mass;     // the number of targets, or the weight of them
  double inverse;  // of the mass; NaN where that is 0, as in torch
  float inverse_narrow;
};

// `scalar` is the dtype of the tensors, `acc` of sums: float, or double for double.
struct CrossEntropyArgs {
  int64_t positions;  // N * S
  int64_t classes;    // C
  int64_t inner;      // S
  // Where `classes` are a part of the row's: the first of them, and how many the row has. Kernels
  // that begin with stats can do that.
  int64_t first_class;
  int64_t all_classes;

  const void* input;  // scalar
  Strides input_strides;
  const void* probabilities;  // scalar, or null
  Strides probability_strides;
  const void* indices;  // contiguous int64, int32 or uint8 (positions), or null
  int index_bytes;
  int64_t ignore_index;
  const void* weight;   // scalar (C), or null
  Number kept;          // 1 - smoothing
  Number uniform;       // smoothing / C
  Number uniform_mass;  // sum q of a class index without weights: the smoothing

  void* gradient;  // scalar, null where none is wanted; may be the input
  Strides gradient_strides;
  bool wide;                // the loss and grad_output are acc, not scalar
  const void* grad_output;  // or null
  int64_t grad_output_stride;
  Number gradient_scale;  // g is the product of this,
  const Mean* mean;       // its inverse where not null, and grad_output
  void* loss_values;      // scalar (positions), or null
  void* losses;           // acc (positions), or null
  void* stats;            // acc: maxima of the positions and, stats_stride on, sums; or null
  int64_t stats_stride;
  const void* row_mass;  // acc: sum q, where a gradient is made of stats; null: uniform_mass
  int64_t row_mass_stride;
  bool dense;  // probabilities or smoothing
};

// How rows of contiguous classes are computed. It depends on the layout alone, never on the number
// of rows: a row's bits do not depend on the batch that it stands in.
enum class RowRoute {
  kGroup,    // 8 or 32 lanes of a warp keep a row in registers
  kBlock,    // a block, or a cluster of blocks, keeps it
  kTwoPass,  // it is read again for the gradient
};

struct RowPlan {
  RowRoute route;
  bool wide;    // 16 bytes an access; else one element
  int threads;  // of a block, or the lanes of a group
  int cluster;  // blocks
};

// Most blocks of a cluster on a device: 1 where it has no clusters.
int largest_cluster(int device);

RowPlan plan_rows(const CrossEntropyArgs& args, Dtype dtype, int largest_cluster);

// Losses, stats and, where wanted, gradients of rows; not on RowRoute::kTwoPass.
cudaError_t launch_cross_entropy_rows(const CrossEntropyArgs& args, Dtype dtype,
                                      const RowPlan& plan, cudaStream_t stream);
// Losses and stats of rows of any length.
cudaError_t launch_cross_entropy_stream(const CrossEntropyArgs& args, Dtype dtype, bool wide,
                                        cudaStream_t stream);
// Gradients of rows, from stats.
cudaError_t launch_cross_entropy_gradient(const CrossEntropyArgs& args, Dtype dtype, bool wide,
                                          cudaStream_t stream);
// All of it where positions, not classes, are contiguous. `from_stats`: gradients alone.
cudaError_t launch_cross_entropy_columns(const CrossEntropyArgs& args, Dtype dtype, bool from_stats,
                                         cudaStream_t stream);

// Sums in a fixed order. `partial` has partial_sums(count) pairs of doubles.
int64_t partial_sums(int64_t count);
// The weight of the targets.
cudaError_t launch_target_mass(const CrossEntropyArgs& args, Dtype dtype, double* partial,
                               Mean* mean, cudaStream_t stream);
// The sum of args.losses, or its mean over args.mean's mass, or over `mass` (negative: over the
// weight of the targets), to `loss` in the tensors' dtype.
cudaError_t launch_loss_total(const CrossEntropyArgs& args, Dtype dtype, bool mean, double mass,
                              double* partial, void* loss, cudaStream_t stream);
// sum_c weight_c smoothing / C, to one acc.
cudaError_t launch_uniform_mass(const CrossEntropyArgs& args, Dtype dtype, void* mass,
                                cudaStream_t stream);
// sum q of each row of probabilities, to acc (positions).
cudaError_t launch_dense_mass(const CrossEntropyArgs& args, Dtype dtype, void* mass,
                              cudaStream_t stream);

}  // namespace torchext::cuda
