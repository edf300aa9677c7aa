// SPDX-License-Identifier: Apache-2.0
// Lets another thread watch a job that writes or reads files, and stop it early.
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

  /// Called before each rename, with `end_rename` after it. Returns false once the job is stopped: a caller
  /// of `stop` that sees no rename in progress knows that none will follow.
  bool begin_rename() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (stopped_) return false;
    ++renaming_;
    return true;
  }
  void end_rename() noexcept { --renaming_; }

  /// Whether a rename is in progress.
  bool renaming() const noexcept { return renaming_ > 0; }

 private:
  std::mutex mutex_;
  std::atomic<int64_t> nbytes_{0};
  std::atomic<int> renaming_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace ckpt_fast
