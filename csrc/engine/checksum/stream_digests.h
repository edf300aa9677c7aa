// SPDX-License-Identifier: Apache-2.0
// CRC-32s of streams whose bytes are processed in any order by several threads.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <vector>

#include "engine/checksum/checksum.h"

namespace ckpt_fast {

class StreamDigests {
 public:
  /// `nbytes[d]` is the length of stream d.
  explicit StreamDigests(const std::vector<int64_t>& nbytes) : streams_(nbytes.size()) {
    for (size_t d = 0; d < nbytes.size(); ++d) streams_[d].missing = nbytes[d];
  }

  /// Adds a part of stream `digest`: its CRC, its length, and the number of stream bytes that follow it.
  void add(int64_t digest, uint32_t crc, int64_t nbytes, int64_t nbytes_behind) {
    Stream& stream = streams_[digest];
    stream.crc.fetch_xor(crc32_shift(crc, nbytes_behind), std::memory_order_relaxed);
    if (stream.missing.fetch_sub(nbytes, std::memory_order_acq_rel) == nbytes) wake();
  }

  /// Blocks until every byte of the stream has been added. Returns false if the job was abandoned instead.
  bool wait_complete(int64_t digest) {
    const std::atomic<int64_t>& missing = streams_[digest].missing;
    if (missing.load(std::memory_order_acquire) != 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return missing.load(std::memory_order_acquire) == 0 || abandoned_; });
    }
    return missing.load(std::memory_order_acquire) == 0;
  }

  /// Wakes all waiters permanently: the bytes they wait for will not come.
  void abandon() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      abandoned_ = true;
    }
    changed_.notify_all();
  }

  uint32_t crc(int64_t digest) const { return streams_[digest].crc.load(std::memory_order_relaxed); }

  std::vector<uint32_t> crcs() const {
    std::vector<uint32_t> all;
    for (const Stream& stream : streams_) all.push_back(stream.crc.load(std::memory_order_relaxed));
    return all;
  }

 private:
  struct Stream {
    std::atomic<uint32_t> crc{0};
    std::atomic<int64_t> missing{0};
  };

  void wake() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
    }  // a waiter is either before its test or asleep
    changed_.notify_all();
  }

  std::vector<Stream> streams_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool abandoned_ = false;
};

}  // namespace ckpt_fast
