// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

namespace ckpt_fast {

/// Where the memory of tensors is, and its form: (forms, addresses, table), without Python per tensor.
/// Both columns are bytearrays of signed 64-bit integers; see _engine.pyi.
pybind11::tuple describe_tensors(const pybind11::list& values, const pybind11::tuple& types,
                                 pybind11::handle layout);

}  // namespace ckpt_fast
