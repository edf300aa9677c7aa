// SPDX-License-Identifier: Apache-2.0
// Copies of rows that lie apart, between host and device or inside either.
#pragma once

#include <cstdint>

#include "device.h"

namespace ckpt_fast::cuda {

// `rows` rows of `row_nbytes` bytes, that begin a pitch apart on each side. Host memory is page-locked, or
// the copy is not asynchronous. The caller keeps both sides alive until the stream has passed this work.
struct RowCopy {
  std::uintptr_t destination;
  std::int64_t destination_pitch;  // >= row_nbytes
  std::uintptr_t source;
  std::int64_t source_pitch;  // >= row_nbytes
  std::int64_t row_nbytes;
  std::int64_t rows;
};

// Enqueues the copy on `stream` of `device`. No kernel runs: the copy engines take the pitches.
//
// Throws std::invalid_argument for negative sizes and for pitches that are less than a row or 2^31 or more;
// CudaError where CUDA refuses.
void copy_rows(const RowCopy& copy, int device, Stream stream);

}  // namespace ckpt_fast::cuda
