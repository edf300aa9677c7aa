// SPDX-License-Identifier: Apache-2.0
// Columns of a request, in the caller's memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt_fast {

/// A borrowed array of signed 64-bit integers, one per row of the request's table.
struct Column {
  const int64_t* data = nullptr;
  size_t size = 0;

  int64_t operator[](size_t row) const { return data[row]; }
};

}  // namespace ckpt_fast
