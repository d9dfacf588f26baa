// cross_entropy of rows of contiguous classes that stay in registers: by groups of lanes, by blocks
// and by clusters of blocks. A row is read once, whether its gradient is wanted or not.
//
// Bytes moved, for N rows of C classes of b bytes:
//   forward                N C b (the logits) + 8 N (indices) + 12 N (loss, stats)
//   forward and gradient   2 N C b (the logits, the gradient) + 8 N + 4 N
//   probabilities          + N C b in the forward, + 2 N C b with the gradient (read again, from
//                          the cache where a row fits)
#include "cuda/cross_entropy_block.cuh"

namespace torchext::cuda {
namespace {

constexpr int kGroupThreads = 256;
constexpr int kFewClasses = 64;      // up to here 8 lanes share a row
constexpr int kGroupClasses = 1024;  // up to here a warp
constexpr int kPortableCluster = 8;  // a larger one may be refused

constexpr int most_group_classes(int bytes) {
  return bytes == 8 ? kGroupClasses / 2 : kGroupClasses;
}

template <typename scalar_t, bool kWide>
constexpr int kGroupItems =
    most_group_classes(sizeof(scalar_t)) / 32 / Access<scalar_t, kWide>::kSize;

template <typename scalar_t, bool kWide, bool kDense>
__global__ void __launch_bounds__(kGroupThreads, 1)
    cross_entropy_group_kernel(const __grid_constant__ CrossEntropyArgs args, int lanes) {
  using Part_ = Slice<scalar_t, kWide, kDense, kGroupItems<scalar_t, kWide>>;
  using acc_t = acc_type<scalar_t>;
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % lanes;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / lanes) + thread / lanes;
  // A group beyond the last row computes that row again and writes nothing: shuffles need it.
  const bool writes = group < args.positions;
  const int64_t position = writes ? group : args.positions - 1;
  const Place place(args, position);
  const WholeRows<scalar_t> rows{args, place};
  const auto row = rows.input();
  const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities);
  if (probabilities) probabilities += place.in(args.probability_strides);

  const Part part = Part::of<Part_::kSize>(args.classes, lane, lanes);
  Part_ slice;
  slice.load(row, part);
  const auto target = target_of<scalar_t>(args, position, lane == 0 && writes);
  const acc_t target_x = target.index >= 0 ? to_acc(*row.at(target.index)) : acc_t{0};
  const acc_t max = group_max(slice.max(part), lanes);
  Sums<acc_t> sums = slice.sums(args, max, part, probabilities);
  sums.sum = group_sum(sums.sum, lanes);
  if constexpr (kDense) {
    sums.mass = group_sum(sums.mass, lanes);
    sums.dot = group_sum(sums.dot, lanes);
  }
  if (!writes) return;
  sums = finished(sums);
  if (lane == 0) write_loss<scalar_t, kDense>(args, position, sums, target, target_x);
  if (args.gradient == nullptr) return;
  slice.write_gradient(args, gradient_scale(args, position, sums, target), target, part,
                       probabilities, rows.gradient());
}

template <typename scalar_t, bool kWide, bool kDense>
__global__ void __launch_bounds__(most_threads(sizeof(scalar_t), kDense), 1)
    cross_entropy_block_kernel(const __grid_constant__ CrossEntropyArgs args) {
  const int64_t position = position_of_block();
  const Place place(args, position);
  row_by_blocks<scalar_t, kWide, kDense>(args, position, place, WholeRows<scalar_t>{args, place});
}

template <typename scalar_t, bool kWide>
cudaError_t launch_rows(const CrossEntropyArgs& args, const RowPlan& plan, cudaStream_t stream) {
  if (plan.route == RowRoute::kGroup) {
    const int64_t blocks = ceil_div(args.positions, kGroupThreads / plan.threads);
    const auto kernel = args.dense ? cross_entropy_group_kernel<scalar_t, kWide, true>
                                   : cross_entropy_group_kernel<scalar_t, kWide, false>;
    return launch(kernel, blocks, kGroupThreads, 1, stream, args, plan.threads);
  }
  const auto kernel = args.dense ? cross_entropy_block_kernel<scalar_t, kWide, true>
                                 : cross_entropy_block_kernel<scalar_t, kWide, false>;
  return launch(kernel, args.positions * plan.cluster, plan.threads, plan.cluster, stream, args);
}

// Whether every row begins at a multiple of 16 bytes, and so does all that is read beside it. One
// row alone is judged by its stride, too: its bits are those that it has in a batch.
bool all_aligned(const CrossEntropyArgs& args, Dtype dtype) {
  const auto aligned = [&](const void* data, const Strides& strides) {
    const int bytes = item_bytes(dtype);
    const bool inner = args.inner == 1 || strides.inner * bytes % 16 == 0;
    return data == nullptr || (reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
                               strides.outer * bytes % 16 == 0 && inner);
  };
  return aligned(args.input, args.input_strides) &&
         aligned(args.probabilities, args.probability_strides) &&
         aligned(args.gradient, args.gradient_strides) && aligned(args.weight, {0, 1, 0});
}

}  // namespace

int largest_cluster(int device) {
  if (!has_clusters(device)) return 1;
  // All kernels are compiled for the same devices.
  static const bool known = knows_clusters(cross_entropy_block_kernel<float, true, false>);
  return known ? kPortableCluster : 1;
}

RowPlan plan_rows(const CrossEntropyArgs& args, Dtype dtype, int largest_cluster) {
  const int bytes = item_bytes(dtype);
  RowPlan plan{RowRoute::kGroup, all_aligned(args, dtype), 32, 1};
  if (args.classes <= most_group_classes(bytes)) {
    if (args.classes <= kFewClasses) plan.threads = 8;
    return plan;
  }
  plan.route = RowRoute::kBlock;
  const int64_t accesses = ceil_div(args.classes, plan.wide ? 16 / bytes : 1);
  const int64_t threads = ceil_div(accesses, block_items(bytes, plan.wide));
  // A cluster of blocks of 512 threads, two of which share a multiprocessor, rather than one block
  // of 1024: the loads of one go with the stores of the other.
  for (plan.threads = 128; plan.threads < 512 && plan.threads < threads;) plan.threads *= 2;
  while (plan.cluster < largest_cluster && plan.cluster * plan.threads < threads) plan.cluster *= 2;
  if (plan.cluster * plan.threads < threads) plan.threads = most_threads(bytes, args.dense);
  if (plan.cluster * plan.threads < threads) plan.route = RowRoute::kTwoPass;
  return plan;
}

cudaError_t launch_cross_entropy_rows(const CrossEntropyArgs& args, Dtype dtype,
                                      const RowPlan& plan, cudaStream_t stream) {
  return dispatch(dtype, [&](auto zero) {
    using scalar_t = decltype(zero);
    return plan.wide ? launch_rows<scalar_t, true>(args, plan, stream)
                     : launch_rows<scalar_t, false>(args, plan, stream);
  });
}

}  // namespace torchext::cuda
