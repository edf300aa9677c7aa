// SPDX-License-Identifier: Apache-2.0
// Reordering of rows between the two layouts of a gated linear unit's first weight.
#pragma once

#include <cstdint>

namespace ckpt_fast {

/// See permute_rows in ckpt_fast/native/_engine.pyi. Throws std::invalid_argument for sizes that do not fit.
void permute_rows(void* destination, const void* source, int64_t rows, int64_t row_nbytes, int64_t block,
                  bool interleave, int threads);

}  // namespace ckpt_fast
