// SPDX-License-Identifier: Apache-2.0
// System calls and allocations at their worst.
#pragma once

#include <atomic>

/// While true, writes to descriptors with O_DIRECT fail with EOPNOTSUPP.
extern std::atomic<bool> direct_writes_unsupported;

/// While true, close(2) closes but reports an interruption.
extern std::atomic<bool> closes_interrupted;

/// Only this many allocations of this thread succeed; negative: all.
extern thread_local int allocations_left;

/// While one of these exists, reads and writes are interrupted or partial.
class Interruptions {
 public:
  Interruptions();
  ~Interruptions();
  Interruptions(const Interruptions&) = delete;
  Interruptions& operator=(const Interruptions&) = delete;

  /// Calls made since the beginning.
  unsigned count() const;

 private:
  unsigned before_;
};
