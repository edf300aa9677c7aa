// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/copier.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/base/parallel.h"
#include "engine/memory/memory_copy.h"

namespace ckpt_fast {

namespace {

using std::to_string;

// Long enough that taking a task costs nothing, short enough that threads end together.
constexpr int64_t kTaskNbytes = 4 << 20;

/// Rows whose runs take turns in memory, as the gate and up rows of an interleaved weight do: members [first,
/// first + count) of the order of copies. They are read in turn too: a thread that skips every other stretch
/// of memory reads at less than half the speed (0.46 was measured, at runs of 8 KiB), one that writes to two
/// stretches in turn loses nothing.
struct Band {
  size_t first;
  size_t count;
  int64_t nbytes;  // of all runs of all members
};

/// Where a task begins: byte `offset` of what band `band` copies.
struct Start {
  size_t band;
  int64_t offset;
};

void check(const CopyRows& rows) {
  const size_t count = rows.nbytes.size;
  for (const Column* column : {&rows.destination, &rows.source, &rows.runs, &rows.pitch}) {
    if (column->size != count) throw std::invalid_argument("the columns of copy_runs differ in length");
  }
  for (size_t row = 0; row < count; ++row) {
    if (rows.nbytes[row] < 0) throw std::invalid_argument("row " + to_string(row) + " has a negative size");
    if (rows.runs[row] < 0) {
      throw std::invalid_argument("row " + to_string(row) + " has a negative number of runs");
    }
  }
}

/// Whether the runs of `row` lie between the first two runs of `first`, the second two, and so on.
bool takes_turns(const CopyRows& rows, size_t first, size_t row) {
  return rows.runs[row] == rows.runs[first] && rows.nbytes[row] == rows.nbytes[first] &&
         rows.pitch[row] == rows.pitch[first] && rows.source[row] < rows.source[first] + rows.pitch[first];
}

std::vector<Band> bands_of(const CopyRows& rows, const std::vector<size_t>& order) {
  std::vector<Band> bands;
  for (size_t number = 0; number < order.size(); ++number) {
    const size_t row = order[number];
    const int64_t nbytes = rows.nbytes[row] * rows.runs[row];
    if (nbytes == 0) continue;
    if (!bands.empty() && rows.runs[row] > 1 && bands.back().first + bands.back().count == number &&
        takes_turns(rows, order[bands.back().first], row)) {
      bands.back().count += 1;
      bands.back().nbytes += nbytes;
    } else {
      bands.push_back({number, 1, nbytes});
    }
  }
  return bands;
}

/// Copies bytes `begin` to `end` of a band whose members are `members`.
void copy_band(const CopyRows& rows, const size_t* members, size_t count, int64_t begin, int64_t end,
               Store store) {
  const int64_t nbytes = rows.nbytes[members[0]];
  size_t member = static_cast<size_t>(begin / nbytes) % count;
  int64_t run = begin / nbytes / static_cast<int64_t>(count);
  int64_t within = begin % nbytes;
  while (begin < end) {
    const size_t row = members[member];
    const int64_t size = std::min(nbytes - within, end - begin);
    if (++member == count) member = 0;
    const int64_t next_run = member == 0 ? run + 1 : run;
    const size_t next_row = members[member];
    begin += size;
    const int64_t next = begin < end ? rows.source[next_row] + next_run * rows.pitch[next_row] : 0;
    copy_memory(reinterpret_cast<void*>(rows.destination[row] + run * nbytes + within),
                reinterpret_cast<const void*>(rows.source[row] + run * rows.pitch[row] + within),
                static_cast<size_t>(size), store, reinterpret_cast<const void*>(next));
    run = next_run;
    within = 0;
  }
}

}  // namespace

void copy_runs(const CopyRows& rows, int threads) {
  check(rows);
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");

  // In the order of the sources, whatever order the rows came in: memory is read from one end to the other.
  std::vector<size_t> order(rows.nbytes.size);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rows.source[a] < rows.source[b]; });
  const std::vector<Band> bands = bands_of(rows, order);

  // Tasks of equal size, whatever the sizes of the bands.
  std::vector<Start> starts;
  int64_t total = 0;
  for (size_t band = 0; band < bands.size(); ++band) {
    const int64_t end = total + bands[band].nbytes;
    for (int64_t at = static_cast<int64_t>(starts.size()) * kTaskNbytes; at < end; at += kTaskNbytes) {
      starts.push_back({band, at - total});
    }
    total = end;
  }

  const auto task = [&](size_t index) {
    auto [number, offset] = starts[index];
    for (int64_t left = kTaskNbytes; left > 0 && number < bands.size(); ++number, offset = 0) {
      const Band& band = bands[number];
      const size_t* const members = &order[band.first];
      const int64_t count = std::min(left, band.nbytes - offset);
      const bool streams = streaming_pays(total, std::min(rows.nbytes[members[0]], count));
      copy_band(rows, members, band.count, offset, offset + count,
                streams ? Store::kStreaming : Store::kCached);
      left -= count;
    }
    fence_streaming();
  };
  parallel_for(starts.size(), threads, task);
}

}  // namespace ckpt_fast
