// SPDX-License-Identifier: Apache-2.0
#include "cuda/copier.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/check.h"
#include "cuda/gather_copy.h"

namespace ckpt_fast::cuda {
namespace {

__global__ void __launch_bounds__(kGatherThreads) gather_kernel(const __grid_constant__ GatherBatch batch) {
  copy_one<uint4>(batch.copies[blockIdx.x], threadIdx.x);
}

void require_sizes(const Copy* copies, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    if (copies[i].nbytes < 0)
      throw std::invalid_argument("copy " + std::to_string(i) + " has a negative size");
  }
}

// The pitch limit of cudaMemcpy2D on every device.
constexpr std::int64_t kLongestPitch = 0x7FFFFFFF;

void check_pitch(const char* side, std::int64_t pitch, std::int64_t row_nbytes) {
  if (pitch >= row_nbytes && pitch <= kLongestPitch) return;
  throw std::invalid_argument("copy_rows: a " + std::string(side) + " pitch of " + std::to_string(pitch) +
                              " is not valid for rows of " + std::to_string(row_nbytes) + " bytes");
}

}  // namespace

void copy_to_host(const Copy* copies, std::size_t count, int device, Stream stream) {
  require_sizes(copies, count);
  DeviceGuard guard(device);
  for (std::size_t i = 0; i < count; ++i) {
    const Copy& copy = copies[i];
    if (copy.nbytes == 0) continue;
    check(
        cudaMemcpyAsync(reinterpret_cast<void*>(copy.destination), reinterpret_cast<const void*>(copy.source),
                        static_cast<std::size_t>(copy.nbytes), cudaMemcpyDeviceToHost, stream),
        "copy " + std::to_string(copy.nbytes) + " bytes of device " + std::to_string(device) +
            " to the host");
  }
}

void gather(const Copy* copies, std::size_t count, int device, Stream stream) {
  require_sizes(copies, count);
  DeviceGuard guard(device);
  for (std::size_t first = 0; first < count; first += GatherBatch::kCapacity) {
    GatherBatch batch;
    batch.count = std::min<std::size_t>(count - first, GatherBatch::kCapacity);
    std::copy(copies + first, copies + first + batch.count, batch.copies);
    void* arguments[] = {&batch};
    check(cudaLaunchKernel(reinterpret_cast<const void*>(&gather_kernel),
                           dim3(static_cast<unsigned int>(batch.count)), dim3(kGatherThreads), arguments, 0,
                           stream),
          "gather " + std::to_string(batch.count) + " tensors on device " + std::to_string(device));
  }
}

void copy_rows(const RowCopy& copy, int device, Stream stream) {
  if (copy.row_nbytes < 0 || copy.rows < 0) {
    throw std::invalid_argument("copy_rows: rows and row_nbytes must not be negative");
  }
  if (copy.row_nbytes == 0 || copy.rows == 0) return;
  check_pitch("destination", copy.destination_pitch, copy.row_nbytes);
  check_pitch("source", copy.source_pitch, copy.row_nbytes);
  DeviceGuard guard(device);
  check(cudaMemcpy2DAsync(
            reinterpret_cast<void*>(copy.destination), static_cast<std::size_t>(copy.destination_pitch),
            reinterpret_cast<const void*>(copy.source), static_cast<std::size_t>(copy.source_pitch),
            static_cast<std::size_t>(copy.row_nbytes), static_cast<std::size_t>(copy.rows), cudaMemcpyDefault,
            stream),
        "copy " + std::to_string(copy.rows) + " rows of " + std::to_string(copy.row_nbytes) +
            " bytes on device " + std::to_string(device));
}

}  // namespace ckpt_fast::cuda
