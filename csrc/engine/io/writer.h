// SPDX-License-Identifier: Apache-2.0
// Parallel file writer. See write_files in ckpt_fast/native/_engine.pyi for the contract.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/io/write_plan.h"

namespace ckpt_fast {

struct WriteResult {
  std::vector<uint32_t> stream_crcs;
  std::vector<uint32_t> file_crcs;
  std::vector<uint32_t> block_crcs;  // of all blocks of stream 0, then of stream 1, ...
};

/// Throws std::invalid_argument before any file is touched, SystemError if writing fails.
WriteResult write_files(const WriteRequest& request);

}  // namespace ckpt_fast
