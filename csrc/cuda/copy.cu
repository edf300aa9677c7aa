// SPDX-License-Identifier: Apache-2.0
#include "copy.h"

#include <cstddef>
#include <stdexcept>
#include <string>

#include "check.h"

namespace ckpt_fast::cuda {
namespace {

// What cudaMemcpy2D takes on every device.
constexpr std::int64_t kLongestPitch = 0x7FFFFFFF;

void check_pitch(const char* side, std::int64_t pitch, std::int64_t row_nbytes) {
  if (pitch >= row_nbytes && pitch <= kLongestPitch) return;
  throw std::invalid_argument("copy_rows: a " + std::string(side) + " pitch of " + std::to_string(pitch) +
                              " does not do for rows of " + std::to_string(row_nbytes) + " bytes");
}

}  // namespace

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
