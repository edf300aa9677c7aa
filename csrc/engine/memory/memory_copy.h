// SPDX-License-Identifier: Apache-2.0
// Copies that may bypass the caches. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/checksum/checksum.h"

namespace ckpt_fast {

/// True if a job that moves `total_nbytes` in runs of `run_nbytes` gains from streaming stores: the whole
/// exceeds the caches, and a run is long enough to fill whole cache lines.
bool streaming_pays(int64_t total_nbytes, int64_t run_nbytes);

/// Copies between ranges that do not overlap. `next`, if known, is where the thread reads afterwards: it is
/// prefetched instead of the bytes after the source. Other threads may read streamed stores only after
/// fence_streaming.
void copy_memory(void* destination, const void* source, size_t nbytes, Store store,
                 const void* next = nullptr);

/// Ends the streaming copies of the calling thread.
void fence_streaming();

}  // namespace ckpt_fast
