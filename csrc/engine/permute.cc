// SPDX-License-Identifier: Apache-2.0
#include "permute.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "memory_copy.h"
#include "parallel.h"

namespace ckpt_fast {

namespace {

using std::to_string;

// One thread's unit of work: large enough to amortize taking it, small enough to share a matrix evenly.
constexpr int64_t kTaskNbytes = 1 << 20;

void check_sizes(int64_t rows, int64_t row_nbytes, int64_t block, int threads) {
  if (rows < 0 || row_nbytes < 0) throw std::invalid_argument("rows and row_nbytes must not be negative");
  if (block < 1) throw std::invalid_argument("block is " + to_string(block) + ", not at least 1");
  if (rows % (2 * block) != 0) {
    throw std::invalid_argument(to_string(rows) + " rows do not divide into pairs of blocks of " +
                                to_string(block));
  }
  if (threads < 1) throw std::invalid_argument("threads is " + to_string(threads) + ", not at least 1");
}

}  // namespace

void permute_rows(void* destination, const void* source, int64_t rows, int64_t row_nbytes, int64_t block,
                  bool interleave, int threads) {
  check_sizes(rows, row_nbytes, block, threads);
  auto* const to = static_cast<uint8_t*>(destination);
  const auto* const from = static_cast<const uint8_t*>(source);
  const int64_t nbytes = rows * row_nbytes;
  const int64_t run = block * row_nbytes;  // bytes that stay together
  const int64_t pairs = run > 0 ? nbytes / (2 * run) : 0;
  const Store store = streaming_pays(nbytes, run) ? Store::kStreaming : Store::kCached;

  // Both directions go through the interleaved order from its begin to its end, and so through two stretches
  // of the contiguous one: reads that skip every other run would bring memory in for nothing.
  const auto task = [&](size_t index) {
    int64_t at = static_cast<int64_t>(index) * kTaskNbytes;
    const int64_t end = std::min(at + kTaskNbytes, nbytes);
    while (at < end) {
      const int64_t i = at / run;
      const int64_t within = at % run;
      const int64_t count = std::min(run - within, end - at);
      const int64_t contiguous = (i % 2 * pairs + i / 2) * run + within;
      copy_memory(to + (interleave ? at : contiguous), from + (interleave ? contiguous : at),
                  static_cast<size_t>(count), store);
      at += count;
    }
  };
  parallel_for(static_cast<size_t>((nbytes + kTaskNbytes - 1) / kTaskNbytes), threads, task);
}

}  // namespace ckpt_fast
