// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

namespace ckpt_fast {

/// Modules, the tensors registered with them, and the names of both: (list, list, bytes). Depth first, in
/// the order of registration, without a Python frame for each module.
pybind11::tuple walk_modules(const pybind11::sequence& roots);

}  // namespace ckpt_fast
