// SPDX-License-Identifier: Apache-2.0
#include "engine/checksum/checksum.h"

#include <algorithm>
#include <cstring>

#include "engine/checksum/checksum_kernels.h"
#include "engine/checksum/crc32_math.h"

namespace ckpt_fast {

namespace crc {

namespace {

constexpr ByteTables kByteTables = make_byte_tables();
constexpr ShiftTables kShiftTables = make_shift_tables();

// Small enough that the block is still in the L1 cache for the copy that follows its checksum.
constexpr size_t kPortableBlock = 8 << 10;

uint32_t copy_portable(uint8_t* destination, const uint8_t* source, size_t nbytes, uint32_t state) {
  while (nbytes > 0) {
    const size_t block = std::min(nbytes, kPortableBlock);
    state = update_bytes(source, block, state);
    std::memcpy(destination, source, block);
    destination += block;
    source += block;
    nbytes -= block;
  }
  return state;
}

std::vector<Kernels> find_kernels() {
  std::vector<Kernels> found;
#if defined(__x86_64__)
  found = x86_kernels();
#elif defined(__aarch64__)
  found = arm_kernels();
#endif
  found.push_back({update_bytes, copy_portable, copy_portable, {}});
  return found;
}

const Kernels& fastest() { return available_kernels().front(); }

}  // namespace

uint32_t update_bytes(const uint8_t* source, size_t nbytes, uint32_t state) {
  const ByteTables& t = kByteTables;
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  for (; nbytes >= 8; nbytes -= 8, source += 8) {
    uint64_t word;
    std::memcpy(&word, source, 8);
    word ^= state;
    state = t[7][word & 255] ^ t[6][(word >> 8) & 255] ^ t[5][(word >> 16) & 255] ^ t[4][(word >> 24) & 255] ^
            t[3][(word >> 32) & 255] ^ t[2][(word >> 40) & 255] ^ t[1][(word >> 48) & 255] ^ t[0][word >> 56];
  }
#endif
  for (; nbytes > 0; --nbytes, ++source) state = t[0][(state ^ *source) & 255] ^ (state >> 8);
  return state;
}

const std::vector<Kernels>& available_kernels() {
  static const std::vector<Kernels> kernels = find_kernels();
  return kernels;
}

}  // namespace crc

uint32_t crc32(const void* data, size_t nbytes, uint32_t seed) {
  const auto* source = static_cast<const uint8_t*>(data);
  uint32_t state = ~seed;
  const size_t blocks = nbytes & ~size_t{63};
  if (blocks > 0) state = crc::fastest().update(source, blocks, state);
  return ~crc::update_bytes(source + blocks, nbytes - blocks, state);
}

uint32_t copy_crc32(void* destination, const void* source, size_t nbytes, uint32_t seed, Store store) {
  auto* to = static_cast<uint8_t*>(destination);
  const auto* from = static_cast<const uint8_t*>(source);
  uint32_t state = ~seed;
  auto copy_small = [&](size_t count) {
    state = crc::update_bytes(from, count, state);
    std::memcpy(to, from, count);
    to += count;
    from += count;
    nbytes -= count;
  };
  const bool streaming = store == Store::kStreaming;
  if (streaming) copy_small(std::min(nbytes, (0 - reinterpret_cast<uintptr_t>(to)) & size_t{63}));
  const size_t blocks = nbytes & ~size_t{63};
  if (blocks > 0) {
    const crc::Kernels& kernels = crc::fastest();
    state = (streaming ? kernels.copy_streaming : kernels.copy)(to, from, blocks, state);
    to += blocks;
    from += blocks;
    nbytes -= blocks;
  }
  copy_small(nbytes);
  return ~state;
}

uint32_t crc32_shift(uint32_t crc, uint64_t nbytes_behind) {
  for (size_t k = 0; nbytes_behind != 0; ++k, nbytes_behind >>= 8) {
    const uint64_t digit = nbytes_behind & 255;
    if (digit != 0) crc = crc::multiply(crc, crc::kShiftTables[k][digit]);
  }
  return crc;
}

std::vector<std::string> cpu_features() { return crc::fastest().features; }

}  // namespace ckpt_fast
