// SPDX-License-Identifier: Apache-2.0
// Parallel file writer. See write_files in ckpt_fast/native/_engine.pyi for the contract.
#pragma once

#include <cstdint>
#include <vector>

#include "write_plan.h"

namespace ckpt_fast {

struct WriteResult {
  std::vector<uint32_t> stream_crcs;
  std::vector<uint32_t> file_crcs;
};

/// Throws std::invalid_argument before any file is touched, SystemError when writing fails.
WriteResult write_files(const WriteRequest& request);

}  // namespace ckpt_fast
