// SPDX-License-Identifier: Apache-2.0
// Which instructions for checksums an x86-64 processor has. __builtin_cpu_supports would need a part of the
// compiler's runtime that Zig, which compiles the wheels, does not have.
#pragma once

#include <cpuid.h>

#include <cstdint>

namespace ckpt_fast::crc {

struct X86Features {
  bool pclmul = false;      // and SSE4.1
  bool vpclmulqdq = false;  // and AVX-512F, whose registers the system saves
};

/// Asks the processor; a hypervisor may have it answer less than it can do.
inline X86Features x86_features() {
  X86Features found;
  uint32_t eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return found;
  found.pclmul = (ecx & bit_PCLMUL) != 0 && (ecx & bit_SSE4_1) != 0;
  if ((ecx & bit_OSXSAVE) == 0) return found;

  // What the system saves: bits 1 and 2 are the SSE and AVX registers, 5 to 7 those of AVX-512.
  constexpr uint32_t kAvx512State = 0b1110'0110;
  uint32_t saved, upper;
  __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0));
  if ((saved & kAvx512State) != kAvx512State) return found;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return found;
  found.vpclmulqdq = (ebx & bit_AVX512F) != 0 && (ecx & bit_VPCLMULQDQ) != 0;
  return found;
}

}  // namespace ckpt_fast::crc
