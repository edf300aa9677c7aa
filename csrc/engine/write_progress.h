// SPDX-License-Identifier: Apache-2.0
// How another thread watches a call of write_files, and ends it early.
#pragma once

#include <atomic>
#include <cstdint>

namespace ckpt_fast {

class WriteProgress {
 public:
  /// Bytes handed to the file system so far, over all calls that were given this object.
  int64_t nbytes() const noexcept { return nbytes_; }
  void add(int64_t nbytes) noexcept { nbytes_ += nbytes; }

  /// Calls in progress, and later ones, fail with ECANCELED before their next chunk.
  void stop() noexcept { stopped_ = true; }
  bool stopped() const noexcept { return stopped_; }

 private:
  std::atomic<int64_t> nbytes_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace ckpt_fast
