// All that only a GPU has: warps, shared memory, clusters, launches, its power of two. tests/cuda
// has another file of this name, with which the kernels' own source runs on a CPU.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#define TORCHEXT_SHARED(type, name, count) __shared__ type name[count]

namespace torchext::cuda {

// e^x for x <= 0: one multiplication and the hardware's power of two, good to two units in the last
// place of results that count (x > -20). Subnormal results are 0.
__device__ inline float exp_nonpositive(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

// 16 bytes of device memory in one access, which the compiler may neither split nor take for an
// access to memory of any kind. A load may move past barriers: kernels load what nobody writes, or
// what they write themselves later.
__device__ inline uint4 load_wide(const void* from) {
  uint4 value;
  asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
      : "l"(__cvta_generic_to_global(from)));
  return value;
}
__device__ inline void store_wide(void* to, const uint4& value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w));
}

// From the lane whose number differs in the bit `offset`; of all 32 lanes.
template <typename T>
__device__ inline T shuffle_xor(T value, int offset) {
  return __shfl_xor_sync(0xffffffffu, value, offset);
}

__device__ inline void sync_block() { __syncthreads(); }

// Blocks that run together and read each other's shared memory (sm_90 and later).
struct Cluster {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static __device__ int rank() { return cooperative_groups::this_cluster().block_rank(); }
  static __device__ int size() { return cooperative_groups::this_cluster().num_blocks(); }
  static __device__ void arrive() { cooperative_groups::this_cluster().barrier_arrive(); }
  static __device__ void wait() { cooperative_groups::this_cluster().barrier_wait(); }
  template <typename T>
  static __device__ T* of(T* shared, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
  }
#else
  static __device__ int rank() { return 0; }
  static __device__ int size() { return 1; }
  static __device__ void arrive() {}
  static __device__ void wait() {}
  template <typename T>
  static __device__ T* of(T* shared, int) {
    return shared;
  }
#endif
};

// Runs a kernel on `blocks` blocks, in clusters of `cluster` of them.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int cluster,
                   cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  if (cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

// Whether a device has clusters.
inline bool has_clusters(int device) {
  int has = 0;
  return cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, device) == cudaSuccess && has != 0;
}

// Whether a kernel knows of clusters: one for older devices, translated for this one, does not.
template <typename... Parameters>
bool knows_clusters(void (*kernel)(Parameters...)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
}

}  // namespace torchext::cuda
