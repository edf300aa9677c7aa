// SPDX-License-Identifier: Apache-2.0
// parallel, buffer_pool, file, copier, permute.
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <functional>
#include <new>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/parallel.h"
#include "engine/memory/buffer_pool.h"
#include "engine/memory/copier.h"
#include "engine/memory/permute.h"
#include "faults.h"

using namespace ckpt_fast;

void test_parallel() {
  std::vector<std::atomic<int>> visits(1000);
  parallel_for(visits.size(), 8, [&](size_t i) { ++visits[i]; });
  for (const std::atomic<int>& count : visits) CHECK(count == 1);
  parallel_for(0, 4, [](size_t) { CHECK(!"called"); });

  std::atomic<int> woken{0};
  std::atomic<size_t> done{0};
  const auto fail = [&] {
    parallel_for(
        1000000, 4,
        [&](size_t i) {
          ++done;
          if (i == 10) throw std::runtime_error("ten");
          while (i > 10 && woken == 0) std::this_thread::yield();
        },
        [&] { ++woken; });
  };
  CHECK(text_of<std::runtime_error>(fail) == "ten");
  CHECK(woken == 1);
  CHECK(done <= 11 + 3);  // indices up to 10, and those of the other three threads
}

/// Whichever allocation fails while threads are started: the work is done, or an exception is thrown.
void test_threads_without_memory() {
  for (int granted = 0; granted < 40; ++granted) {
    std::vector<std::atomic<int>> visits(200);
    const std::function<void(size_t)> visit = [&](size_t i) { ++visits[i]; };
    allocations_left = granted;
    try {
      parallel_for(visits.size(), 8, visit);
    } catch (const std::bad_alloc&) {
      CHECK(!"the caller alone could have done it");
    }
    allocations_left = -1;
    for (const std::atomic<int>& count : visits) CHECK(count == 1);
  }
}

/// A child forked while another thread is using the pool can use it too.
void test_fork() {
  std::atomic<bool> ended{false};
  std::thread busy([&] {
    while (!ended) const Buffer buffer(4096);
  });
  for (int i = 0; i < 300; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(10);
      const Buffer buffer(4096);
      _exit(0);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
  ended = true;
  busy.join();
}

void test_buffer_pool() {
  uint8_t* first = nullptr;
  {
    const Buffer buffer(3 << 20);
    first = buffer.data();
    CHECK(reinterpret_cast<uintptr_t>(first) % (2 << 20) == 0);
    CHECK(buffer.size() == 3 << 20);
    std::memset(first, 1, buffer.size());
    const Buffer other(3 << 20);
    CHECK(other.data() != first);
  }
  CHECK(pooled_nbytes() == 6 << 20);
  {
    const Buffer again(3 << 20);
  }
  CHECK(pooled_nbytes() == 6 << 20);
  {
    const Buffer small(5000);
    CHECK(small.size() == 8192);
  }
  CHECK(pooled_nbytes() == 8192);
  {
    const PoolUse use;
    {
      const Buffer first_large(96 << 20), second_large(96 << 20);
    }
    CHECK(pooled_nbytes() == 192 << 20);
  }
  CHECK(pooled_nbytes() == 96 << 20);
  const Buffer small(4096);
  CHECK(pooled_nbytes() == 0);
}

void test_file() {
  TemporaryDirectory directory;
  const std::string path = directory.file("file");
  const std::vector<uint8_t> content = noise(10000, 4);
  for (const bool direct : {false, true}) {
    const Buffer buffer(12288);
    std::memcpy(buffer.data(), content.data(), content.size());
    {
      OutputFile output(path, 10000, direct);
      output.write({{buffer.data() + 8192, 10000 - 8192}}, 10000 - 8192, 8192);
      output.write({{buffer.data(), 8192}}, 8192, 0);
      output.sync();
      output.close();
      CHECK(access(path.c_str(), F_OK) != 0);
      output.publish();
    }
    CHECK(read_whole(path) == content);
    std::memset(buffer.data(), 0, 12288);
    InputFile input(path, direct);
    CHECK(input.size() == 10000);
    input.read({{buffer.data(), 8192}}, 10000 - 4096, 4096);
    CHECK(std::memcmp(buffer.data(), content.data() + 4096, 10000 - 4096) == 0);
    const auto beyond = [&] { input.read({{buffer.data(), 8192}}, 8192, 4096); };
    CHECK(text_of<SystemError>(beyond) == "read 8192 bytes at 4096 from " + path + ": file ends at 10000");
    CHECK(unlink(path.c_str()) == 0);
  }
}

/// None of these makes a write fail.
void test_file_faults() {
  TemporaryDirectory directory;
  const std::string path = directory.file("file");
  const std::vector<uint8_t> content = noise(8192, 4);
  const Buffer buffer(8192);
  std::memcpy(buffer.data(), content.data(), content.size());
  direct_writes_unsupported = closes_interrupted = true;
  {
    OutputFile output(path, 8192, true);
    output.write({{buffer.data(), 8192}}, 8192, 0);
    output.sync();
    output.close();
    output.publish();
  }
  CHECK(read_whole(path) == content);
  // Without a sync, an interrupted close may mean lost data: the file is not published, and is removed.
  const auto unsynced = [&] { OutputFile(directory.file("other"), 0, false).close(); };
  CHECK(text_of<SystemError>(unsynced) == "close " + directory.file("other") + ": " + std::strerror(EINTR));
  direct_writes_unsupported = closes_interrupted = false;
}

void test_copy_runs() {
  // Three series whose runs alternate in memory, with more bytes than one task copies; the last comes first.
  const int64_t nbytes = 5001;
  const int64_t run_count = 1200;
  const int64_t pitch = 3 * nbytes + 7;
  const std::vector<uint8_t> source = noise(run_count * pitch, 6);
  std::vector<std::vector<uint8_t>> targets(3, std::vector<uint8_t>(run_count * nbytes));
  std::vector<int64_t> to, from;
  for (const int64_t member : {2, 0, 1}) {
    to.push_back(reinterpret_cast<int64_t>(targets[member].data()));
    from.push_back(reinterpret_cast<int64_t>(source.data()) + member * nbytes);
  }
  const std::vector<int64_t> sizes(3, nbytes), counts(3, run_count), pitches(3, pitch);
  copy_runs({{to.data(), 3}, {from.data(), 3}, {sizes.data(), 3}, {counts.data(), 3}, {pitches.data(), 3}},
            4);
  for (int64_t member = 0; member < 3; ++member) {
    for (int64_t run = 0; run < run_count; ++run) {
      CHECK(std::memcmp(targets[member].data() + run * nbytes, source.data() + run * pitch + member * nbytes,
                        nbytes) == 0);
    }
  }
}

void test_permute() {
  const int64_t rows = 1536;
  const int64_t row_nbytes = 7000;  // more in total than the caches hold
  const int64_t block = 32;
  const std::vector<uint8_t> source = noise(rows * row_nbytes, 5);
  std::vector<uint8_t> blocks(source.size());
  std::vector<uint8_t> back(source.size());
  const auto permute = [&](std::vector<uint8_t>& to, const std::vector<uint8_t>& from, bool interleave) {
    const int64_t row[] = {reinterpret_cast<int64_t>(to.data()), reinterpret_cast<int64_t>(from.data()), rows,
                           row_nbytes, block};
    permute_rows({{&row[0], 1}, {&row[1], 1}, {&row[2], 1}, {&row[3], 1}, {&row[4], 1}}, interleave, 4);
  };
  permute(blocks, source, true);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t half = row >= rows / 2;
    const int64_t within = row - half * (rows / 2);
    const int64_t place = within / block * 2 * block + half * block + within % block;
    CHECK(std::memcmp(blocks.data() + place * row_nbytes, source.data() + row * row_nbytes, row_nbytes) == 0);
  }
  permute(back, blocks, false);
  CHECK(back == source);
}
