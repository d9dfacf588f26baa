// The kernels on a CPU: every thread of a block, or of a cluster of blocks, is a fiber that runs
// until it waits for others. Barriers, shuffles and distributed shared memory mean what they mean
// on a GPU; a thread that waits for ever ends the process. What this cannot show: races between
// threads that do not wait where they should (the fibers run one after the other), and speed.
#pragma once

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace emulated {

struct Index {
  unsigned x;
};
// Of the running fiber.
Index& thread_index();
Index& block_index();
Index& block_dim();
int rank_in_cluster();
int cluster_size();

void sync_block();
void sync_warp();
void cluster_arrive();
void cluster_wait();
// 32 numbers of the running fiber's warp.
uint64_t* warp_slots();
// Shared memory of the running fiber's block, by the address of a tag; zeroed, then poisoned.
void* shared(const void* tag, size_t bytes);
void* shared_of(void* mine, int rank);
// Matrix products so far: what a schedule can be told by.
extern int64_t products;
// Runs `blocks` blocks, a cluster at a time.
void run(int64_t blocks, int threads, int cluster, const std::function<void()>& kernel);

}  // namespace emulated

#define threadIdx emulated::thread_index()
#define blockIdx emulated::block_index()
#define blockDim emulated::block_dim()
#define TORCHEXT_SHARED(type, name, count) \
  static char name##_tag;                  \
  type* const name = static_cast<type*>(emulated::shared(&name##_tag, sizeof(type) * (count)))

namespace torchext::cuda {

inline float exp_nonpositive(float x) { return std::exp(x); }

inline uint4 load_wide(const void* from) {
  uint4 value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void store_wide(void* to, const uint4& value) { std::memcpy(to, &value, sizeof(value)); }

template <typename T>
inline T shuffle_xor(T value, int offset) {
  uint64_t* slots = emulated::warp_slots();
  const int lane = static_cast<int>(threadIdx.x % 32);
  std::memcpy(slots + lane, &value, sizeof(T));
  emulated::sync_warp();
  T other;
  std::memcpy(&other, slots + (lane ^ offset), sizeof(T));
  emulated::sync_warp();
  return other;
}

inline void sync_block() { emulated::sync_block(); }

struct Cluster {
  static int rank() { return emulated::rank_in_cluster(); }
  static int size() { return emulated::cluster_size(); }
  static void arrive() { emulated::cluster_arrive(); }
  static void wait() { emulated::cluster_wait(); }
  template <typename T>
  static T* of(T* shared, int rank) {
    return static_cast<T*>(emulated::shared_of(shared, rank));
  }
};

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int cluster,
                   cudaStream_t, const Arguments&... arguments) {
  emulated::run(blocks, threads, cluster, [&] { kernel(Parameters(arguments)...); });
  return cudaSuccess;
}

bool has_clusters(int device);

template <typename... Parameters>
bool knows_clusters(void (*)(Parameters...)) {
  return true;
}

}  // namespace torchext::cuda
