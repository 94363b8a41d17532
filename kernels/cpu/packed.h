// The packed weight layout, one for every instruction family: panels of 32 outputs, inside a panel one group per K
// pair. A group's byte order is such that 16 dwords (even, odd) of BF16 come out of it with two loads or two byte
// unpacks.
//
//   matrix   panel 0 | panel 1 | ...          panel: outputs 32p .. 32p+31, the last one padded with zero rows
//   panel    pair 0 | pair 1 | ... | pair in/2-1      pair j: columns 2j (even) and 2j+1 (odd)
//
//   BF16 group, 128 bytes: dword o = output o = [even, odd]
//       | o0 e,o | o1 e,o | ... | o15 e,o || o16 e,o | ... | o31 e,o |
//         \------ one 16-lane load ------/   \--- one 16-lane load ---/
//
//   FP8 group, 64 bytes = four 16-byte lanes, l = 0..3:
//       | o4l e,o | o4l+1 e,o | o4l+2 e,o | o4l+3 e,o || o16+4l e,o | o17+4l e,o | o18+4l e,o | o19+4l e,o |
//         \------------ low 8 bytes: unpacklo --------/   \-------------- high 8 bytes: unpackhi -----------/
//     The high and low bytes of the BF16 values are looked up byte by byte; unpacking them within lanes then gives the
//     BF16 group's two 16-dword vectors in order.
//
// Everything here is static or a constant: the file is included by sources that are built for one instruction set,
// whose code must never be shared with the others by the linker.
#pragma once

#include <stdint.h>

namespace octet::cpu {

constexpr int kPanel = 32;       // outputs in a panel; ops.h calls it kPanelRows
constexpr int kBf16Group = 128;  // bytes of a panel's K pair
constexpr int kFp8Group = 64;
constexpr int kExpandedGroup = 256;  // FP32: 32 odd values, then 32 even ones

// Where output `row` (0..31) of a pair has its even byte; the odd one follows it.
static inline int fp8_offset(int row) { return (row % 16 / 4) * 16 + (row / 16) * 8 + (row % 4) * 2; }

}  // namespace octet::cpu
