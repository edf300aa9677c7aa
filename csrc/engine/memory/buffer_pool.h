// SPDX-License-Identifier: Apache-2.0
// Chunk buffers: page-aligned, on huge pages where the system grants them, kept between calls.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt_fast {

/// A buffer borrowed from the process-wide pool; returned on destruction. Contents are undefined.
class Buffer {
 public:
  /// `nbytes` > 0 is rounded up to whole pages. Throws std::bad_alloc.
  explicit Buffer(size_t nbytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_;
  size_t size_;
};

/// While one of these exists, returned memory is kept for the next Buffer. With the last one, idle buffers
/// beyond kKeptNbytes are freed.
class PoolUse {
 public:
  PoolUse();
  ~PoolUse();
  PoolUse(const PoolUse&) = delete;
  PoolUse& operator=(const PoolUse&) = delete;
};

/// As much as the default settings use: 8 threads, 4 chunks of 4 MiB each.
constexpr size_t kKeptNbytes = 128 << 20;

/// Returns the bytes that idle buffers hold at this moment.
size_t pooled_nbytes();

}  // namespace ckpt_fast
