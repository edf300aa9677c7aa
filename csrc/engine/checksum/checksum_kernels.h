// SPDX-License-Identifier: Apache-2.0
// The interface between checksum.cc and its instruction-set specific inner loops.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace ckpt_fast::crc {

/// Advances the CRC register (the CRC's complement) over `nbytes` of source.
using UpdateKernel = uint32_t (*)(const uint8_t* source, size_t nbytes, uint32_t state);

/// The same, and copies. Streaming kernels need a destination aligned to 64 bytes and end with a fence.
using CopyKernel = uint32_t (*)(uint8_t* destination, const uint8_t* source, size_t nbytes, uint32_t state);

/// Inner loops for whole blocks: `nbytes` is a positive multiple of 64.
struct Kernels {
  UpdateKernel update;
  CopyKernel copy;
  CopyKernel copy_streaming;
  std::vector<std::string> features;
};

/// Plain C++ for any length; also handles the tail that block kernels leave.
uint32_t update_bytes(const uint8_t* source, size_t nbytes, uint32_t state);

/// Every set of kernels that this processor supports, fastest first; the last is plain C++.
const std::vector<Kernels>& available_kernels();

#if defined(__x86_64__)
/// Those with carry-less multiplication, fastest first.
std::vector<Kernels> x86_kernels();
#elif defined(__aarch64__)
/// The one with CRC-32 instructions, if supported.
std::vector<Kernels> arm_kernels();
#endif

}  // namespace ckpt_fast::crc
