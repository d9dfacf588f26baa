// A step of SGD on the CPU: every parameter, its gradient and its momentum in one pass, all
// parameters in one parallel loop. Each operation rounds where torch.optim.SGD's does.
#include "ops/sgd.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

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

// The step of a vector of elements.
template <bool kDecay, bool kBuffered, typename Value, typename scalar_t>
TORCHEXT_INLINE Value sgd_update(const SgdArgs<scalar_t>& args, Value param, Value grad,
                                 Value& buffer) {
  if (args.maximize) grad = -grad;
  if constexpr (kDecay) grad += param * args.weight_decay;
  if constexpr (kBuffered) {
    buffer = rounded(buffer * args.momentum) + grad * args.dampened;
    grad = args.nesterov ? grad + buffer * args.momentum : buffer;
  }
  return param - rounded(grad) * args.lr;
}

template <class Isa, bool kDecay, bool kBuffered, typename scalar_t>
TORCHEXT_INLINE void sgd_loop(const SgdArgs<scalar_t>& given, int64_t begin, int64_t end) {
  constexpr int kLanes = simd::kLanesOf<Isa, scalar_t>;
  using Value = Vector<scalar_t, kLanes>;
  const SgdArgs<scalar_t> args = given;  // which no store can change: they stay in registers
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    Value buffer{};
    if constexpr (kBuffered) buffer = simd::load<kLanes>(args.momentum_buffer + i);
    const Value param = simd::load<kLanes>(args.param + i);
    const Value grad = simd::load<kLanes>(args.grad + i);
    simd::store<kLanes>(args.param + i, sgd_update<kDecay, kBuffered>(args, param, grad, buffer));
    if constexpr (kBuffered) simd::store<kLanes>(args.momentum_buffer + i, buffer);
  }
  if (i < end) {
    const int64_t count = end - i;
    const auto load = [&](const scalar_t* from) __attribute__((always_inline)) {
      return simd::load_tail<kLanes>(from + i, count, 0);
    };
    Value buffer{};
    if constexpr (kBuffered) buffer = load(args.momentum_buffer);
    const Value param = load(args.param);
    const Value grad = load(args.grad);
    simd::store_tail<kLanes>(args.param + i,
                             sgd_update<kDecay, kBuffered>(args, param, grad, buffer), count);
    if constexpr (kBuffered) simd::store_tail<kLanes>(args.momentum_buffer + i, buffer, count);
  }
}

template <class Isa, typename scalar_t>
TORCHEXT_INLINE void sgd_elements(const SgdArgs<scalar_t>& args, int64_t begin, int64_t end) {
  const bool decay = args.weight_decay != 0, buffered = args.momentum_buffer != nullptr;
  if (decay && buffered) {
    sgd_loop<Isa, true, true>(args, begin, end);
  } else if (decay) {
    sgd_loop<Isa, true, false>(args, begin, end);
  } else if (buffered) {
    sgd_loop<Isa, false, true>(args, begin, end);
  } else {
    sgd_loop<Isa, false, false>(args, begin, end);
  }
}
TORCHEXT_SIMD_FUNCTION(sgd_range, sgd_elements, SgdArgs)

// One parameter's memory: asked of its tensors once, because each question is a call.
struct SgdPart {
  ScalarType dtype;
  int64_t numel;
  void* param;
  const void* grad;
  void* momentum_buffer = nullptr;
};

// Whether any two tensors share memory.
bool overlap(const std::vector<SgdPart>& parts) {
  std::vector<std::pair<const char*, const char*>> ranges;
  ranges.reserve(3 * parts.size());
  for (const SgdPart& part : parts) {
    const int64_t bytes = part.numel * (part.dtype == ScalarType::Float ? 4 : 8);
    for (const void* memory : std::array{static_cast<const void*>(part.param), part.grad,
                                         static_cast<const void*>(part.momentum_buffer)}) {
      const auto* begin = static_cast<const char*>(memory);
      if (begin && bytes > 0) ranges.emplace_back(begin, begin + bytes);
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
  std::vector<SgdPart> parts;
  parts.reserve(params.size());
  int64_t elements = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel();
    const auto memory = [&](const char* name, const Tensor& tensor, auto* data) {
      TORCHEXT_CHECK(tensor.is_cpu(), "sgd_: expected ", name, " on the CPU");
      TORCHEXT_CHECK(numel == 0 || data, "sgd_: expected ", name, " with memory of its own");
      return data;
    };
    SgdPart& part = parts.emplace_back();
    part.dtype = params[i].scalar_type();
    part.numel = numel;
    part.param = memory("params", params[i], params[i].mutable_data_ptr());
    part.grad = memory("grads", grads[i], grads[i].const_data_ptr());
    if (momentum != 0) {
      part.momentum_buffer =
          memory("momentum_buffers", momentum_buffers[i], momentum_buffers[i].mutable_data_ptr());
    }
    elements += numel;
  }
  // Every thread takes its share of every parameter, the share of rows that linear_relu gave it.
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  int64_t shares = std::clamp<int64_t>(elements / kGrain, 1, threads);
  // Views of one buffer, perhaps: then a parameter after the other, as stock does.
  if (shares > 1 && overlap(parts)) shares = 1;
  for_each_block(shares, 1, [&](int64_t begin, int64_t end) {
    for (const SgdPart& part : parts) {
      const auto run = [&](auto zero) {
        using scalar_t = decltype(zero);
        sgd_range<scalar_t>(
            {static_cast<scalar_t*>(part.param), static_cast<const scalar_t*>(part.grad),
             static_cast<scalar_t*>(part.momentum_buffer), static_cast<scalar_t>(lr),
             static_cast<scalar_t>(momentum), static_cast<scalar_t>(1 - dampening),
             static_cast<scalar_t>(weight_decay), nesterov, maximize},
            part.numel * begin / shares, part.numel * end / shares);
      };
      if (part.dtype == ScalarType::Float) {
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
