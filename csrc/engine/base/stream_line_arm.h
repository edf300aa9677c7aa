// SPDX-License-Identifier: Apache-2.0
// A cache line stored past the caches of an ARM processor.
#pragma once

#if defined(__aarch64__)

#include <arm_neon.h>

#include <cstdint>

namespace ckpt_fast {

/// Copies 64 bytes; `to` is aligned to them. Unlike x86's, these stores need no fence: the hint changes
/// nothing about their order. GCC has no function for the instruction.
inline void stream_line(uint8_t* to, const uint8_t* from) {
  const uint8x16_t a = vld1q_u8(from);
  const uint8x16_t b = vld1q_u8(from + 16);
  const uint8x16_t c = vld1q_u8(from + 32);
  const uint8x16_t d = vld1q_u8(from + 48);
  __asm__ volatile("stnp %q[a], %q[b], [%[to]]\n\tstnp %q[c], %q[d], [%[to], #32]"
                   :
                   : [a] "w"(a), [b] "w"(b), [c] "w"(c), [d] "w"(d), [to] "r"(to)
                   : "memory");
}

}  // namespace ckpt_fast

#endif
