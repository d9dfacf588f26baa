// Which products are our own kernel's (product.cpp), and which the library's.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <type_traits>

#include "cpu/product.h"
#include "cpu/simd.h"

namespace torchext::cpu {
namespace {

// Rows from which on our kernel is taken in place of MKL's where the right matrix has few bytes. Of
// MKL's AVX-512, 4096 x 784 by 784 x 64 takes 0.80 of its time, 4096 x 64 by 64 x 784 0.98, 2048 x
// 256 by 256 x 256 1.05 to 1.12 (2 cores of an Intel Xeon of family 6, model 207, float32). Of what
// MKL does with AVX2 on AMD, 4096 x 784 x 64 with bias and ReLU takes 0.79 of eager's (0.98 by
// MKL), the gradient of its input 0.79 and 0.93 (1.00), but that of 1000 x 784 x 64 up to 1.16 and
// 512 x 512 x 512 1.1 to 1.2 (2 cores of Zen 3).
constexpr int64_t kManyRows = 512;
constexpr int64_t kManyRowsAvx2 = 2048;
constexpr int64_t kShortRight = int64_t{256} << 10;

// Vectors of inner steps from which on dot products are taken on Intel's processors, and where rows
// begin anywhere, not at cache lines.
constexpr int64_t kShortestDots = 16;
constexpr int64_t kLongDots = 40;
// Columns up to which they are taken with AVX2 alone, and vectors (of AVX-512) of inner steps from
// which on for more columns.
constexpr int64_t kFewColumns = 12;
constexpr int64_t kLongDotsAvx2 = 64;
// The same of bfloat16 where it is multiplied by pairs.
constexpr int64_t kFewColumnsOfPairs = 8;

// Whether the library multiplies these 16-bit numbers by instructions of their own: what it does
// without them, or oneDNN in their place, is slower than float32.
template <typename scalar_t>
bool library_multiplies() {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<scalar_t, simd::BFloat16>) {
    static const bool here = __builtin_cpu_supports("avx512bf16");
    return here;
  }
  static const bool here = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned kAvx512Fp16 = 1u << 23;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAvx512Fp16) != 0;
  }();
  return here;
#else
  return true;
#endif
}

// Multiplications up to which our kernel without pairs is always taken. Of eager's time, forward
// and backward, 2 cores of an Intel Xeon of family 6, model 207, with AMX and AVX512_FP16, by ours
// and by the library's products: float16 16 x 784 x 64 0.58 and 1.06, 100 x 784 x 64 0.77 and 1.06,
// 500 x 784 x 64 0.99 and 1.03, 512 x 512 x 512 1.12 and 1.00; bfloat16 1000 x 64 x 10 0.60
// and 1.05, 16 x 784 x 64 0.64 and 1.02, 100 x 784 x 64 0.81 and 1.01 (forward alone 1.06 and
// 0.79), 512 x 512 x 512 1.72 and 0.91. In bfloat16 elsewhere, where pairs serve most, what the
// library's call costs.
template <typename scalar_t>
int64_t small_product() {
  if (std::is_same_v<scalar_t, simd::BFloat16>) return int64_t{1} << (is_intel() ? 21 : 18);
  return int64_t{1} << 24;
}

}  // namespace

bool is_intel() {
#if defined(__x86_64__)
  static const bool here = __builtin_cpu_is("intel");
  return here;
#else
  return false;
#endif
}

// In float32 and float64: measured on Zen 5 (2 cores, float32, GFLOP/s of ours and of MKL 2024.2,
// which takes AVX2 there): 1024 x 1024 x 1024 445 and 208, 512 x 512 x 32000 400 and 200,
// 100 x 784 x 64 in one thread 217 and 100. With AVX2 alone, and where MKL has AVX-512 of its own
// (Intel), most large products stay with it (see kManyRows): 4096 x 1024 x 1024 takes 1.06 of its
// time by ours on Intel.
//
// In bfloat16 and float16 where the library has no instructions for them (GFLOP/s of ours and of
// its for 1024 x 784 x 64, its input's and its weight's gradient, 2 cores of an Intel Xeon of
// family 6, model 207, without AVX512_BF16 and AVX512_FP16): bfloat16 237, 233, 239 and 60, 59, 59;
// float16 220, 159, 178 and 28, 2.4, 3.5.
template <typename scalar_t>
bool all_products_serve() {
  if (simd::level() == simd::Level::kBaseline) return false;
  if constexpr (sizeof(scalar_t) == 2) return !library_multiplies<scalar_t>();
  return simd::level() == simd::Level::kAvx512 && !is_intel();
}

template <typename scalar_t>
bool product_may_serve(int64_t multiplications) {
  if (simd::level() == simd::Level::kBaseline) return false;
  if (multiplications <= small_product<scalar_t>() || all_products_serve<scalar_t>()) return true;
  if constexpr (std::is_same_v<scalar_t, simd::BFloat16>) return multiplies_pairs();
  // Of many rows; of Intel's AVX2 nothing was measured.
  return sizeof(scalar_t) != 2 && (simd::level() == simd::Level::kAvx512 || !is_intel());
}

template <typename scalar_t>
bool product_serves(const Product<scalar_t>& product) {
  const int64_t multiplications = product.rows * product.inner * product.columns;
  if (!product_may_serve<scalar_t>(multiplications)) return false;
  if constexpr (std::is_same_v<scalar_t, simd::BFloat16>) {
    if (pairs_serve(product)) return true;
  }
  if (sizeof(scalar_t) == 2) {
    if (product.accumulate) return false;
    if (dots_serve(product)) return true;
  }
  if (multiplications <= small_product<scalar_t>() || all_products_serve<scalar_t>()) return true;
  constexpr int64_t kBytes = sizeof(scalar_t);
  const bool wide = simd::level() == simd::Level::kAvx512;
  return kBytes > 2 && product.rows >= (wide ? kManyRows : kManyRowsAvx2) &&
         product.inner * product.columns * kBytes < kShortRight;
}

// Small products on Intel's processors, where large ones of many rows are packed (4096 x 784 x 64
// takes 1.23 of its time by dot products). Of eager's time, forward on 2 cores of an Intel Xeon of
// family 6, model 207, by dot products and by product_kernel.h or product_few.cpp: float32 1 x 784
// x 256 0.89 and 1.4, 2 x 784 x 256 1.0 to 1.15 and 1.8, 4 x 784 x 256 0.83 and 1.45, 12 x 2048 x
// 16 0.8 and 1.3, 100 x 784 x 64 0.85 and 0.85, 300 x 256 x 64 0.93 and 0.83; of rows that begin
// anywhere 2 x 700 x 256 1.2 and 1.6, 300 x 700 x 64 0.97 and 0.78, but 300 x 300 x 64 1.12 and
// 0.8.
//
// Elsewhere, where large ones are our own as well, any of few columns: the same on 2 cores of Zen 5
// 1 x 2048 x 1 1.07 and 1.5, 1000 x 128 x 2 0.56 and 1.5, 64 x 2048 x 2 0.58 and 2.1, 1 x 8192 x 24
// 0.86 and 1.7, 4096 x 784 x 10 0.22 and 0.33, 4096 x 784 x 16 0.40 and 0.43; in float64 1 x 2048 x
// 10 0.91 and 1.3, 1000 x 256 x 2 0.42 and 1.2. But 4096 x 8192 x 16 0.79 and 0.52, and of more
// columns 1 x 784 x 64 0.93 and 1.12, 4096 x 784 x 64 0.46 and 0.41, 4096 x 2048 x 64 0.55 and
// 0.38. On 2 cores of Zen 4 1 x 784 x 64 0.86 and 1.29, 2 x 784 x 100 0.50 and 1.21, but 4096 x 784
// x 64 0.93 and 0.83, and a step of training of 784-64-10 with batches of 100 takes 288 us and 261,
// 358 and 285 where both threads share a core and its first cache.
//
// With AVX2, of few columns the same, and of more where rows are long, of small products: forward
// on 2 cores of Zen 3 by dot products and by panels 1 x 2048 x 1 0.88 and 1.27, 64 x 2048 x 2 0.48
// and 1.19, 1000 x 128 x 2 0.51 and 1.47, 1 x 8192 x 8 0.84 and 1.49, 1 x 2048 x 16 0.87 and 1.45,
// 100 x 2048 x 64 0.94 and 0.91, 16 x 1024 x 64 0.53 and 0.66. But of 784 steps 2 x 784 x 24
// takes 1.26 of its time by panels, 1000 x 784 x 16 1.18. Of 470 shapes 3 are slower than eager by
// more than 3 % so and 69 were (of 323 in float64 3 and 27).
//
// In float16 as in float32, in bfloat16 as well or, where it is multiplied by pairs, of few
// columns; on Intel's processors not (not measured). Of eager's time on 2 cores of Zen 4, by dot
// products and by what served before: float16 64 x 2047 x 2 0.53 and 3.6, 1 x 2048 x 32 1.03
// and 1.67, bfloat16 1000 x 1024 x 1 0.67 and 2.7, 100 x 2048 x 2 0.42 and 1.19; but bfloat16 1000
// x 784 x 16 1.41 and 0.94.
template <typename scalar_t>
bool dots_serve(const Product<scalar_t>& product) {
  constexpr int64_t kLanes = 64 / sizeof(simd::acc_type<scalar_t>);
  const int64_t inner = product.inner, columns = product.columns;
  if (simd::level() == simd::Level::kBaseline || product.right.row_stride != 1) return false;
  const bool pairs = std::is_same_v<scalar_t, simd::BFloat16> && multiplies_pairs();
  if (sizeof(scalar_t) == 2 && (is_intel() || (pairs && columns > kFewColumnsOfPairs)))
    return false;
  // Where products of any number of rows are our own, the rows are not asked.
  const bool small = !all_products_serve<scalar_t>() &&
                     product.rows * inner * columns <= small_product<scalar_t>();
  if (simd::level() == simd::Level::kAvx2) {
    if (columns > kFewColumns) return small && inner >= kLongDotsAvx2 * kLanes;
    return inner >= (columns <= 4 ? 2 : columns <= 7 ? 4 : 8) * kLanes;
  }
  if (!is_intel()) {
    const int64_t vectors = columns <= 4 ? 2 : columns <= 12 ? 8 : 32;
    return columns <= kLanes * 3 / 2 && inner >= vectors * kLanes;
  }
  return small && inner >= (inner % kLanes == 0 ? kShortestDots : kLongDots) * kLanes;
}

template bool dots_serve(const Product<float>& product);
template bool dots_serve(const Product<double>& product);
template bool dots_serve(const Product<simd::BFloat16>& product);
template bool dots_serve(const Product<simd::Half>& product);
template bool product_serves(const Product<float>& product);
template bool product_serves(const Product<double>& product);
template bool product_serves(const Product<simd::BFloat16>& product);
template bool product_serves(const Product<simd::Half>& product);
template bool product_may_serve<float>(int64_t multiplications);
template bool all_products_serve<float>();
template bool product_may_serve<double>(int64_t multiplications);
template bool all_products_serve<double>();
template bool product_may_serve<simd::BFloat16>(int64_t multiplications);
template bool all_products_serve<simd::BFloat16>();
template bool product_may_serve<simd::Half>(int64_t multiplications);
template bool all_products_serve<simd::Half>();

}  // namespace torchext::cpu
