// SPDX-License-Identifier: Apache-2.0
#include "faults.h"

#include <fcntl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

std::atomic<bool> direct_writes_unsupported{false};
std::atomic<bool> closes_interrupted{false};
thread_local int allocations_left = -1;

namespace {

std::atomic<bool> interrupting{false};
std::atomic<unsigned> calls{0};

/// Every third call is interrupted; the others transfer half of their first part.
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

// Replaces libc's functions in the whole program.
extern "C" ssize_t pwritev(int fd, const iovec* parts, int count, off_t offset) {
  if (direct_writes_unsupported && (fcntl(fd, F_GETFL) & O_DIRECT) != 0) {
    errno = EOPNOTSUPP;
    return -1;
  }
  return move(SYS_pwritev, fd, parts, count, offset);
}

extern "C" ssize_t preadv(int fd, const iovec* parts, int count, off_t offset) {
  return move(SYS_preadv, fd, parts, count, offset);
}

extern "C" int close(int fd) {
  const auto result = static_cast<int>(syscall(SYS_close, fd));
  if (result != 0 || !closes_interrupted) return result;
  errno = EINTR;
  return -1;
}

void* operator new(size_t nbytes) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  void* const memory = std::malloc(nbytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void* operator new(size_t nbytes, const std::nothrow_t&) noexcept { return std::malloc(nbytes); }

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

Interruptions::Interruptions() : before_(calls) { interrupting = true; }
Interruptions::~Interruptions() { interrupting = false; }
unsigned Interruptions::count() const { return calls - before_; }
