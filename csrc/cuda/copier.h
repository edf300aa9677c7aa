// SPDX-License-Identifier: Apache-2.0
// Device memory to host memory: many copies in one call, small ones gathered first.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device.h"

namespace ckpt_fast::cuda {

// A contiguous piece of device memory and where it goes. The caller keeps both alive until the stream has
// passed the work.
struct Copy {
  std::uintptr_t destination;
  std::uintptr_t source;
  std::int64_t nbytes;  // 0 is allowed: nothing is moved
};

// Enqueues one copy engine transfer for each entry on `stream` of `device`. With pageable destinations CUDA
// makes the calls wait.
//
// Throws std::invalid_argument, before anything is enqueued, for a negative size; CudaError where CUDA
// refuses.
void copy_to_host(const Copy* copies, std::size_t count, int device, Stream stream);

// Enqueues kernels that copy all entries within the device's reach, hundreds in one launch. A transfer of its
// own costs some microseconds of the host's time for each tensor; gathered into one block, thousands of small
// tensors cost one.
//
// Throws as `copy_to_host`.
void gather(const Copy* copies, std::size_t count, int device, Stream stream);

}  // namespace ckpt_fast::cuda
