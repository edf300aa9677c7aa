// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/buffer_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <mutex>
#include <new>
#include <vector>

namespace ckpt_fast {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = 2 << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// Direct I/O from 4 KiB pages splits a request into one segment per page, which costs a third of the
// bandwidth; a buffer on huge pages goes to the device in a few segments.
uint8_t* map_buffer(size_t nbytes) {
  const size_t alignment = nbytes >= kHugePage ? kHugePage : kPage;
  const size_t reserved = nbytes + alignment - kPage;
  void* mapping = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(mapping);
  const uintptr_t aligned = round_up(begin, alignment);
  const size_t before = aligned - begin;
  const size_t behind = reserved - before - nbytes;
  if (before > 0) munmap(mapping, before);
  auto* data = reinterpret_cast<uint8_t*>(aligned);
  if (behind > 0) munmap(data + nbytes, behind);
  if (nbytes >= kHugePage) madvise(data, nbytes, MADV_HUGEPAGE);
  return data;
}

/// Idle buffers, all of one size: the one last requested.
class Pool {
 public:
  uint8_t* take(size_t nbytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (nbytes != size_) {
      for (uint8_t* data : idle_) munmap(data, size_);
      idle_.clear();
      size_ = nbytes;
    }
    if (idle_.empty()) return map_buffer(nbytes);
    uint8_t* const taken = idle_.back();
    idle_.pop_back();
    return taken;
  }

  void give_back(uint8_t* data, size_t nbytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (nbytes == size_) {
      idle_.push_back(data);
    } else {
      munmap(data, nbytes);
    }
  }

  size_t idle_nbytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return idle_.size() * size_;
  }

  void begin_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++uses_;
  }

  void end_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--uses_ > 0) return;
    for (; idle_.size() * size_ > kKeptNbytes; idle_.pop_back()) munmap(idle_.back(), size_);
  }

  // A fork copies the lock in its current state: unless it is free at that moment, it stays locked forever.
  void before_fork() { mutex_.lock(); }
  void after_fork() { mutex_.unlock(); }

  // The parent's jobs do not exist in the child.
  void after_fork_in_child() {
    uses_ = 0;
    mutex_.unlock();
  }

 private:
  std::mutex mutex_;
  int uses_ = 0;
  std::vector<uint8_t*> idle_;
  size_t size_ = 0;
};

Pool& pool();

Pool* make_pool() {
  pthread_atfork([] { pool().before_fork(); }, [] { pool().after_fork(); },
                 [] { pool().after_fork_in_child(); });
  return new Pool;
}

Pool& pool() {
  // Never destroyed: a thread may still return a buffer while the process exits.
  static Pool* const instance = make_pool();
  return *instance;
}

}  // namespace

Buffer::Buffer(size_t nbytes) : data_(nullptr), size_(round_up(nbytes, kPage)) { data_ = pool().take(size_); }

Buffer::~Buffer() { pool().give_back(data_, size_); }

PoolUse::PoolUse() { pool().begin_use(); }

PoolUse::~PoolUse() { pool().end_use(); }

size_t pooled_nbytes() { return pool().idle_nbytes(); }

}  // namespace ckpt_fast
