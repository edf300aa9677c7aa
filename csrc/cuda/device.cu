// SPDX-License-Identifier: Apache-2.0
#include "cuda/device.h"

#include <string>

#include "cuda/check.h"

namespace ckpt_fast::cuda {

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  (void)cudaGetLastError();
  return 0;
}

DeviceGuard::DeviceGuard(int device) {
  check(cudaGetDevice(&previous_), "get the current device");
  // Setting a device creates its context, so the common case, already current, must not set anything.
  if (previous_ == device) return;
  check(cudaSetDevice(device), "make device " + std::to_string(device) + " current");
  switched_ = true;
}

DeviceGuard::~DeviceGuard() {
  // It was current a moment ago; a failure now affects the whole context, and the next call reports it.
  if (switched_ && cudaSetDevice(previous_) != cudaSuccess) (void)cudaGetLastError();
}

}  // namespace ckpt_fast::cuda
