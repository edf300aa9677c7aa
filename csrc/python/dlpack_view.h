// SPDX-License-Identifier: Apache-2.0
// Tensors seen through DLPack's exchange interface, which torch offers from 2.10 on. Of its declarations,
// those that are used here; major version 1 fixes their layout.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace ckpt_fast {
namespace dlpack {

constexpr std::int32_t kCpu = 1, kCuda = 2;

struct Device {
  std::int32_t type, id;
};

struct DType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DType dtype;
  std::int64_t *shape, *strides;  // strides in elements
  std::uint64_t byte_offset;
};

/// Looks at a tensor: allocates nothing, waits for no device. 0, or Python's error is set.
using View = int (*)(void* object, Tensor* seen);

struct ExchangeApi {
  std::uint32_t major_version, minor_version;
  void* previous;
  void *allocate, *managed_from_object, *managed_to_object;
  View view;
};

/// How tensors of a type, and of those below it, are looked at; null if the type does not offer that.
inline View view_of(pybind11::handle type) {
  static constexpr char kName[] = "dlpack_exchange_api";
  const pybind11::object capsule = pybind11::getattr(type, "__dlpack_c_exchange_api__", pybind11::none());
  if (PyCapsule_IsValid(capsule.ptr(), kName) == 0) return nullptr;
  const auto* api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), kName));
  return api->major_version == 1 ? api->view : nullptr;
}

}  // namespace dlpack
}  // namespace ckpt_fast
