// What the machine can do, measured with the kernels' own instructions: the yardstick that speeds are stated against.
#pragma once

#include "kernels/memory.h"

namespace octet {

// Bytes per second at which the stream's threads read `buffer` once, each its own contiguous part. Use the very buffer
// whose use is being judged, and measure in turns with it: bandwidth differs between buffers and drifts with time.
double read_bytes_per_second(Stream& stream, const Tensor& buffer);

// FLOP per second of the family's fastest dot, all threads, from registers; about 10 ms each call.
double dot_flops_per_second(Stream& stream);

}  // namespace octet
