// SPDX-License-Identifier: Apache-2.0
// Many copies in parallel: the staging of a snapshot.
#pragma once

#include <cstdint>

#include "column.h"

namespace ckpt_fast {

/// Copies nbytes[i] bytes from source[i] to destination[i] for every row, on `threads` threads. Ranges of
/// different rows may be contiguous but do not overlap. Throws std::invalid_argument, before anything is
/// copied, when the columns differ in length or a size is negative.
void copy_extents(Column destination, Column source, Column nbytes, int threads);

}  // namespace ckpt_fast
