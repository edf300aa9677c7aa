// SPDX-License-Identifier: Apache-2.0
// Reordering of rows between the two layouts of a gated linear unit's first weight.
#pragma once

#include "engine/base/column.h"

namespace ckpt_fast {

/// One entry per matrix; see permute_rows in ckpt_fast/native/_engine.pyi.
struct PermuteRows {
  Column destination;
  Column source;
  Column rows;
  Column row_nbytes;
  Column block;
};

/// See permute_rows in ckpt_fast/native/_engine.pyi. Throws std::invalid_argument, before anything is
/// copied, for sizes that do not fit.
void permute_rows(const PermuteRows& matrices, bool interleave, int threads);

}  // namespace ckpt_fast
