// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/permute.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/base/parallel.h"
#include "engine/memory/memory_copy.h"

namespace ckpt_fast {

namespace {

using std::to_string;

// A thread's unit of work: large enough to amortize taking it, small enough to divide a matrix evenly.
constexpr int64_t kTaskNbytes = 1 << 20;

struct Matrix {
  uint8_t* to;
  const uint8_t* from;
  int64_t nbytes;
  int64_t run;    // bytes that stay together
  int64_t pairs;  // of runs

  /// The position in the contiguous order of the byte at `interleaved` in the interleaved one.
  int64_t contiguous(int64_t interleaved) const {
    const int64_t i = interleaved / run;
    return (i % 2 * pairs + i / 2) * run + interleaved % run;
  }
};

/// The part of the interleaved order, starting at byte `begin` of a matrix, that one task moves.
struct Task {
  size_t matrix;
  int64_t begin;
};

void check(const PermuteRows& matrices, int threads) {
  const size_t count = matrices.destination.size;
  for (const Column* column : {&matrices.source, &matrices.rows, &matrices.row_nbytes, &matrices.block}) {
    if (column->size != count) throw std::invalid_argument("the columns of permute_rows differ in length");
  }
  for (size_t i = 0; i < count; ++i) {
    const int64_t rows = matrices.rows[i];
    const int64_t block = matrices.block[i];
    if (rows < 0 || matrices.row_nbytes[i] < 0) {
      throw std::invalid_argument("rows and row_nbytes must not be negative");
    }
    if (block < 1) throw std::invalid_argument("block is " + to_string(block) + ", not at least 1");
    if (rows % (2 * block) != 0) {
      throw std::invalid_argument(to_string(rows) + " rows do not divide into pairs of blocks of " +
                                  to_string(block));
    }
  }
  if (threads < 1) throw std::invalid_argument("threads is " + to_string(threads) + ", not at least 1");
}

// Both directions traverse the interleaved order from start to end, and thus two stretches of the contiguous
// one: reads that skip every other run would load memory for nothing.
void permute(const Matrix& matrix, int64_t at, int64_t end, bool interleave, Store store) {
  while (at < end) {
    const int64_t count = std::min(matrix.run - at % matrix.run, end - at);
    const int64_t behind = at + count;
    if (interleave) {
      const uint8_t* const next = behind < end ? matrix.from + matrix.contiguous(behind) : nullptr;
      copy_memory(matrix.to + at, matrix.from + matrix.contiguous(at), static_cast<size_t>(count), store,
                  next);
    } else {
      copy_memory(matrix.to + matrix.contiguous(at), matrix.from + at, static_cast<size_t>(count), store);
    }
    at = behind;
  }
}

}  // namespace

void permute_rows(const PermuteRows& matrices, bool interleave, int threads) {
  check(matrices, threads);
  std::vector<Matrix> planned;
  std::vector<Task> tasks;
  int64_t total = 0;
  for (size_t i = 0; i < matrices.destination.size; ++i) {
    const int64_t nbytes = matrices.rows[i] * matrices.row_nbytes[i];
    const int64_t run = matrices.block[i] * matrices.row_nbytes[i];
    if (nbytes == 0) continue;
    for (int64_t begin = 0; begin < nbytes; begin += kTaskNbytes) tasks.push_back({planned.size(), begin});
    planned.push_back({reinterpret_cast<uint8_t*>(matrices.destination[i]),
                       reinterpret_cast<const uint8_t*>(matrices.source[i]), nbytes, run,
                       nbytes / (2 * run)});
    total += nbytes;
  }

  const auto task = [&](size_t index) {
    const Matrix& matrix = planned[tasks[index].matrix];
    const int64_t begin = tasks[index].begin;
    permute(matrix, begin, std::min(begin + kTaskNbytes, matrix.nbytes), interleave,
            streaming_pays(total, matrix.run) ? Store::kStreaming : Store::kCached);
    fence_streaming();
  };
  parallel_for(tasks.size(), threads, task);
}

}  // namespace ckpt_fast
