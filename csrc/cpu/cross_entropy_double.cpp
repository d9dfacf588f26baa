#include "cpu/cross_entropy_blocks.h"

namespace torchext::cpu {

TORCHEXT_CROSS_ENTROPY_OF(double)

}  // namespace torchext::cpu
