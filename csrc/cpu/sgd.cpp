// A step of SGD on the CPU: every parameter, its gradient and its momentum in one pass, all
// parameters in one parallel loop. Each operation rounds where torch.optim.SGD's does.
#include "ops/sgd.h"

#include <algorithm>
#include <utility>

#include "cpu/dispatch.h"
#include "cpu/simd.h"

namespace torchext {
namespace {

using simd::Vector;

// Elements for a thread: fewer cost more to hand out than they save.
constexpr int64_t kGrain = 16384;

template <typename scalar_t>
struct SgdArgs {
  scalar_t* param;
  const scalar_t* grad;
  scalar_t* momentum_buffer;                      // or null
  scalar_t lr, momentum, dampened, weight_decay;  // dampened: 1 - dampening
  bool nesterov, maximize;
};

// The value rounded to its type: keeps the compiler from fusing the product with what is added.
template <typename Value>
TORCHEXT_INLINE Value rounded(Value value) {
#if defined(__x86_64__)
  asm("" : "+x"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// A vector of elements, or one of them.
template <typename Value, typename scalar_t>
TORCHEXT_INLINE Value sgd_update(const SgdArgs<scalar_t>& args, Value param, Value grad,
                                 Value* buffer) {
  if (args.maximize) grad = -grad;
  if (args.weight_decay != 0) grad += param * args.weight_decay;
  if (buffer) {
    *buffer = rounded(*buffer * args.momentum) + grad * args.dampened;
    grad = args.nesterov ? grad + *buffer * args.momentum : *buffer;
  }
  return param - rounded(grad) * args.lr;
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void sgd_elements(const SgdArgs<scalar_t>& args, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = Vector<scalar_t, kLanes>;
  const bool buffered = args.momentum_buffer != nullptr;
  for (int64_t i = begin; i < end; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, end - i);
    const auto load = [&](const scalar_t* from) __attribute__((always_inline)) {
      return count == kLanes ? simd::load<kLanes>(from + i)
                             : simd::load_tail<kLanes>(from + i, count, 0);
    };
    const auto store = [&](scalar_t* to, Value value) __attribute__((always_inline)) {
      if (count == kLanes) {
        simd::store<kLanes>(to + i, value);
      } else {
        simd::store_tail<kLanes>(to + i, value, count);
      }
    };
    Value buffer = buffered ? load(args.momentum_buffer) : Value{};
    store(args.param,
          sgd_update<Value>(args, load(args.param), load(args.grad), buffered ? &buffer : nullptr));
    if (buffered) store(args.momentum_buffer, buffer);
  }
}
TORCHEXT_SIMD_FUNCTION(sgd_range, sgd_elements, SgdArgs)

template <typename scalar_t>
scalar_t* data_of(const Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

// Whether any two share memory.
bool overlap(const std::vector<const std::vector<Tensor>*>& lists) {
  std::vector<std::pair<const char*, const char*>> ranges;
  for (const auto* list : lists) {
    for (const Tensor& tensor : *list) {
      const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
      const int64_t size =
          tensor.scalar_type() == ScalarType::Float ? sizeof(float) : sizeof(double);
      if (tensor.numel() > 0) ranges.emplace_back(begin, begin + tensor.numel() * size);
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return true;
  }
  return false;
}

void sgd_cpu(std::vector<Tensor> params, std::vector<Tensor> grads,
             std::vector<Tensor> momentum_buffers, double lr, double momentum, double dampening,
             double weight_decay, bool nesterov, bool maximize) {
  check_sgd(params, grads, momentum_buffers, momentum);
  int64_t elements = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    check_memory("sgd_", {{"params", &params[i]}, {"grads", &grads[i]}});
    if (momentum != 0) check_memory("sgd_", {{"momentum_buffers", &momentum_buffers[i]}});
    elements += params[i].numel();
  }
  // Every thread takes its share of every parameter, the share of rows that linear_relu gave it.
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t shares = std::clamp<int64_t>(elements / kGrain, 1, threads);
  // Views of one buffer, perhaps: then a parameter after the other, as stock does.
  if (shares > 1 && overlap({&params, &grads, &momentum_buffers})) shares = 1;
  for_each_block(shares, 1, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < params.size(); ++i) {
      const int64_t first = params[i].numel() * begin / shares;
      const int64_t last = params[i].numel() * end / shares;
      const auto run = [&](auto zero) {
        using scalar_t = decltype(zero);
        sgd_range<scalar_t>({data_of<scalar_t>(params[i]), data_of<scalar_t>(grads[i]),
                             momentum != 0 ? data_of<scalar_t>(momentum_buffers[i]) : nullptr,
                             static_cast<scalar_t>(lr), static_cast<scalar_t>(momentum),
                             static_cast<scalar_t>(1 - dampening),
                             static_cast<scalar_t>(weight_decay), nesterov, maximize},
                            first, last);
      };
      if (params[i].scalar_type() == ScalarType::Float) {
        run(float{});
      } else {
        run(double{});
      }
    }
  });
}

}  // namespace
}  // namespace torchext

STABLE_TORCH_LIBRARY_IMPL(torchext, CPU, m) { m.impl("sgd_", TORCH_BOX(&torchext::sgd_cpu)); }
