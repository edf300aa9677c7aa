// SPDX-License-Identifier: Apache-2.0
// Columns as Python passes them: array.array("q") or any other buffer of signed 64-bit integers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "engine/base/column.h"

namespace ckpt_fast {

/// A column argument: a buffer of signed 64-bit integers that stays alive and locked for the call.
class ColumnArgument {
 public:
  /// Throws py::type_error naming the argument if the buffer is anything else.
  ColumnArgument(const pybind11::buffer& buffer, const char* name) : info_(buffer.request()) {
    const bool is_int64 =
        info_.itemsize == sizeof(std::int64_t) && (info_.format == "q" || info_.format == "l");
    const bool is_dense = info_.ndim == 1 && (info_.shape[0] <= 1 || info_.strides[0] == info_.itemsize);
    if (!is_int64 || !is_dense) {
      throw pybind11::type_error(std::string(name) +
                                 " is not a one-dimensional buffer of signed 64-bit integers");
    }
  }

  operator Column() const {
    return {static_cast<const std::int64_t*>(info_.ptr), static_cast<std::size_t>(info_.shape[0])};
  }

 private:
  pybind11::buffer_info info_;
};

}  // namespace ckpt_fast
