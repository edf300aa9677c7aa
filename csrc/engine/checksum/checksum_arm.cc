// SPDX-License-Identifier: Apache-2.0
// CRC-32 with ARMv8's instruction for this polynomial, eight bytes at a time.
#if defined(__aarch64__)

#include <arm_acle.h>
#include <asm/hwcap.h>
#include <sys/auxv.h>

#include <cstring>

#include "engine/base/stream_line_arm.h"
#include "engine/checksum/checksum_kernels.h"

#if defined(__clang__)
#define TARGET_CRC __attribute__((target("crc")))
#else
#define TARGET_CRC __attribute__((target("+crc")))
#endif

namespace ckpt_fast::crc {

namespace {

constexpr size_t kBlock = 64;

TARGET_CRC uint32_t update_arm(const uint8_t* source, size_t nbytes, uint32_t state) {
  for (; nbytes > 0; nbytes -= kBlock, source += kBlock) {
    uint64_t words[kBlock / 8];
    std::memcpy(words, source, kBlock);
    for (const uint64_t word : words) state = __crc32d(state, word);
  }
  return state;
}

template <bool streams>
TARGET_CRC uint32_t copy_arm(uint8_t* destination, const uint8_t* source, size_t nbytes, uint32_t state) {
  for (; nbytes > 0; nbytes -= kBlock, source += kBlock, destination += kBlock) {
    uint64_t words[kBlock / 8];
    std::memcpy(words, source, kBlock);
    for (const uint64_t word : words) state = __crc32d(state, word);
    if constexpr (streams) {
      stream_line(destination, source);
    } else {
      std::memcpy(destination, words, kBlock);
    }
  }
  return state;
}

}  // namespace

std::vector<Kernels> arm_kernels() {
  if ((getauxval(AT_HWCAP) & HWCAP_CRC32) == 0) return {};
  return {{update_arm, copy_arm<false>, copy_arm<true>, {"crc32"}}};
}

}  // namespace ckpt_fast::crc

#endif
