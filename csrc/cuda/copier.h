// SPDX-License-Identifier: Apache-2.0
// Device memory to host memory and back: many copies in one call, small ones gathered first; strided
// rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/device.h"

namespace ckpt_fast::cuda {

/// A contiguous piece of device memory and its destination. The caller keeps both alive until the stream has
/// completed the work.
struct Copy {
  std::uintptr_t destination;
  std::uintptr_t source;
  std::int64_t nbytes;  // 0 is allowed: nothing is moved
};

/// Enqueues one copy engine transfer for each entry on `stream` of `device`. With pageable destinations the
/// calls are synchronous.
///
/// Throws std::invalid_argument, before anything is enqueued, for a negative size; CudaError if CUDA
/// refuses.
void copy_to_host(const Copy* copies, std::size_t count, int device, Stream stream);

/// Enqueues kernels that copy all entries within the device's reach, hundreds in one launch. A separate
/// transfer costs the host some microseconds per tensor; gathered into one block, thousands of small tensors
/// cost only one.
///
/// Throws like `copy_to_host`.
void gather(const Copy* copies, std::size_t count, int device, Stream stream);

/// `rows` rows of `row_nbytes` bytes that begin a pitch apart on each side. The copy is asynchronous only if
/// host memory is page-locked. The caller keeps both sides alive until the stream has completed this work.
struct RowCopy {
  std::uintptr_t destination;
  std::int64_t destination_pitch;  // >= row_nbytes
  std::uintptr_t source;
  std::int64_t source_pitch;  // >= row_nbytes
  std::int64_t row_nbytes;
  std::int64_t rows;
};

/// Enqueues the copy on `stream` of `device`. No kernel runs: the copy engines support pitches.
///
/// Throws std::invalid_argument for negative sizes and for pitches that are less than a row or 2^31 or more;
/// CudaError if CUDA refuses.
void copy_rows(const RowCopy& copy, int device, Stream stream);

}  // namespace ckpt_fast::cuda
