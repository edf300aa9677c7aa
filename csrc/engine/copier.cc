// SPDX-License-Identifier: Apache-2.0
#include "copier.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_copy.h"
#include "parallel.h"

namespace ckpt_fast {

namespace {

// Long enough that taking a task costs nothing, short enough that threads end together.
constexpr int64_t kTaskNbytes = 4 << 20;

/// Position `offset` of row `row`.
struct Start {
  size_t row;
  int64_t offset;
};

}  // namespace

void copy_extents(Column destination, Column source, Column nbytes, int threads) {
  if (destination.size != nbytes.size || source.size != nbytes.size) {
    throw std::invalid_argument("the columns of copy_extents differ in length");
  }
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");

  // Tasks of equal size, whatever the sizes of the rows: task i begins at starts[i].
  std::vector<Start> starts;
  int64_t total = 0;
  for (size_t row = 0; row < nbytes.size; ++row) {
    if (nbytes[row] < 0) throw std::invalid_argument("row " + std::to_string(row) + " has a negative size");
    const int64_t end = total + nbytes[row];
    for (int64_t at = static_cast<int64_t>(starts.size()) * kTaskNbytes; at < end; at += kTaskNbytes) {
      starts.push_back({row, at - total});
    }
    total = end;
  }

  const auto task = [&](size_t index) {
    auto [row, offset] = starts[index];
    for (int64_t left = kTaskNbytes; left > 0 && row < nbytes.size; ++row, offset = 0) {
      const int64_t count = std::min(left, nbytes[row] - offset);
      if (count == 0) continue;
      copy_memory(reinterpret_cast<uint8_t*>(destination[row]) + offset,
                  reinterpret_cast<const uint8_t*>(source[row]) + offset, static_cast<size_t>(count),
                  streaming_pays(total, count) ? Store::kStreaming : Store::kCached);
      left -= count;
    }
  };
  parallel_for(starts.size(), threads, task);
}

}  // namespace ckpt_fast
