// SPDX-License-Identifier: Apache-2.0
#include "copier.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_copy.h"
#include "parallel.h"

namespace ckpt_fast {

namespace {

// Rows that are shorter on average are copied in the order of their sources: reads that skip what lies
// between two of them would bring that in for nothing, writes would not.
constexpr int64_t kShortRow = 256 << 10;

// Long enough that taking a task costs nothing, short enough that threads end together.
constexpr int64_t kTaskNbytes = 4 << 20;

/// Position `offset` of the row that is copied as number `number`.
struct Start {
  size_t number;
  int64_t offset;
};

std::vector<size_t> order_of_copies(const Column& source, const Column& nbytes) {
  std::vector<size_t> rows(nbytes.size);
  std::iota(rows.begin(), rows.end(), size_t{0});
  int64_t total = 0;
  for (size_t row = 0; row < nbytes.size; ++row) {
    if (nbytes[row] < 0) throw std::invalid_argument("row " + std::to_string(row) + " has a negative size");
    total += nbytes[row];
  }
  const auto comes_first = [&](size_t a, size_t b) { return source[a] < source[b]; };
  if (total < kShortRow * static_cast<int64_t>(nbytes.size) &&
      !std::is_sorted(rows.begin(), rows.end(), comes_first)) {
    std::sort(rows.begin(), rows.end(), comes_first);
  }
  return rows;
}

}  // namespace

void copy_extents(Column destination, Column source, Column nbytes, int threads) {
  if (destination.size != nbytes.size || source.size != nbytes.size) {
    throw std::invalid_argument("the columns of copy_extents differ in length");
  }
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");

  // Tasks of equal size, whatever the sizes of the rows: task i begins at starts[i].
  const std::vector<size_t> rows = order_of_copies(source, nbytes);
  std::vector<Start> starts;
  int64_t total = 0;
  for (size_t number = 0; number < rows.size(); ++number) {
    const int64_t end = total + nbytes[rows[number]];
    for (int64_t at = static_cast<int64_t>(starts.size()) * kTaskNbytes; at < end; at += kTaskNbytes) {
      starts.push_back({number, at - total});
    }
    total = end;
  }

  const auto task = [&](size_t index) {
    auto [number, offset] = starts[index];
    for (int64_t left = kTaskNbytes; left > 0 && number < rows.size(); ++number, offset = 0) {
      const size_t row = rows[number];
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
