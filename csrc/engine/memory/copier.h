// SPDX-License-Identifier: Apache-2.0
// Many copies in parallel: the staging of a snapshot.
#pragma once

#include <cstdint>

#include "engine/base/column.h"

namespace ckpt_fast {

/// One row for each series of runs; see copy_runs in ckpt_fast/native/_engine.pyi.
struct CopyRows {
  Column destination;
  Column source;
  Column nbytes;
  Column runs;
  Column pitch;
};

/// Copies, on `threads` threads, runs[i] runs of nbytes[i] bytes that begin pitch[i] bytes apart at source[i]
/// to one behind the other at destination[i], for every row. Throws std::invalid_argument, before anything is
/// copied, when the columns differ in length or a size is negative.
void copy_runs(const CopyRows& rows, int threads);

}  // namespace ckpt_fast
