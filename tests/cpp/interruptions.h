// SPDX-License-Identifier: Apache-2.0
// While one of these exists, reads and writes are interrupted or done only in part.
#pragma once

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
