// cross_entropy of rows whose logits lie in pieces of classes, each a matrix of its own: as the
// block kernel of cross_entropy_rows.cu, with the pieces looked through at every access. The
// gradient takes the logits' place.
//
// Bytes moved, for N rows of C classes of b bytes: 2 N C b (the logits, the gradient) + 8 N
// (indices) + 12 N (loss, stats); probabilities: + 2 N C b, as there.
#include "cuda/cross_entropy_block.cuh"
#include "cuda/linear_cross_entropy.h"

namespace torchext::cuda {
namespace {

constexpr int kThreads = 512;

// An access is in one piece: pieces begin at multiples of it.
template <typename scalar_t>
struct RowInPieces {
  const Pieces& pieces;
  int n;

  __device__ const RowInPieces& input() const { return *this; }
  __device__ const RowInPieces& gradient() const { return *this; }
  __device__ scalar_t* at(int64_t class_index) const {
    const int c = static_cast<int>(class_index);  // a row of a block's has few enough
    void* data = pieces.data[0];
    int stride = pieces.row_stride[0];
#pragma unroll
    for (int i = 1; i < kMostPieces; ++i) {
      if (i < pieces.count && c >= pieces.begin[i]) {
        data = pieces.data[i];
        stride = pieces.row_stride[i];
      }
    }
    return static_cast<scalar_t*>(data) + (static_cast<int64_t>(n) * stride + c);
  }
};

// Two blocks share a multiprocessor where their registers let them.
template <typename scalar_t, bool kWide, bool kDense>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 || kDense ? 1 : 2)
    cross_entropy_pieces_kernel(const __grid_constant__ CrossEntropyArgs args,
                                const __grid_constant__ Pieces pieces) {
  const int64_t position = position_of_block();
  const Place place(args, position);
  row_by_blocks<scalar_t, kWide, kDense>(args, position, place,
                                         RowInPieces<scalar_t>{pieces, static_cast<int>(place.n)});
}

template <typename scalar_t>
cudaError_t launch_pieces(const CrossEntropyArgs& args, const Pieces& pieces, const RowPlan& plan,
                          cudaStream_t stream) {
  const auto kernel = args.dense ? cross_entropy_pieces_kernel<scalar_t, true, true>
                                 : cross_entropy_pieces_kernel<scalar_t, true, false>;
  return launch(kernel, args.positions * plan.cluster, plan.threads, plan.cluster, stream, args,
                pieces);
}

}  // namespace

bool may_have_pieces(const RowPlan& plan) {
  return plan.route == RowRoute::kBlock && plan.wide && plan.threads <= kThreads;
}

cudaError_t launch_cross_entropy_pieces(const CrossEntropyArgs& args, const Pieces& pieces,
                                        Dtype dtype, const RowPlan& plan, cudaStream_t stream) {
  return dispatch(
      dtype, [&](auto zero) { return launch_pieces<decltype(zero)>(args, pieces, plan, stream); });
}

}  // namespace torchext::cuda
