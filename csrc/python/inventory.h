// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <pybind11/pybind11.h>

namespace ckpt_fast {

/// Modules, the tensors registered with them, and the names of both: (list, list, bytes). Depth first, in
/// the order of registration, without a Python frame for each module.
pybind11::tuple walk_modules(const pybind11::sequence& roots);

/// The parameters of an optimizer's groups with the tensors of their state, and how many and which there are:
/// (list, bytes). See _engine.pyi.
pybind11::tuple walk_optimizer(const pybind11::list& groups, const pybind11::dict& state,
                               const pybind11::type& tensor);

/// Whether each weak reference is to the object in its place, alive.
bool refer_to(const pybind11::list& references, const pybind11::list& objects);

}  // namespace ckpt_fast
