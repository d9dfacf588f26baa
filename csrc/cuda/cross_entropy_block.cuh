// A row in the registers of a block, or of a cluster of blocks: loss, stats and, where wanted, the
// gradient, with one read of the logits.
#pragma once

#include "cuda/cross_entropy_slice.cuh"

namespace torchext::cuda {

// The most threads of a block. 1024 leave 64 registers a thread, enough for 32 of the row; a dense
// target, and double, need more.
constexpr int most_threads(int bytes, bool dense) { return bytes == 8 || dense ? 512 : 1024; }

// Accesses that a thread of a block keeps.
constexpr int block_items(int bytes, bool wide) { return (wide ? 8 : 16) / (bytes == 8 ? 2 : 1); }

// Where a row's logits are, and its gradient: made when it is needed, to cost no registers before.
template <typename scalar_t>
struct WholeRows {
  const CrossEntropyArgs& args;
  const Place& place;

  __device__ WholeRow<const scalar_t> input() const {
    return {static_cast<const scalar_t*>(args.input) + place.in(args.input_strides)};
  }
  __device__ WholeRow<scalar_t> gradient() const {
    return {static_cast<scalar_t*>(args.gradient) + place.in(args.gradient_strides)};
  }
};

// The row that a block of a cluster works on.
__device__ inline int64_t position_of_block() {
  return blockIdx.x / static_cast<unsigned>(Cluster::size());
}

// Each block sums its part, the first warp of each reads the parts of all (distributed shared
// memory) and joins them in one order, so that all blocks have the same bits.
template <typename scalar_t, bool kWide, bool kDense, typename Rows>
__device__ inline void row_by_blocks(const CrossEntropyArgs& args, int64_t position,
                                     const Place& place, const Rows& rows) {
  using Part_ = Slice<scalar_t, kWide, kDense, block_items(sizeof(scalar_t), kWide)>;
  using acc_t = acc_type<scalar_t>;
  TORCHEXT_SHARED(Sums<acc_t>, of_warps, 32);
  TORCHEXT_SHARED(Sums<acc_t>, of_block, 1);
  TORCHEXT_SHARED(Sums<acc_t>, of_row, 1);
  const int blocks = Cluster::size();
  const int rank = Cluster::rank();
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const bool first = rank == 0 && thread == 0;
  const auto row = rows.input();
  const scalar_t* probabilities = static_cast<const scalar_t*>(args.probabilities);
  if (probabilities) probabilities += place.in(args.probability_strides);

  const Part part = Part::of<Part_::kSize>(args.classes, rank * threads + thread, blocks * threads);
  Part_ slice;
  slice.load(row, part);
  const auto target = target_of<scalar_t>(args, position, first);
  // Before the first barrier: the gradient may overwrite the logits behind it.
  const acc_t target_x = first && target.index >= 0 ? to_acc(*row.at(target.index)) : acc_t{0};
  const acc_t warp_max = group_max(slice.max(part));
  Sums<acc_t> sums = slice.sums(args, warp_max, part, probabilities);
  sums.sum = group_sum(sums.sum);
  if constexpr (kDense) {
    sums.mass = group_sum(sums.mass);
    sums.dot = group_sum(sums.dot);
  }
  if (lane == 0) of_warps[warp] = sums;
  sync_block();
  if (warp == 0) {
    sums = group_joined<kDense>(lane < threads / 32 ? of_warps[lane] : no_sums<acc_t>(), 32);
    if (lane == 0) (blocks > 1 ? of_block : of_row)[0] = sums;
  }
  if (blocks > 1) {
    Cluster::arrive();
    Cluster::wait();
    if (warp == 0) {
      sums =
          group_joined<kDense>(lane < blocks ? *Cluster::of(of_block, lane) : no_sums<acc_t>(), 32);
      if (lane == 0) of_row[0] = sums;
    }
    Cluster::arrive();  // has read the others' shared memory: see the end
  }
  sync_block();
  sums = finished(of_row[0]);
  if (first) write_loss<scalar_t, kDense>(args, position, sums, target, target_x);
  if (args.gradient) {
    slice.write_gradient(args, gradient_scale(args, position, sums, target), target, part,
                         probabilities, rows.gradient());
  }
  // A block's shared memory lives as long as the others may read it.
  if (blocks > 1) Cluster::wait();
}

}  // namespace torchext::cuda
