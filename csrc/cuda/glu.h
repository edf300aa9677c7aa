// SPDX-License-Identifier: Apache-2.0
// The row order of gated MLP weights, changed on the device.
//
// A matrix of `rows` rows holds F = rows / 2 gate rows W and F up rows V. Contiguous order is [W, V];
// interleaved order is [W0:k, V0:k, Wk:2k, Vk:2k, ...] with k = `block`.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"

namespace ckpt_fast::cuda {

/// One matrix to copy into the other order. Both addresses are readable and writable by the device: its own
/// memory, pinned host memory, or a peer's. They need no alignment, but 16 bytes is fastest. The caller keeps
/// both alive until the stream has completed this work.
struct RowPermutation {
  std::uintptr_t destination;
  std::uintptr_t source;
  std::int64_t rows;        // a multiple of 2 * block
  std::int64_t row_nbytes;  // 0 is allowed: nothing is moved
  std::int64_t block;       // > 0
};

/// Copies `count` matrices on `stream` of `device`, many in one launch, and returns once they are enqueued.
/// `interleave` goes from contiguous to interleaved order, otherwise back.
///
/// Throws std::invalid_argument, before anything is enqueued, if a matrix breaks the rules above or its
/// source and destination overlap; CudaError if the launch fails.
void permute_rows(const RowPermutation* matrices, std::size_t count, bool interleave, int device,
                  Stream stream);

}  // namespace ckpt_fast::cuda
