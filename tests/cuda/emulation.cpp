// Runs kernels on a CPU: see emulated/cuda/gpu.cuh. And what the host's code calls of CUDA and of
// torch's CUDA library, for tensors on the CPU.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <vector>

#include "common/checks.h"
#include "common/stable.h"
#include "cuda/gpu.cuh"

#undef threadIdx
#undef blockIdx
#undef blockDim

namespace emulated {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned char kPoison = 0xff;  // NaN in every dtype: memory that nobody wrote

struct Barrier {
  int expected = 0;
  int arrived = 0;
  int64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[32];
};

struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, std::vector<unsigned char>> shared;
};

struct Fiber {
  ucontext_t context;
  Index thread;
  int rank = 0;
  bool done = false;
  int64_t cluster_generation = 0;
};

struct Machine {
  Index block_dim;
  Index first_block;
  std::vector<Block> blocks;
  Barrier cluster;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  Index block_index;
  bool backwards = false;
  int64_t progress = 0;  // barriers that opened, and fibers that ended
  const std::function<void()>* kernel = nullptr;
};

Machine machine;
std::vector<std::unique_ptr<char[]>> stacks;

Block& my_block() { return machine.blocks[machine.current->rank]; }
Warp& my_warp() { return my_block().warps[machine.current->thread.x / 32]; }

void wait_for(const Barrier& barrier, int64_t generation) {
  while (barrier.generation == generation) {
    swapcontext(&machine.current->context, &machine.scheduler);
  }
}

int64_t arrive(Barrier& barrier) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++machine.progress;
  }
  return generation;
}

void body() {
  (*machine.kernel)();
  machine.current->done = true;
  ++machine.progress;
  swapcontext(&machine.current->context, &machine.scheduler);
}

void run_cluster(int threads, int cluster) {
  machine.blocks = std::vector<Block>(cluster);
  machine.cluster = {threads * cluster, 0, 0};
  for (Block& block : machine.blocks) {
    block.barrier.expected = threads;
    block.warps = std::vector<Warp>(threads / 32);
    for (Warp& warp : block.warps) warp.barrier.expected = 32;
  }
  machine.fibers = std::vector<Fiber>(static_cast<size_t>(threads) * cluster);
  for (size_t i = 0; i < machine.fibers.size(); ++i) {
    Fiber& fiber = machine.fibers[i];
    fiber.thread.x = static_cast<unsigned>(i) % threads;
    fiber.rank = static_cast<int>(i) / threads;
    if (i == stacks.size()) stacks.emplace_back(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.context, body, 0);
  }
  // The last thread first in every other cluster: what lacks a barrier must not depend on luck.
  machine.backwards = !machine.backwards;
  const size_t count = machine.fibers.size();
  for (size_t left = count; left > 0;) {
    const int64_t before = machine.progress;
    for (size_t i = 0; i < count; ++i) {
      Fiber& fiber = machine.fibers[machine.backwards ? count - 1 - i : i];
      if (fiber.done) continue;
      machine.current = &fiber;
      machine.block_index.x = machine.first_block.x + fiber.rank;
      swapcontext(&machine.scheduler, &fiber.context);
      left -= fiber.done;
    }
    if (machine.progress == before) {
      std::fprintf(stderr, "emulation: %zu threads wait for ever\n", left);
      std::abort();
    }
  }
}

}  // namespace

int64_t products = 0;

Index& thread_index() { return machine.current->thread; }
Index& block_index() { return machine.block_index; }
Index& block_dim() { return machine.block_dim; }
int rank_in_cluster() { return machine.current->rank; }
int cluster_size() { return static_cast<int>(machine.blocks.size()); }

void sync_block() {
  Barrier& barrier = my_block().barrier;
  wait_for(barrier, arrive(barrier));
}
void sync_warp() {
  Barrier& barrier = my_warp().barrier;
  wait_for(barrier, arrive(barrier));
}
void cluster_arrive() { machine.current->cluster_generation = arrive(machine.cluster); }
void cluster_wait() { wait_for(machine.cluster, machine.current->cluster_generation); }
uint64_t* warp_slots() { return my_warp().slots; }

void* shared(const void* tag, size_t bytes) {
  auto& memory = my_block().shared[tag];
  if (memory.empty()) memory.assign(bytes, kPoison);
  return memory.data();
}

void* shared_of(void* mine, int rank) {
  for (auto& [tag, memory] : my_block().shared) {
    const auto offset = static_cast<unsigned char*>(mine) - memory.data();
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(memory.size())) {
      return machine.blocks[rank].shared.at(tag).data() + offset;
    }
  }
  std::abort();
}

void run(int64_t blocks, int threads, int cluster, const std::function<void()>& kernel) {
  machine.kernel = &kernel;
  machine.block_dim.x = threads;
  for (int64_t block = 0; block < blocks; block += cluster) {
    machine.first_block.x = static_cast<unsigned>(block);
    run_cluster(threads, cluster);
  }
}

}  // namespace emulated

bool torchext::cuda::has_clusters(int) {
  // As a device before sm_90, where the test says so.
  return std::getenv("TORCHEXT_EMULATED_NO_CLUSTERS") == nullptr;
}

namespace {

// oneDNN with AMX (torch 2.13) multiplies what stands behind a row of the left matrix by zeros, and
// what nobody wrote there may be NaN.
torch::stable::Tensor without_gaps(AtenTensorHandle matrix) {
  AtenTensorHandle copy = nullptr;
  TORCHEXT_AOTI_CHECK(aoti_torch_new_tensor_handle(matrix, &copy));
  const torch::stable::Tensor tensor(copy);
  return tensor.stride(1) == 1 ? torchext::as_contiguous(tensor) : tensor;
}

}  // namespace

extern "C" {

cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  std::memset(data, value, bytes);
  return cudaSuccess;
}

AOTITorchError aoti_torch_cuda_mm_out(AtenTensorHandle out, AtenTensorHandle left,
                                      AtenTensorHandle right) {
  ++emulated::products;
  return aoti_torch_cpu_mm_out(out, without_gaps(left).get(), right);
}

AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle added,
                                         AtenTensorHandle left, AtenTensorHandle right, double beta,
                                         double alpha) {
  ++emulated::products;
  return aoti_torch_cpu_addmm_out(out, added, without_gaps(left).get(), right, beta, alpha);
}

AOTITorchError aoti_torch_cuda__addmm_activation(AtenTensorHandle added, AtenTensorHandle left,
                                                 AtenTensorHandle right, double beta, double alpha,
                                                 int32_t use_gelu, AtenTensorHandle* result) {
  return aoti_torch_cpu__addmm_activation(added, left, right, beta, alpha, use_gelu, result);
}

}  // extern "C"
