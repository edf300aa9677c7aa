// SPDX-License-Identifier: Apache-2.0
// Devices and streams, in types that need no CUDA header.
#pragma once

// What cudaStream_t and CUstream point to.
struct CUstream_st;

namespace ckpt_fast::cuda {

/// A stream of torch or of other code in the process: the driver's handle, whichever runtime created it.
/// Null is the legacy default stream of the current device.
using Stream = CUstream_st*;

/// The number of GPUs visible to the driver; 0 if there is no driver. Never throws.
int device_count() noexcept;

/// Makes a device current on this thread, and restores the previous one on destruction.
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
