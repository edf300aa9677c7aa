// SPDX-License-Identifier: Apache-2.0
#include "engine/io/chunk_image.h"

#include <cstring>

#include "engine/checksum/checksum_kernels.h"

namespace ckpt_fast {

namespace {

// Shorter pieces are cheaper to copy than to pass to the kernel one by one.
constexpr size_t kShortestReference = 16 << 10;

// Streaming stores pay off from a few pages on; shorter pieces share cache lines with their neighbors.
constexpr size_t kShortestStream = 16 << 10;

}  // namespace

void ChunkImage::append_zeros(size_t nbytes) {
  std::memset(buffer_ + nbytes_, 0, nbytes);
  add_part(buffer_ + nbytes_, nbytes);
  crc_ = ~crc32_shift(~crc_, nbytes);  // zeros only shift the register
}

uint32_t ChunkImage::append(const uint8_t* piece, size_t nbytes, bool patchable) {
  const uint32_t before = crc_;
  if (mode_ == Mode::kGather && !patchable && nbytes >= kShortestReference) {
    crc_ = crc32(piece, nbytes, before);
    add_part(piece, nbytes);
  } else {
    // Direct writes are not read by the processor again; gathered writes are, by the kernel.
    const bool streaming = mode_ == Mode::kFlat && nbytes >= kShortestStream;
    crc_ =
        copy_crc32(buffer_ + nbytes_, piece, nbytes, before, streaming ? Store::kStreaming : Store::kCached);
    add_part(buffer_ + nbytes_, nbytes);
  }
  return crc_ ^ crc32_shift(before, nbytes);
}

void ChunkImage::patch(size_t position, const uint8_t* bytes, size_t nbytes) {
  uint8_t* const target = buffer_ + position;
  // The CRC is linear: changing bytes by a difference changes the CRC by that of the shifted difference.
  uint32_t change = 0;
  for (size_t i = 0; i < nbytes; ++i) {
    const uint8_t difference = target[i] ^ bytes[i];
    change = crc::update_bytes(&difference, 1, change);
    target[i] = bytes[i];
  }
  crc_ ^= crc32_shift(change, nbytes_ - position - nbytes);
}

void ChunkImage::add_part(const void* data, size_t nbytes) {
  if (nbytes == 0) return;
  nbytes_ += nbytes;
  const bool adjacent =
      !parts_.empty() && static_cast<uint8_t*>(parts_.back().iov_base) + parts_.back().iov_len == data;
  if (adjacent) {
    parts_.back().iov_len += nbytes;
  } else {
    parts_.push_back({const_cast<void*>(data), nbytes});
  }
}

}  // namespace ckpt_fast
