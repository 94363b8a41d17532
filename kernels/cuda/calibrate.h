// What the device can do, measured with nothing around it. Only the module's own sources include this.
#pragma once

#include <cstdint>

#include "kernels/cuda/queue.h"

namespace octet::cuda {

// ModuleTable::read_seconds.
double read_seconds(Queue* queue, const void* data, int64_t bytes);

}  // namespace octet::cuda
