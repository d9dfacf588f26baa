// Sums over the positions, in double and in one fixed order: the weight of the targets that a mean
// divides by, and the loss. Nothing of it comes back to the host.
//
// Bytes moved, for N positions: 8 N (indices) and, for a loss, 4 N (8 N in double), once; two
// numbers more for every kPerBlock of them. The uniform mass: C b (the weights).
#include "cuda/cross_entropy.cuh"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int64_t kPerBlock = 32768;  // positions: one block, and one kernel, up to here

struct Totals {
  double loss;
  double mass;
};

// What becomes of the totals: one of the two is not null.
struct Result {
  Mean* mean;
  void* loss;  // acc where args.wide, else scalar
  bool divides;
  double mass;  // what the loss is divided by; negative: the weight of the targets
};

__device__ inline Totals block_total(Totals totals) {
  TORCHEXT_SHARED(Totals, of_warps, 32);
  const int thread = static_cast<int>(threadIdx.x);
  totals = {group_sum(totals.loss), group_sum(totals.mass)};
  if (thread % 32 == 0) of_warps[thread / 32] = totals;
  sync_block();
  totals = of_warps[thread % 32];
  return {group_sum(totals.loss), group_sum(totals.mass)};
}

// NaN over no target, and over targets of no weight, as in torch.
__device__ inline double over(double value, double mass) {
  return mass == 0 ? kNaN<double> : value / mass;
}

template <typename scalar_t>
__device__ inline void finish(const CrossEntropyArgs& args, const Result& result,
                              const Totals& totals) {
  if (result.mean) {
    const double inverse = over(1.0, totals.mass);
    *result.mean = {totals.mass, inverse, static_cast<float>(inverse)};
    return;
  }
  double loss = totals.loss;
  if (result.divides) {
    const double known = args.mean ? args.mean->mass : result.mass;
    loss = over(loss, known < 0 ? totals.mass : known);
  }
  const auto value = static_cast<acc_type<scalar_t>>(loss);
  if (args.wide) {
    *static_cast<acc_type<scalar_t>*>(result.loss) = value;
  } else {
    *static_cast<scalar_t*>(result.loss) = from_acc<scalar_t>(value);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_totals_kernel(const __grid_constant__ CrossEntropyArgs args, Result result,
                                Totals* partial) {
  using acc_t = acc_type<scalar_t>;
  const int64_t begin = blockIdx.x * kPerBlock;
  const int64_t end = begin + kPerBlock < args.positions ? begin + kPerBlock : args.positions;
  const bool counts = result.mean || (result.divides && !args.mean && result.mass < 0);
  Totals totals{0, 0};
#pragma unroll 4
  for (int64_t p = begin + threadIdx.x; p < end; p += kThreads) {
    if (result.loss) totals.loss += static_cast<double>(static_cast<const acc_t*>(args.losses)[p]);
    if (!counts) continue;
    const int64_t t = class_index(args, p);
    const int64_t n_classes = args.classes;
    if (t == args.ignore_index) continue;
    const bool inside = t >= 0 && t < n_classes;
    if (!inside) assert(t >= 0 && t < n_classes);
    if (args.weight == nullptr) {
      totals.mass += 1.0;
    } else if (inside) {
      totals.mass += static_cast<double>(to_acc(static_cast<const scalar_t*>(args.weight)[t]));
    }
  }
  totals = block_total(totals);
  if (threadIdx.x != 0) return;
  if (partial) {
    partial[blockIdx.x] = totals;
  } else {
    finish<scalar_t>(args, result, totals);
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_join_kernel(const __grid_constant__ CrossEntropyArgs args, Result result,
                              const Totals* partial, int64_t count) {
  Totals totals{0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    totals.loss += partial[i].loss;
    totals.mass += partial[i].mass;
  }
  totals = block_total(totals);
  if (threadIdx.x == 0) finish<scalar_t>(args, result, totals);
}

cudaError_t launch_totals(const CrossEntropyArgs& args, Dtype dtype, const Result& result,
                          double* partial, cudaStream_t stream) {
  const int64_t blocks = ceil_div(args.positions, kPerBlock);
  Totals* const parts = blocks > 1 ? reinterpret_cast<Totals*>(partial) : nullptr;
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const cudaError_t error = launch(cross_entropy_totals_kernel<scalar_t>, blocks > 0 ? blocks : 1,
                                     kThreads, 1, stream, args, result, parts);
    if (error != cudaSuccess || parts == nullptr) return error;
    return launch(cross_entropy_join_kernel<scalar_t>, 1, kThreads, 1, stream, args, result, parts,
                  blocks);
  });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_uniform_mass_kernel(const __grid_constant__ CrossEntropyArgs args,
                                      acc_type<scalar_t>* mass) {
  double sum = 0;
  for (int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
    sum += static_cast<double>(to_acc(static_cast<const scalar_t*>(args.weight)[c]));
  }
  sum = block_total({0, sum}).mass;
  // Of one class this is q itself.
  const double uniform = in_width<acc_type<scalar_t>>(args.uniform);
  if (threadIdx.x == 0) *mass = static_cast<acc_type<scalar_t>>(sum * uniform);
}

}  // namespace

int64_t partial_sums(int64_t count) {
  const int64_t blocks = ceil_div(count, kPerBlock);
  return blocks > 1 ? blocks : 0;
}

cudaError_t launch_target_mass(const CrossEntropyArgs& args, Dtype dtype, double* partial,
                               Mean* mean, cudaStream_t stream) {
  return launch_totals(args, dtype, {mean, nullptr, false, -1}, partial, stream);
}

cudaError_t launch_loss_total(const CrossEntropyArgs& args, Dtype dtype, bool mean, double mass,
                              double* partial, void* loss, cudaStream_t stream) {
  return launch_totals(args, dtype, {nullptr, loss, mean, mass}, partial, stream);
}

cudaError_t launch_uniform_mass(const CrossEntropyArgs& args, Dtype dtype, void* mass,
                                cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return launch(cross_entropy_uniform_mass_kernel<scalar_t>, 1, kThreads, 1, stream, args,
                  static_cast<acc_type<scalar_t>*>(mass));
  });
}

}  // namespace torchext::cuda
