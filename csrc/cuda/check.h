// SPDX-License-Identifier: Apache-2.0
// CUDA status codes as exceptions. For sources compiled with the CUDA headers only.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace ckpt_fast::cuda {

/// "WHAT: out of memory (cudaErrorMemoryAllocation)", with the code for callers that can react to one.
class CudaError : public std::runtime_error {
 public:
  CudaError(cudaError_t code, const std::string& what)
      : std::runtime_error(what + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")"),
        code_(code) {}

  cudaError_t code() const noexcept { return code_; }

 private:
  cudaError_t code_;
};

/// Throws CudaError unless `status` is cudaSuccess. `what` names the call and its essential arguments.
inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  // The runtime keeps the code until it is queried; otherwise it would surface at an unrelated call.
  (void)cudaGetLastError();
  throw CudaError(status, what);
}

}  // namespace ckpt_fast::cuda
