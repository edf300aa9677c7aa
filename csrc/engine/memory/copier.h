// SPDX-License-Identifier: Apache-2.0
// Many copies in parallel: the staging of a snapshot.
#pragma once

#include <cstdint>

#include "engine/base/column.h"

namespace ckpt_fast {

/// One entry per series of runs; see copy_runs in ckpt_fast/native/_engine.pyi.
struct CopySeries {
  Column destination;
  Column source;
  Column nbytes;
  Column run_count;
  Column pitch;
};

/// Copies, on `threads` threads and for every series i, run_count[i] runs of nbytes[i] bytes each from
/// source[i], where they begin pitch[i] bytes apart, to destination[i], where they are packed. Throws
/// std::invalid_argument, before anything is copied, if the columns differ in length or a size is negative.
void copy_runs(const CopySeries& series, int threads);

}  // namespace ckpt_fast
