#include "cpu/cross_entropy_blocks.h"

namespace torchext::cpu {

TORCHEXT_CROSS_ENTROPY_OF(simd::BFloat16)

}  // namespace torchext::cpu
