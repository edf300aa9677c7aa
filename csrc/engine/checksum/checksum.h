// SPDX-License-Identifier: Apache-2.0
// CRC-32 with zlib's polynomial and conventions, alone or fused into a copy. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ckpt_fast {

/// How a copy stores: through the caches, or past them (for destinations the CPU will not read soon).
enum class Store { kCached, kStreaming };

/// CRC-32 of memory; `seed` is the CRC of the bytes before it (0 if there are none).
uint32_t crc32(const void* data, size_t nbytes, uint32_t seed = 0);

/// Copies and returns the CRC-32 of the bytes, reading each once. The ranges do not overlap.
uint32_t copy_crc32(void* destination, const void* source, size_t nbytes, uint32_t seed = 0,
                    Store store = Store::kCached);

/// The contribution of `crc` to the CRC of a stream in which `nbytes_behind` bytes follow. The CRC of a
/// stream is the XOR of its parts' contributions, so parts may be finished in any order.
uint32_t crc32_shift(uint32_t crc, uint64_t nbytes_behind);

/// CRC-32 of A followed by B, from the CRC of each and B's length.
inline uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t second_nbytes) {
  return crc32_shift(first, second_nbytes) ^ second;
}

/// Names of the instruction sets that crc32 and the copies use on this machine.
std::vector<std::string> cpu_features();

}  // namespace ckpt_fast
