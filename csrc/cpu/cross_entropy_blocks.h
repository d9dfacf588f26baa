// The kernels of cross_entropy_kernel.h and cross_entropy_tile.h for every instruction set. Each
// dtype has a source of its own (cross_entropy_float.cpp, ...): together they take a compiler
// minutes.
#pragma once

#include "cpu/cross_entropy_call.h"
#include "cpu/cross_entropy_kernel.h"
#include "cpu/cross_entropy_pipeline.h"
#include "cpu/cross_entropy_tile.h"

namespace torchext::cpu {
namespace {

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void row_blocks(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                int64_t end) {
  if (pipelined(args)) {
    const int64_t last = std::min(args.shape.positions(), end * args.block_rows);
    const auto run = [&](auto dense, auto gradient) __attribute__((always_inline)) {
      pipelined_rows<Isa, scalar_t, dense(), gradient()>(args, begin * args.block_rows, last);
    };
    using True = std::true_type;
    using False = std::false_type;
    if (args.dense()) return args.gradient ? run(True{}, True{}) : run(True{}, False{});
    return args.gradient ? run(False{}, True{}) : run(False{}, False{});
  }
  const bool scratch_needed =
      args.gradient && !args.backward && !std::is_same_v<scalar_t, acc_type<scalar_t>>;
  std::vector<acc_type<scalar_t>> scratch(scratch_needed ? args.shape.classes : 0);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * args.block_rows;
    const int64_t last = std::min(args.shape.positions(), first + args.block_rows);
    const double loss = args.dense()
                            ? process_rows<Isa, scalar_t, true>(args, first, last, scratch.data())
                            : process_rows<Isa, scalar_t, false>(args, first, last, scratch.data());
    if (args.block_losses) args.block_losses[block] = loss;
  }
}
TORCHEXT_SIMD_FUNCTION(rows, row_blocks, CrossEntropyArgs)

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void tile_blocks(const CrossEntropyArgs<scalar_t>& args, int64_t begin,
                                 int64_t end) {
  AlignedBuffer<acc_type<scalar_t>> exps, columns;
  for (int64_t block = begin; block < end; ++block) {
    const double loss = args.dense()
                            ? process_block<Isa, scalar_t, true>(args, block, exps, columns)
                            : process_block<Isa, scalar_t, false>(args, block, exps, columns);
    if (args.block_losses) args.block_losses[block] = loss;
  }
}
TORCHEXT_SIMD_FUNCTION(tiles, tile_blocks, CrossEntropyArgs)

}  // namespace

template <typename scalar_t>
void cross_entropy_rows(const CrossEntropyArgs<scalar_t>& args, int64_t begin, int64_t end) {
  rows<scalar_t>(args, begin, end);
}
template <typename scalar_t>
void cross_entropy_tiles(const CrossEntropyArgs<scalar_t>& args, int64_t begin, int64_t end) {
  tiles<scalar_t>(args, begin, end);
}

#define TORCHEXT_CROSS_ENTROPY_OF(scalar_t)                                              \
  template void cross_entropy_rows(const CrossEntropyArgs<scalar_t>&, int64_t, int64_t); \
  template void cross_entropy_tiles(const CrossEntropyArgs<scalar_t>&, int64_t, int64_t);

}  // namespace torchext::cpu
