// Fresh memory in few page faults, and buffers that begin at a cache line.
#pragma once

#include <cstdint>
#include <vector>

#include "common/stable.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace torchext {

// A large fresh buffer is faulted in page by page as it is first written, which costs several times
// the arithmetic of a loss: 4096 x 32000 floats are 128,000 faults, and 250 of 2 MiB pages. This
// only advises; where the system has no such pages nothing changes.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(4 * kHugePage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

namespace cpu {
inline void advise(const Tensor& fresh) {
  advise_huge_pages(fresh.mutable_data_ptr(),
                    fresh.numel() * static_cast<int64_t>(fresh.element_size()));
}

// Memory that grows and begins at a cache line: a vector's load touches one.
template <typename T>
class AlignedBuffer {
 public:
  // At least so many numbers, and one line for none; what stood there may be lost.
  T* of_size(int64_t size) {
    const auto lines = static_cast<size_t>(size / kNumbers + 1);
    if (lines_.size() < lines) lines_.resize(lines);
    return lines_.data()->numbers;
  }

 private:
  static constexpr int64_t kNumbers = 64 / sizeof(T);
  struct alignas(64) Line {
    T numbers[kNumbers];
  };
  std::vector<Line> lines_;
};
}  // namespace cpu

}  // namespace torchext
