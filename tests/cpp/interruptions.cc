// SPDX-License-Identifier: Apache-2.0
// The system calls that move bytes, as they may behave at their worst: interrupted, or done in part.
#include "interruptions.h"

#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>

namespace {

std::atomic<bool> interrupting{false};
std::atomic<unsigned> calls{0};

/// Every third call is interrupted, the others get through with half of their first part.
ssize_t move(long call, int fd, const iovec* parts, int count, off_t offset) {
  if (!interrupting) return syscall(call, fd, parts, count, offset, 0L);
  if (++calls % 3 == 0) {
    errno = EINTR;
    return -1;
  }
  const iovec half{parts->iov_base, std::max<size_t>(parts->iov_len / 2, 1)};
  return syscall(call, fd, &half, 1, offset, 0L);
}

}  // namespace

// In place of libc's, for the whole program.
extern "C" ssize_t pwritev(int fd, const iovec* parts, int count, off_t offset) {
  return move(SYS_pwritev, fd, parts, count, offset);
}

extern "C" ssize_t preadv(int fd, const iovec* parts, int count, off_t offset) {
  return move(SYS_preadv, fd, parts, count, offset);
}

Interruptions::Interruptions() : before_(calls) { interrupting = true; }
Interruptions::~Interruptions() { interrupting = false; }
unsigned Interruptions::count() const { return calls - before_; }
