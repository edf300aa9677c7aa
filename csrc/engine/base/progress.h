// SPDX-License-Identifier: Apache-2.0
// How another thread watches a job that writes or reads files, and ends it early.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

namespace ckpt_fast {

class Progress {
 public:
  /// Bytes written or read so far, over all calls that were given this object.
  int64_t nbytes() const noexcept { return nbytes_; }
  void add(int64_t nbytes) noexcept { nbytes_ += nbytes; }

  /// Calls in progress, and later ones, fail with ECANCELED before they open, move or rename anything more.
  void stop() {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopped_ = true;
  }
  bool stopped() const noexcept { return stopped_; }

  /// Asked before each rename, which ends with `end_rename`. False once the job is stopped: whoever has
  /// stopped it, and sees no rename under way, knows that none will come.
  bool begin_rename() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_) return false;
    ++renaming_;
    return true;
  }
  void end_rename() noexcept { --renaming_; }

  /// Whether a rename is under way.
  bool renaming() const noexcept { return renaming_ > 0; }

 private:
  std::mutex mutex_;
  std::atomic<int64_t> nbytes_{0};
  std::atomic<int> renaming_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace ckpt_fast
