// SPDX-License-Identifier: Apache-2.0
// Bytes that come while they are written: whoever brings them and the job that writes them wait for each
// other.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/base/progress.h"

namespace ckpt_fast {

/// Batches of bytes, in the order in which they come. For one job.
class Supply {
 public:
  /// `nbytes[b]` is what the job writes of batch b.
  explicit Supply(std::vector<int64_t> nbytes) : missing_(std::move(nbytes)) { advance(); }

  size_t batch_count() const { return missing_.size(); }

  /// Called by whoever brings them: the first `count` batches are in memory.
  void arrive(size_t count) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      arrived_ = count;
    }
    changed_.notify_all();
  }

  /// Waits until batches 0 … `batch` are written, so that their memory may be used again. Returns false if
  /// they are not after that time, or will not be.
  bool wait_written(size_t batch, std::chrono::nanoseconds at_most) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, at_most, [&] { return written_ > batch || ended_; });
    return written_ > batch;
  }

  bool ended() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ended_;
  }

  /// Called by the job: waits for a batch. Returns false if it will not come, or the job was stopped.
  bool wait_arrived(size_t batch, const Progress* progress) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (arrived_ <= batch && !ended_ && (progress == nullptr || !progress->stopped())) {
      changed_.wait_for(lock, kLookAgain);  // nobody wakes it when the job is stopped
    }
    return arrived_ > batch && !ended_;
  }

  /// Called by the job: these bytes of a batch are written.
  void add_written(size_t batch, int64_t nbytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      missing_[batch] -= nbytes;
      if (!advance()) return;
    }
    changed_.notify_all();
  }

  /// Nothing more comes, or is written: wakes all who wait.
  void end() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    changed_.notify_all();
  }

 private:
  static constexpr std::chrono::milliseconds kLookAgain{20};

  bool advance() {
    const size_t before = written_;
    while (written_ < missing_.size() && missing_[written_] == 0) ++written_;
    return written_ > before;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int64_t> missing_;  // bytes of each batch that are not yet written
  size_t arrived_ = 0;            // batches in memory
  size_t written_ = 0;            // batches written, of the first ones
  bool ended_ = false;
};

}  // namespace ckpt_fast
