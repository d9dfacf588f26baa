// cross_entropy of rows of contiguous classes in two kernels: the loss and the softmax's maximum
// and sum, by blocks that stream a row of any length; and the gradient, from those. The second is
// the backward of every row; together they are the one-read kernels' stand-in where a row does not
// fit (no clusters, more than a cluster's registers).
//
// Bytes moved, for N rows of C classes of b bytes:
//   stream     N C b (the logits) + 8 N (indices) + 12 N (loss, stats); probabilities: + N C b
//   gradient   2 N C b (the logits, the gradient) + 16 N (indices, stats); probabilities: + N C b,
//              and as much before it for their sums (dense mass)
#include "cuda/cross_entropy.cuh"

namespace torchext::cuda {
namespace {

constexpr int kStreamThreads = 512;
constexpr int kStreamItems = 4;  // accesses of a thread that are under way together
constexpr int kThreads = 256;
constexpr int kFewClasses = 64;  // up to here 8 lanes share a row's gradient

// A batch of accesses into the sums so far: one rescaling for all of them.
template <typename scalar_t, bool kWide>
__device__ inline void add_batch(const CrossEntropyArgs& args, Sums<acc_type<scalar_t>>& sums,
                                 const typename Access<scalar_t, kWide>::Raw* raw, int count,
                                 const scalar_t* row, const scalar_t* probabilities, int64_t first,
                                 int64_t step) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  acc_t max = sums.max;
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    if (i >= count) break;
    acc_t x[Memory::kSize];
    Memory::unpack(raw[i], x);
#pragma unroll
    for (int k = 0; k < Memory::kSize; ++k) max = larger(max, x[k]);
  }
  rebase<true>(sums, max);
  const acc_t base = base_of(max);
#pragma unroll
  for (int i = 0; i < kStreamItems; ++i) {
    if (i >= count) break;
    acc_t x[Memory::kSize];
    Memory::unpack(raw[i], x);
#pragma unroll
    for (int k = 0; k < Memory::kSize; ++k) sums.sum += exp_nonpositive(x[k] - base);
    if (args.dense) {
      const int64_t c = (first + i * step) * Memory::kSize;
      const scalar_t* weight = static_cast<const scalar_t*>(args.weight);
      acc_t q[Memory::kSize];
      dense_target<scalar_t, kWide>(args, probabilities ? probabilities + c : nullptr,
                                    weight ? weight + c : nullptr, q);
#pragma unroll
      for (int k = 0; k < Memory::kSize; ++k) {
        sums.mass += q[k];
        sums.dot += q[k] * (x[k] - base);
      }
    }
  }
}

template <typename scalar_t, bool kWide>
__global__ void __launch_bounds__(kStreamThreads, 1)
    cross_entropy_stream_kernel(const __grid_constant__ CrossEntropyArgs args) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  TORCHEXT_SHARED(Sums<acc_t>, of_warps, 32);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t position = blockIdx.x;
  const Place place(args, position);
  const scalar_t* row = static_cast<const scalar_t*>(args.input) + place.in(args.input_strides);
  const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities);
  if (probabilities) probabilities += place.in(args.probability_strides);
  const int64_t accesses = args.classes / Memory::kSize;
  Sums<acc_t> sums = no_sums<acc_t>();
  for (int64_t access = thread; access < accesses; access += kStreamThreads * kStreamItems) {
    typename Memory::Raw raw[kStreamItems];
    int count = 0;
#pragma unroll
    for (int i = 0; i < kStreamItems; ++i) {
      if (access + i * kStreamThreads >= accesses) break;
      raw[i] = Memory::load(row + (access + i * kStreamThreads) * Memory::kSize);
      count = i + 1;
    }
    add_batch<scalar_t, kWide>(args, sums, raw, count, row, probabilities, access, kStreamThreads);
  }
  if (const int64_t rest = accesses * Memory::kSize + thread; rest < args.classes) {
    add_batch<scalar_t, false>(args, sums, row + rest, 1, row, probabilities, rest, 1);
  }
  sums = group_joined<true>(sums, 32);
  if (thread % 32 == 0) of_warps[thread / 32] = sums;
  sync_block();
  if (thread >= 32) return;
  sums = finished(
      group_joined<true>(thread < kStreamThreads / 32 ? of_warps[thread] : no_sums<acc_t>(), 32));
  if (thread > 0) return;
  const auto target = target_of<scalar_t>(args, position, true);
  const acc_t target_x = target.index >= 0 ? to_acc(row[target.index]) : acc_t{0};
  write_loss<scalar_t, true>(args, position, sums, target, target_x);
}

// Accesses of a lane: 2 KiB of a row to a warp.
template <typename scalar_t, bool kWide>
constexpr int kGradientItems = kWide ? 4 : 8;

// Segments of rows, one to a group of lanes; no group needs another.
template <typename scalar_t, bool kWide, bool kDense>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_gradient_kernel(const __grid_constant__ CrossEntropyArgs args, int lanes,
                                  unsigned segments) {
  using acc_t = acc_type<scalar_t>;
  using Memory = Access<scalar_t, kWide>;
  constexpr int kItems = kGradientItems<scalar_t, kWide>;
  constexpr int kSize = Memory::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const unsigned group = thread / lanes;
  const unsigned groups = kThreads / lanes;
  // Groups of a block go along a row, or take rows of their own where one segment is a row.
  const unsigned blocks_of_row = segments == 1 ? 1 : (segments + groups - 1) / groups;
  const int64_t position = segments == 1 ? static_cast<int64_t>(blockIdx.x) * groups + group
                                         : static_cast<int64_t>(blockIdx.x / blocks_of_row);
  const int64_t segment = segments == 1 ? 0 : blockIdx.x % blocks_of_row * groups + group;
  if (position >= args.positions || segment >= segments) return;
  const Place place(args, position);
  const scalar_t* row = static_cast<const scalar_t*>(args.input) + place.in(args.input_strides);
  scalar_t* gradient = static_cast<scalar_t*>(args.gradient) + place.in(args.gradient_strides);
  const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities);
  if (probabilities) probabilities += place.in(args.probability_strides);
  const scalar_t* weight = static_cast<const scalar_t*>(args.weight);

  const int64_t accesses = args.classes / kSize;
  const int64_t first = segment * kItems * lanes + lane;
  typename Memory::Raw raw[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (first + i * lanes < accesses) raw[i] = Memory::load(row + (first + i * lanes) * kSize);
  }
  const auto target = target_of<scalar_t, true>(args, position, segment == 0 && lane == 0);
  const acc_t* stats = static_cast<const acc_t*>(args.stats);
  Sums<acc_t> sums{stats[position], stats[args.stats_stride + position], 0, 0};
  if constexpr (kDense) {
    sums.mass = args.row_mass
                    ? static_cast<const acc_t*>(args.row_mass)[position * args.row_mass_stride]
                    : in_width<acc_t>(args.uniform_mass);
  }
  const auto scale = gradient_scale(args, position, sums, target);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int64_t access = first + i * lanes;
    if (access >= accesses) break;
    acc_t x[kSize];
    Memory::unpack(raw[i], x);
    gradient_of<scalar_t, kWide, kDense>(args, scale, target, access * kSize,
                                         probabilities ? probabilities + access * kSize : nullptr,
                                         weight ? weight + access * kSize : nullptr, x);
    Memory::store(gradient + access * kSize, Memory::pack(x));
  }
  const int64_t rest = accesses * kSize + lane;
  if (segment == 0 && rest < args.classes) {
    acc_t x[1] = {to_acc(row[rest])};
    gradient_of<scalar_t, false, kDense>(args, scale, target, rest,
                                         probabilities ? probabilities + rest : nullptr,
                                         weight ? weight + rest : nullptr, x);
    gradient[rest] = from_acc<scalar_t>(x[0]);
  }
}

template <typename scalar_t, bool kWide>
cudaError_t launch_gradient(const CrossEntropyArgs& args, cudaStream_t stream) {
  const int lanes = args.classes <= kFewClasses ? 8 : 32;
  const int64_t groups = kThreads / lanes;
  const int64_t segment =
      int64_t{lanes} * kGradientItems<scalar_t, kWide> * Access<scalar_t, kWide>::kSize;
  const int64_t segments = ceil_div(args.classes, segment);
  const int64_t blocks = segments == 1 ? ceil_div(args.positions, groups)
                                       : args.positions * ceil_div(segments, groups);
  const auto kernel = args.dense ? cross_entropy_gradient_kernel<scalar_t, kWide, true>
                                 : cross_entropy_gradient_kernel<scalar_t, kWide, false>;
  return launch(kernel, blocks, kThreads, 1, stream, args, lanes, static_cast<unsigned>(segments));
}

// sum q of each position, which the gradient of a row needs before it begins. Threads stand side by
// side along the classes, or along the positions, whichever are contiguous.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, 1)
    cross_entropy_dense_mass_kernel(const __grid_constant__ CrossEntropyArgs args,
                                    acc_type<scalar_t>* mass, int lanes) {
  using acc_t = acc_type<scalar_t>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const int64_t position = static_cast<int64_t>(blockIdx.x) * (kThreads / lanes) + thread / lanes;
  const bool real = position < args.positions;
  const Place place(args, real ? position : 0);
  const scalar_t* probabilities =
      static_cast<const scalar_t*>(args.probabilities) + place.in(args.probability_strides);
  const scalar_t* weight = static_cast<const scalar_t*>(args.weight);
  acc_t sum = 0;
  for (int64_t c = lane; c < args.classes; c += lanes) {
    acc_t q[1];
    dense_target<scalar_t, false>(args, probabilities + c * args.probability_strides.channel,
                                  weight ? weight + c : nullptr, q);
    sum += q[0];
  }
  sum = group_sum(sum, lanes);
  if (real && lane == 0) mass[position] = sum;
}

}  // namespace

cudaError_t launch_cross_entropy_stream(const CrossEntropyArgs& args, Dtype dtype, bool wide,
                                        cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto kernel = wide ? cross_entropy_stream_kernel<scalar_t, true>
                             : cross_entropy_stream_kernel<scalar_t, false>;
    return launch(kernel, args.positions, kStreamThreads, 1, stream, args);
  });
}

cudaError_t launch_cross_entropy_gradient(const CrossEntropyArgs& args, Dtype dtype, bool wide,
                                          cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return wide ? launch_gradient<scalar_t, true>(args, stream)
                : launch_gradient<scalar_t, false>(args, stream);
  });
}

cudaError_t launch_dense_mass(const CrossEntropyArgs& args, Dtype dtype, void* mass,
                              cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    const int lanes = args.probability_strides.channel == 1 ? 32 : 1;
    return launch(cross_entropy_dense_mass_kernel<scalar_t>,
                  ceil_div(args.positions, kThreads / lanes), kThreads, 1, stream, args,
                  static_cast<acc_type<scalar_t>*>(mass), lanes);
  });
}

}  // namespace torchext::cuda
