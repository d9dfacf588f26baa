#include "cpu/cross_entropy_blocks.h"

namespace torchext::cpu {

TORCHEXT_CROSS_ENTROPY_OF(float)

}  // namespace torchext::cpu
