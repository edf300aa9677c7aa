// SPDX-License-Identifier: Apache-2.0
// Devices and streams, in types that need no CUDA header.
#pragma once

// What cudaStream_t and CUstream point to.
struct CUstream_st;

namespace ckpt_fast::cuda {

/// A stream of torch or of anybody else in the process: the driver's handle, whichever runtime made it.
/// Null is the legacy default stream of the current device.
using Stream = CUstream_st*;

/// GPUs that the driver shows; 0 when there is no driver or none is visible. Never throws.
int device_count() noexcept;

/// Makes a device current on this thread, and the one before it again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // throws CudaError
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = -1;
  bool switched_ = false;
};

}  // namespace ckpt_fast::cuda
