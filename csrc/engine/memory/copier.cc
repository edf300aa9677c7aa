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

// Long enough that taking a task costs nothing, short enough that threads finish together.
constexpr int64_t kTaskNbytes = 4 << 20;

/// Series whose runs alternate in memory, as the gate and up rows of an interleaved weight do: members
/// [first, first + count) of the copy order. They are read alternately too: a thread that skips every other
/// stretch of memory reads at less than half the speed (0.46 was measured, with runs of 8 KiB), whereas one
/// that alternates between two destinations loses nothing.
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

void check(const CopySeries& series) {
  const size_t count = series.nbytes.size;
  for (const Column* column : {&series.destination, &series.source, &series.run_count, &series.pitch}) {
    if (column->size != count) throw std::invalid_argument("the columns of copy_runs differ in length");
  }
  for (size_t index = 0; index < count; ++index) {
    if (series.nbytes[index] < 0)
      throw std::invalid_argument("series " + to_string(index) + " has a negative size");
    if (series.run_count[index] < 0) {
      throw std::invalid_argument("series " + to_string(index) + " has a negative number of runs");
    }
  }
}

/// Whether each run of series `index` lies between two consecutive runs of series `first`.
bool takes_turns(const CopySeries& series, size_t first, size_t index) {
  return series.run_count[index] == series.run_count[first] && series.nbytes[index] == series.nbytes[first] &&
         series.pitch[index] == series.pitch[first] &&
         series.source[index] < series.source[first] + series.pitch[first];
}

std::vector<Band> bands_of(const CopySeries& series, const std::vector<size_t>& order) {
  std::vector<Band> bands;
  for (size_t number = 0; number < order.size(); ++number) {
    const size_t index = order[number];
    const int64_t nbytes = series.nbytes[index] * series.run_count[index];
    if (nbytes == 0) continue;
    if (!bands.empty() && series.run_count[index] > 1 && bands.back().first + bands.back().count == number &&
        takes_turns(series, order[bands.back().first], index)) {
      bands.back().count += 1;
      bands.back().nbytes += nbytes;
    } else {
      bands.push_back({number, 1, nbytes});
    }
  }
  return bands;
}

/// Copies bytes `begin` to `end` of a band whose members are `members`.
void copy_band(const CopySeries& series, const size_t* members, size_t count, int64_t begin, int64_t end,
               Store store) {
  const int64_t nbytes = series.nbytes[members[0]];
  size_t member = static_cast<size_t>(begin / nbytes) % count;
  int64_t run = begin / nbytes / static_cast<int64_t>(count);
  int64_t within = begin % nbytes;
  while (begin < end) {
    const size_t index = members[member];
    const int64_t size = std::min(nbytes - within, end - begin);
    if (++member == count) member = 0;
    const int64_t next_run = member == 0 ? run + 1 : run;
    const size_t next_index = members[member];
    begin += size;
    const int64_t next = begin < end ? series.source[next_index] + next_run * series.pitch[next_index] : 0;
    copy_memory(reinterpret_cast<void*>(series.destination[index] + run * nbytes + within),
                reinterpret_cast<const void*>(series.source[index] + run * series.pitch[index] + within),
                static_cast<size_t>(size), store, reinterpret_cast<const void*>(next));
    run = next_run;
    within = 0;
  }
}

}  // namespace

void copy_runs(const CopySeries& series, int threads) {
  check(series);
  if (threads < 1) throw std::invalid_argument("threads must be at least 1");

  // By source address, whatever the order of the request: memory is read from one end to the other.
  std::vector<size_t> order(series.nbytes.size);
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return series.source[a] < series.source[b]; });
  const std::vector<Band> bands = bands_of(series, order);

  // Tasks of equal size, independent of the sizes of the bands.
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
      const bool streams = streaming_pays(total, std::min(series.nbytes[members[0]], count));
      copy_band(series, members, band.count, offset, offset + count,
                streams ? Store::kStreaming : Store::kCached);
      left -= count;
    }
    fence_streaming();
  };
  parallel_for(starts.size(), threads, task);
}

}  // namespace ckpt_fast
