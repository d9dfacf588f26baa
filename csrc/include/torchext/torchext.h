// The C++ frontend of torchext: functions (autograd.h) and modules (nn.h).
#pragma once

#include <torchext/autograd.h>
#include <torchext/nn.h>
#include <torchext/optim.h>
