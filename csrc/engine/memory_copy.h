// SPDX-License-Identifier: Apache-2.0
// Copies that may bypass the caches. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "checksum.h"

namespace ckpt_fast {

/// True when a job that moves `total_nbytes` in runs of `run_nbytes` gains from streaming stores: the whole
/// exceeds the caches, and a run is long enough to fill whole cache lines.
bool streaming_pays(int64_t total_nbytes, int64_t run_nbytes);

/// Copies between ranges that do not overlap. Streaming copies end with a fence.
void copy_memory(void* destination, const void* source, size_t nbytes, Store store);

}  // namespace ckpt_fast
