// SPDX-License-Identifier: Apache-2.0
// What one thread of the gather does, in plain C++, so that a test can run the same code on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/copier.h"
#include "cuda/portable.h"

namespace ckpt_fast::cuda {

constexpr std::uint32_t kGatherThreads = 256;

/// As many copies as fit into the arguments of one launch, which are limited to 4 KiB and need no upload.
/// Each is done by one thread block.
struct GatherBatch {
  static constexpr std::uint32_t kCapacity = 160;

  std::uint64_t count = 0;
  Copy copies[kCapacity];
};
static_assert(sizeof(GatherBatch) <= 4096, "kernel arguments are limited to 4 KiB");

/// Thread `thread` of `kGatherThreads` copies every kGatherThreads-th unit of the aligned part.
template <typename Unit>
CKPT_FAST_DEVICE void copy_units(const Copy& copy, std::uint64_t units, std::uint32_t thread) {
  auto* destination = reinterpret_cast<Unit*>(copy.destination);
  auto* source = reinterpret_cast<const Unit*>(copy.source);
  for (std::uint64_t unit = thread; unit < units; unit += kGatherThreads) destination[unit] = source[unit];
}

/// Copies in the widest units to which both addresses are aligned, then the last bytes one by one. `Wide` is
/// the type of 16 bytes.
template <typename Wide>
CKPT_FAST_DEVICE void copy_one(const Copy& copy, std::uint32_t thread) {
  auto nbytes = static_cast<std::uint64_t>(copy.nbytes);
  std::uint64_t bits = copy.destination | copy.source;
  std::uint64_t copied = 0;
  if (bits % 16 == 0) {
    copy_units<Wide>(copy, nbytes / 16, thread);
    copied = nbytes / 16 * 16;
  } else if (bits % 4 == 0) {
    copy_units<std::uint32_t>(copy, nbytes / 4, thread);
    copied = nbytes / 4 * 4;
  }
  Copy rest{copy.destination + copied, copy.source + copied, static_cast<std::int64_t>(nbytes - copied)};
  copy_units<std::uint8_t>(rest, nbytes - copied, thread);
}

}  // namespace ckpt_fast::cuda
