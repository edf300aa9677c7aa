// SPDX-License-Identifier: Apache-2.0
#include "cuda/glu.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/check.h"
#include "cuda/glu_tile.h"

namespace ckpt_fast::cuda {
namespace {

// Enough to fill every multiprocessor twice over; the loop over tiles does the rest.
constexpr int kBlocksPerMultiprocessor = 16;

__global__ void __launch_bounds__(kThreads) permute_rows_kernel(const __grid_constant__ Batch batch) {
  std::uint32_t i = 0;
  for (std::uint64_t tile = blockIdx.x; tile < batch.tiles; tile += gridDim.x) {
    while (tile >= batch.tiles_before[i + 1]) ++i;
    const Matrix& matrix = batch.matrices[i];
    const Shape& shape = batch.shapes[matrix.shape];
    std::uint64_t of_matrix = tile - batch.tiles_before[i];
    switch (shape.unit_nbytes) {
      case 16:
        copy_tile<uint4>(matrix, shape, of_matrix, threadIdx.x, batch.interleave);
        break;
      case 8:
        copy_tile<uint2>(matrix, shape, of_matrix, threadIdx.x, batch.interleave);
        break;
      case 4:
        copy_tile<unsigned int>(matrix, shape, of_matrix, threadIdx.x, batch.interleave);
        break;
      case 2:
        copy_tile<unsigned short>(matrix, shape, of_matrix, threadIdx.x, batch.interleave);
        break;
      default:
        copy_tile<unsigned char>(matrix, shape, of_matrix, threadIdx.x, batch.interleave);
    }
  }
}

void launch(const Batch& batch, int multiprocessors, int device, Stream stream) {
  if (batch.tiles == 0) return;
  auto most = static_cast<std::uint64_t>(multiprocessors) * kBlocksPerMultiprocessor;
  auto blocks = static_cast<unsigned int>(std::min(batch.tiles, most));
  void* arguments[] = {const_cast<Batch*>(&batch)};
  check(
      cudaLaunchKernel(reinterpret_cast<const void*>(&permute_rows_kernel), dim3(blocks), dim3(kThreads),
                       arguments, 0, stream),
      "permute the rows of " + std::to_string(batch.count) + " tensors on device " + std::to_string(device));
}

}  // namespace

void permute_rows(const RowPermutation* matrices, std::size_t count, bool interleave, int device,
                  Stream stream) {
  std::vector<PlannedMatrix> planned;
  planned.reserve(count);
  for (std::size_t i = 0; i < count; ++i) planned.push_back(plan_matrix(matrices[i]));

  DeviceGuard guard(device);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "ask device " + std::to_string(device) + " for its multiprocessors");
  for (std::size_t i = 0; i < count;) {
    Batch batch;
    batch.interleave = interleave;
    while (i < count && append(batch, planned[i])) ++i;
    launch(batch, multiprocessors, device, stream);
  }
}

}  // namespace ckpt_fast::cuda
