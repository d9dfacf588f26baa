// cross_entropy where positions, not classes, are contiguous: (N, C, d1, ...) and transposed (N,
// C). A thread has some positions that stand side by side (an access), and every `slices`-th of
// their classes; the slices are joined through shared memory. How many slices there are depends on
// the number of classes alone.
//
// Bytes moved, for P positions of C classes of b bytes:
//   forward                P C b + 8 P (indices) + 12 P (loss, stats)
//   forward and gradient   3 P C b + 12 P (the logits are read again: from the cache while the
//                          blocks that run have no more of them than it holds)
//   gradient from stats    2 P C b + 16 P
//   probabilities are read as often as the logits, and once more before a gradient from stats
#include "cuda/cross_entropy.cuh"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 4;  // classes whose loads are under way together

int slices_of(int64_t classes) {
  if (classes <= 16) return 1;
  if (classes <= 32) return 2;
  if (classes <= 64) return 4;
  return classes <= 1024 ? 8 : 32;
}

// q of class c, for each of a thread's positions.
template <typename scalar_t, bool kWide>
__device__ inline void column_target(const CrossEntropyArgs& args, const scalar_t* probabilities,
                                     int64_t c,
                                     acc_type<scalar_t> (&q)[Access<scalar_t, kWide>::kSize]) {
  if (probabilities) probabilities += c * args.probability_strides.channel;
  dense_target<scalar_t, kWide>(args, probabilities, nullptr, q);
  if (args.weight == nullptr) return;
  const auto weight = to_acc(static_cast<const scalar_t*>(args.weight)[c]);
#pragma unroll
  for (int k = 0; k < Access<scalar_t, kWide>::kSize; ++k) q[k] *= weight;
}

// The sums of a thread's classes, for each of its positions.
template <typename scalar_t, bool kWide, bool kDense>
__device__ inline void sum_columns(
    const CrossEntropyArgs& args, const scalar_t* column, const scalar_t* probabilities,
    int64_t begin, int64_t slices,
    Sums<acc_type<scalar_t>> (&sums)[Access<scalar_t, kWide>::kSize]) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  constexpr int kSize = Memory::kSize;
  for (int64_t from = begin; from < args.classes; from += slices * kBatch) {
    acc_t x[kBatch][kSize];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t c = from + i * slices;
      if (c < args.classes) {
        Memory::unpack(Memory::load(column + c * args.input_strides.channel), x[i]);
      } else {
#pragma unroll
        for (int k = 0; k < kSize; ++k) x[i][k] = -kInfinity<acc_t>;
      }
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      acc_t max = sums[k].max;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) max = larger(max, x[i][k]);
      rebase<kDense>(sums[k], max);
      const acc_t base = base_of(max);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        x[i][k] -= base;
        sums[k].sum += exp_nonpositive(x[i][k]);
      }
    }
    if constexpr (kDense) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t c = from + i * slices;
        if (c >= args.classes) break;
        acc_t q[kSize];
        column_target<scalar_t, kWide>(args, probabilities, c, q);
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          sums[k].mass += q[k];
          sums[k].dot += q[k] * x[i][k];
        }
      }
    }
  }
}

template <typename scalar_t, bool kWide, bool kDense>
__global__ void __launch_bounds__(kThreads, 2)
    cross_entropy_column_kernel(const __grid_constant__ CrossEntropyArgs args, int slices,
                                bool from_stats) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  constexpr int kSize = Memory::kSize;
  TORCHEXT_SHARED(Sums<acc_t>, shared, kThreads * kSize);
  const int lanes = kThreads / slices;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  const int slice = static_cast<int>(threadIdx.x) / lanes;
  const int64_t wanted = (static_cast<int64_t>(blockIdx.x) * lanes + lane) * kSize;
  const bool real = wanted < args.positions;  // all of an access or none of it
  const int64_t position = real ? wanted : 0;
  const Place place(args, position);
  const scalar_t* column = static_cast<const scalar_t*>(args.input) + place.in(args.input_strides);
  const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities);
  if (probabilities) probabilities += place.in(args.probability_strides);

  Target<scalar_t> target[kSize];
  const auto find_targets = [&] {
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      target[k] = target_of<scalar_t>(args, position + k, real && slice == 0);
    }
  };
  Sums<acc_t> sums[kSize];
  if (from_stats) {
    find_targets();
    const acc_t* stats = static_cast<const acc_t*>(args.stats);
    const acc_t* mass = static_cast<const acc_t*>(args.row_mass);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[k] = {stats[position + k], stats[args.stats_stride + position + k], 0, 0};
      if constexpr (kDense) {
        sums[k].mass =
            mass ? mass[(position + k) * args.row_mass_stride] : in_width<acc_t>(args.uniform_mass);
      }
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSize; ++k) sums[k] = no_sums<acc_t>();
    sum_columns<scalar_t, kWide, kDense>(args, column, probabilities, slice, slices, sums);
    find_targets();
    // Before the last barrier: the gradient may overwrite the logits behind it.
    acc_t target_x[kSize];
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const bool wanted_x = slice == 0 && target[k].index >= 0;
      target_x[k] =
          wanted_x ? to_acc(column[target[k].index * args.input_strides.channel + k]) : acc_t{0};
    }
    Sums<acc_t>* mine = shared + (slice * lanes + lane) * kSize;
#pragma unroll
    for (int k = 0; k < kSize; ++k) mine[k] = sums[k];
    for (int half = slices / 2; half > 0; half /= 2) {
      sync_block();
      if (slice < half) {
#pragma unroll
        for (int k = 0; k < kSize; ++k) {
          mine[k] = joined<kDense>(mine[k], mine[half * lanes * kSize + k]);
        }
      }
    }
    sync_block();
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums[k] = finished(shared[lane * kSize + k]);
      if (real && slice == 0) {
        write_loss<scalar_t, kDense>(args, position + k, sums[k], target[k], target_x[k]);
      }
    }
  }
  if (args.gradient == nullptr || !real) return;

  GradientScale<acc_t> scale[kSize];
#pragma unroll
  for (int k = 0; k < kSize; ++k) scale[k] = gradient_scale(args, position + k, sums[k], target[k]);
  scalar_t* gradient = static_cast<scalar_t*>(args.gradient) + place.in(args.gradient_strides);
#pragma unroll 2
  for (int64_t c = slice; c < args.classes; c += slices) {
    acc_t x[kSize];
    Memory::unpack(Memory::load(column + c * args.input_strides.channel), x);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      x[k] = exp_nonpositive(x[k] - scale[k].max) * scale[k].scale;
    }
    acc_t q[kSize];
    if constexpr (kDense) column_target<scalar_t, kWide>(args, probabilities, c, q);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      const acc_t at_target = c == target[k].index ? scale[k].at_target : acc_t{0};
      if constexpr (kDense) {
        x[k] -= (q[k] + at_target) * scale[k].g;
      } else if (c == target[k].index) {
        x[k] -= at_target * scale[k].g;  // elsewhere 0 times an infinite g would be NaN
      }
    }
    Memory::store(gradient + c * args.gradient_strides.channel, Memory::pack(x));
  }
}

// Whether accesses of 16 bytes fit: positions in whole accesses, and all of them aligned.
bool wide_columns(const CrossEntropyArgs& args, Dtype dtype) {
  const int bytes = item_bytes(dtype);
  const auto aligned = [&](const void* data, const Strides& strides) {
    return data == nullptr ||
           (reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.channel * bytes % 16 == 0 &&
            (args.positions == args.inner || strides.outer * bytes % 16 == 0));
  };
  return args.inner * bytes % 16 == 0 && aligned(args.input, args.input_strides) &&
         aligned(args.probabilities, args.probability_strides) &&
         aligned(args.gradient, args.gradient_strides);
}

template <typename scalar_t, bool kWide>
cudaError_t launch_columns(const CrossEntropyArgs& args, bool from_stats, cudaStream_t stream) {
  const int slices = slices_of(args.classes);
  const int64_t positions = int64_t{kThreads / slices} * Access<scalar_t, kWide>::kSize;
  const auto kernel = args.dense ? cross_entropy_column_kernel<scalar_t, kWide, true>
                                 : cross_entropy_column_kernel<scalar_t, kWide, false>;
  return launch(kernel, ceil_div(args.positions, positions), kThreads, 1, stream, args, slices,
                from_stats);
}

}  // namespace

cudaError_t launch_cross_entropy_columns(const CrossEntropyArgs& args, Dtype dtype, bool from_stats,
                                         cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return wide_columns(args, dtype) ? launch_columns<scalar_t, true>(args, from_stats, stream)
                                     : launch_columns<scalar_t, false>(args, from_stats, stream);
  });
}

}  // namespace torchext::cuda
