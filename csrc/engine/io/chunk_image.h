// SPDX-License-Identifier: Apache-2.0
// The bytes of one chunk of a file, assembled from pieces of memory, and their CRC-32.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/checksum/checksum.h"

namespace ckpt_fast {

class ChunkImage {
 public:
  /// What happens to long pieces: they are copied into one buffer, as direct I/O requires, or left in place
  /// for a gathering write, which saves the copy.
  enum class Mode { kFlat, kGather };

  /// `buffer` has room for the longest chunk. It, and with kGather also the pieces, must stay unchanged until
  /// the image has been written.
  ChunkImage(uint8_t* buffer, Mode mode) : buffer_(buffer), mode_(mode) {}

  void append_zeros(size_t nbytes);

  /// Returns the CRC-32 of the piece. `patchable` pieces are copied, so that patch() may change them.
  uint32_t append(const uint8_t* piece, size_t nbytes, bool patchable);

  /// Overwrites bytes of the image that were appended as zeros or as a patchable piece.
  void patch(size_t position, const uint8_t* bytes, size_t nbytes);

  size_t nbytes() const { return nbytes_; }
  uint32_t crc() const { return crc_; }
  const std::vector<iovec>& parts() const { return parts_; }

 private:
  void add_part(const void* data, size_t nbytes);

  uint8_t* const buffer_;
  const Mode mode_;
  size_t nbytes_ = 0;
  uint32_t crc_ = 0;
  std::vector<iovec> parts_;
};

}  // namespace ckpt_fast
