// cross_entropy's extras of rows of contiguous classes: a row by one block, once for its sums, and
// again for its gradient.
//
// Bytes moved, for N rows of C classes of b bytes:
//   loss                N C b (the logits) + 8 N (indices) + 12 N (loss, stats)
//   argmax              + N C b (from the cache, as far as that holds the rows under way)
//   gradient            + 2 N C b (the logits, likewise, and the gradient)
//   probabilities       + as many of theirs as of the logits
#include "cuda/cross_entropy_extras.h"

#include "cuda/cross_entropy.cuh"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 512;

template <typename acc_t>
__device__ inline bool is_infinite(acc_t x) {
  return x == kInfinity<acc_t> || x == -kInfinity<acc_t>;
}

// What becomes of a logit: it is scaled, then capped.
template <typename acc_t>
class Transform {
 public:
  __device__ explicit Transform(const ExtrasArgs& args)
      : scale_(in_width<acc_t>(args.logit_scale)), cap_(in_width<acc_t>(args.softcap)) {}

  // And softcap's derivative: of tanh itself, whose product with the cap is rounded once more.
  __device__ acc_t operator()(acc_t x, acc_t& slope) const {
    const acc_t z = x * scale_;
    slope = 1;
    if (cap_ == acc_t{0}) return z;
    const acc_t t = hyperbolic_tangent(z / cap_);
    slope = acc_t{1} - t * t;
    return cap_ * t;
  }
  __device__ acc_t operator()(acc_t x) const {
    acc_t slope;
    return (*this)(x, slope);
  }

 private:
  acc_t scale_, cap_;
};

// Calls `body` with the logits of each access of the running thread, and the first one's class.
template <typename scalar_t, bool kWide, typename Body>
__device__ inline void for_each_access(const scalar_t* row, int64_t classes, const Body& body) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  const int64_t accesses = classes / Memory::kSize;
#pragma unroll 2
  for (int64_t access = threadIdx.x; access < accesses; access += blockDim.x) {
    acc_t x[Memory::kSize];
    Memory::unpack(Memory::load(row + access * Memory::kSize), x);
    body(x, access * Memory::kSize);
  }
  if (const int64_t rest = accesses * Memory::kSize + threadIdx.x; rest < classes) {
    acc_t x[1] = {to_acc(row[rest])};
    body(x, rest);
  }
}

// Of all threads of the block, in one order.
template <typename acc_t>
__device__ inline Sums<acc_t> block_joined(Sums<acc_t> sums) {
  TORCHEXT_SHARED(Sums<acc_t>, of_warps, kThreads / 32);
  TORCHEXT_SHARED(Sums<acc_t>, of_row, 1);
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int thread = static_cast<int>(threadIdx.x);
  sums = group_joined<true>(sums, 32);
  if (thread % 32 == 0) of_warps[thread / 32] = sums;
  sync_block();
  if (thread < 32) {
    sums = group_joined<true>(thread < warps ? of_warps[thread] : no_sums<acc_t>(), 32);
    if (thread == 0) of_row[0] = sums;
  }
  sync_block();
  return of_row[0];
}

__device__ inline int64_t block_smallest(int64_t value) {
  TORCHEXT_SHARED(int64_t, of_warps, kThreads / 32);
  for (int offset = 16; offset > 0; offset /= 2) {
    const int64_t other = shuffle_xor(value, offset);
    if (other < value) value = other;
  }
  sync_block();  // what an earlier call left has been read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  sync_block();
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) {
    if (of_warps[warp] < value) value = of_warps[warp];
  }
  return value;
}

// q_c, but for the class index.
template <typename scalar_t>
__device__ inline acc_type<scalar_t> dense_target(const ExtrasArgs& args, int64_t position,
                                                  int64_t c) {
  using acc_t = acc_type<scalar_t>;
  acc_t q = in_width<acc_t>(args.rows.uniform);
  const int64_t at = position * args.rows.probability_strides.outer + c;
  if (args.rows.probabilities) {
    q += in_width<acc_t>(args.rows.kept) *
         to_acc(static_cast<const scalar_t*>(args.rows.probabilities)[at]);
  } else if (args.wide_probabilities) {
    q += in_width<acc_t>(args.rows.kept) * static_cast<const acc_t*>(args.wide_probabilities)[at];
  }
  if (args.rows.weight) q *= static_cast<const acc_t*>(args.rows.weight)[c];
  return q;
}

// The sums of the transformed logits that the running thread has.
template <typename scalar_t, bool kWide>
__device__ inline Sums<acc_type<scalar_t>> sums_of(const ExtrasArgs& args, int64_t position,
                                                   const scalar_t* row,
                                                   const Transform<acc_type<scalar_t>>& transform) {
  using acc_t = acc_type<scalar_t>;
  Sums<acc_t> sums = no_sums<acc_t>();
  for_each_access<scalar_t, kWide>(row, args.rows.classes, [&](auto& x, int64_t c) {
    constexpr int kSize = sizeof(x) / sizeof(x[0]);
    acc_t max = sums.max;
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      x[k] = transform(x[k]);
      max = larger(max, x[k]);
    }
    rebase<true>(sums, max);
    const acc_t base = base_of(max);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      sums.sum += exp_nonpositive(x[k] - base);
      if (args.rows.dense) {
        const acc_t q = dense_target<scalar_t>(args, position, c + k);
        sums.mass += q;
        sums.dot += q * (x[k] - base);
      }
    }
  });
  return sums;
}

template <typename scalar_t, bool kWide>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_extras_kernel(const __grid_constant__ ExtrasArgs args) {
  using acc_t = acc_type<scalar_t>;
  const int64_t position = blockIdx.x;
  const int64_t classes = args.rows.classes;
  const bool first = threadIdx.x == 0;
  const scalar_t* row =
      static_cast<const scalar_t*>(args.rows.input) + position * args.rows.input_strides.outer;
  const Transform<acc_t> transform(args);
  const auto target = target_of<acc_t>(args.rows, position, first);
  acc_t* stats = static_cast<acc_t*>(args.rows.stats);
  Sums<acc_t> sums = no_sums<acc_t>();
  if (args.from_stats) {
    if (args.rows.dense) {
      for (int64_t c = threadIdx.x; c < classes; c += blockDim.x) {
        sums.mass += dense_target<scalar_t>(args, position, c);
      }
      sums = block_joined(sums);
    }
    sums.max = stats[position];
    sums.sum = stats[args.rows.stats_stride + position];
  } else {
    // Before any gradient is written, which may take the place of the logits.
    const acc_t target_z =
        first && target.index >= 0 ? transform(to_acc(row[target.index])) : acc_t{0};
    sums = finished(block_joined(sums_of<scalar_t, kWide>(args, position, row, transform)));
    if (args.argmax || is_infinite(sums.max)) {
      // As torch's: the first NaN, or the first of the largest.
      int64_t nan = classes, largest = classes;
      for_each_access<scalar_t, kWide>(row, classes, [&](auto& x, int64_t c) {
        constexpr int kSize = sizeof(x) / sizeof(x[0]);
        for (int k = kSize - 1; k >= 0; --k) {
          const acc_t z = transform(x[k]);
          if (z != z && c + k < nan) nan = c + k;
          if (z == sums.max && c + k < largest) largest = c + k;
        }
      });
      nan = block_smallest(nan);
      largest = block_smallest(largest);
      if (first && args.argmax) args.argmax[position] = nan < classes ? nan : largest;
      // A maximum passes NaN over: of finite logits it is in the sum, which is NaN here.
      if (nan < classes && is_infinite(sums.max)) sums.max = kNaN<acc_t>;
    }
    if (first) {
      const acc_t log_sum = logarithm(sums.sum);
      const acc_t z_loss = in_width<acc_t>(args.z_loss);
      acc_t loss = 0;
      if (target.index >= 0) loss = target.weight * (log_sum - (target_z - base_of(sums.max)));
      if (args.rows.dense) loss += sums.mass * log_sum - sums.dot;
      if (z_loss != acc_t{0}) {
        const acc_t lse = is_infinite(sums.max) ? sums.max : sums.max + log_sum;
        loss += z_loss * (lse * lse);
      }
      static_cast<acc_t*>(args.rows.losses)[position] = target.ignored ? acc_t{0} : loss;
      stats[position] = sums.max;
      stats[args.rows.stats_stride + position] = sums.sum;
    }
  }
  if (args.rows.gradient == nullptr) return;

  const acc_t inner = in_width<acc_t>(args.logit_scale);
  const acc_t z_loss = in_width<acc_t>(args.z_loss);
  acc_t g = 0, scale = 0;
  if (args.grad_loss && !target.ignored) {
    g = inner * static_cast<const acc_t*>(args.grad_loss)[position * args.grad_loss_stride];
    acc_t share = target.weight + sums.mass;
    if (z_loss != acc_t{0}) {
      const acc_t lse = is_infinite(sums.max) ? sums.max : sums.max + logarithm(sums.sum);
      share += 2 * z_loss * lse;
    }
    scale = g * share;
  }
  if (args.grad_lse) {
    scale += inner * static_cast<const acc_t*>(args.grad_lse)[position * args.grad_lse_stride];
  }
  scale /= sums.sum;  // of an ignored row 0, or NaN where its softmax is (as in torch)
  const acc_t base = base_of(sums.max);
  scalar_t* gradient =
      static_cast<scalar_t*>(args.rows.gradient) + position * args.rows.gradient_strides.outer;
  for_each_access<scalar_t, kWide>(row, classes, [&](auto& x, int64_t c) {
    constexpr int kSize = sizeof(x) / sizeof(x[0]);
#pragma unroll
    for (int k = 0; k < kSize; ++k) {
      acc_t slope;
      const acc_t z = transform(x[k], slope);
      const bool at_target = c + k == target.index;
      acc_t value = exp_nonpositive(z - base) * scale;
      if (args.rows.dense || at_target) {  // elsewhere 0 times an infinite g would be NaN
        acc_t q = at_target ? target.weight : acc_t{0};
        if (args.rows.dense) q += dense_target<scalar_t>(args, position, c + k);
        value -= q * g;
      }
      x[k] = value * slope;
    }
    if constexpr (kSize > 1) {
      if (args.wide_stores) {
        store_wide(gradient + c, Access<scalar_t, true>::pack(x));
        return;
      }
    }
#pragma unroll
    for (int k = 0; k < kSize; ++k) gradient[c + k] = from_acc<scalar_t>(x[k]);
  });
}

}  // namespace

cudaError_t launch_cross_entropy_extras(const ExtrasArgs& args, Dtype dtype, cudaStream_t stream) {
  const int bytes = item_bytes(dtype);
  const auto aligned = [&](const void* data, const Strides& strides) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && strides.outer * bytes % 16 == 0;
  };
  // Of the logits alone: the sums have the same order, and bits, whatever is written.
  const bool wide = aligned(args.rows.input, args.rows.input_strides);
  const int64_t warps = ceil_div(ceil_div(args.rows.classes, wide ? 16 / bytes : 1), 32);
  const int threads = static_cast<int>(warps < kThreads / 32 ? warps * 32 : kThreads);
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto kernel = wide ? cross_entropy_extras_kernel<scalar_t, true>
                             : cross_entropy_extras_kernel<scalar_t, false>;
    ExtrasArgs call = args;
    call.wide_stores = aligned(args.rows.gradient, args.rows.gradient_strides);
    return launch(kernel, args.rows.positions, threads, 1, stream, call);
  });
}

}  // namespace torchext::cuda
