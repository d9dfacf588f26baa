#include "cpu/cross_entropy_blocks.h"

namespace torchext::cpu {

TORCHEXT_CROSS_ENTROPY_OF(simd::Half)

}  // namespace torchext::cpu
