// A sum of narrow matrices, such as the gradients that chunks of rows give a weight, kept in
// float32 until the last of them: rounded after each, the sum would lose a digit every few chunks.
#pragma once

#include "common/stable.h"
#include "cpu/dispatch.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace torchext::cpu {

template <typename scalar_t>
struct WideSumArgs {
  scalar_t* part;  // added to the sum, and given it when it is the last
  simd::acc_type<scalar_t>* sum;
  bool first, last;
};

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void wide_sum_elements(const WideSumArgs<scalar_t>& args, int64_t begin,
                                       int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using acc_t = simd::acc_type<scalar_t>;
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    auto value = simd::load<kLanes>(args.part + i);
    if (!args.first) value += simd::load<kLanes>(args.sum + i);
    if (args.last) {
      simd::store<kLanes>(args.part + i, value);
    } else {
      simd::store<kLanes>(args.sum + i, value);
    }
  }
  for (; i < end; ++i) {
    acc_t value = static_cast<acc_t>(args.part[i]);
    if (!args.first) value += args.sum[i];
    if (args.last) {
      args.part[i] = static_cast<scalar_t>(value);
    } else {
      args.sum[i] = value;
    }
  }
}
TORCHEXT_SIMD_FUNCTION(wide_sum_range, wide_sum_elements, WideSumArgs)

template <typename scalar_t>
class WideSum {
 public:
  // `part`, dense and the same each time, gets the sum of all when it is added as the last.
  void add(const Tensor& part, bool first, bool last) {
    using acc_t = simd::acc_type<scalar_t>;
    if (first && last) return;
    if (first) {
      sum_ = empty_like(part, sizes_of(part), aoti_torch_dtype_float32());
      advise(sum_);
    }
    const WideSumArgs<scalar_t> args{static_cast<scalar_t*>(part.mutable_data_ptr()),
                                     static_cast<acc_t*>(sum_.mutable_data_ptr()), first, last};
    for_each_block(part.numel(), int64_t{1} << 15,
                   [&](int64_t begin, int64_t end) { wide_sum_range<scalar_t>(args, begin, end); });
  }

 private:
  Tensor sum_;
};

}  // namespace torchext::cpu
