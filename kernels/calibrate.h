// What the machine can do, measured with the kernels' own instructions: the yardstick that speeds are stated against.
#pragma once

#include "kernels/memory.h"

namespace octet {

// Bytes per second at which `buffer`, which lies where the stream computes, is read once: by the stream's threads, each
// its own contiguous part, or by the device. Use the very buffer whose use is being judged, and measure in turns with
// it: bandwidth differs between buffers and drifts with time. REQUIRES: on a device, a multiple of 16 bytes.
double read_bytes_per_second(Stream& stream, const Tensor& buffer);

// FLOP per second of the family's fastest dot on the CPU, all threads, from registers; about 10 ms each call.
double dot_flops_per_second(Stream& stream);

}  // namespace octet
