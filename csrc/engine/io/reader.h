// SPDX-License-Identifier: Apache-2.0
// Parallel reader of byte ranges. See read_extents in ckpt_fast/native/_engine.pyi for the contract.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/io/read_plan.h"

namespace ckpt_fast {

/// Returns the CRC-32 of every block of the request's ranges, -1 for those that no extent touches. Throws
/// std::invalid_argument before any file is touched, SystemError if reading fails.
std::vector<int64_t> read_extents(const ReadRequest& request);

}  // namespace ckpt_fast
