// SPDX-License-Identifier: Apache-2.0
#include "python/describe_tensors.h"

#include <cstdint>
#include <map>
#include <vector>

#include "python/dlpack_view.h"

namespace py = pybind11;

namespace ckpt_fast {
namespace {

/// A tensor that cannot be described: Python's error is set. The caller finds out what is wrong with it.
struct Indescribable {};

py::object owned(PyObject* object) {
  if (object == nullptr) throw Indescribable{};
  return py::reinterpret_steal<py::object>(object);
}

std::int64_t integer(const py::object& object) {
  const long long value = PyLong_AsLongLong(object.ptr());
  if (value == -1 && PyErr_Occurred() != nullptr) throw Indescribable{};
  return value;
}

/// The elements of a tuple of integers, appended.
void append(const py::object& object, std::vector<std::int64_t>& to) {
  if (!PyTuple_Check(object.ptr())) {
    PyErr_SetString(PyExc_TypeError, "sizes are no tuple");
    throw Indescribable{};
  }
  const Py_ssize_t count = PyTuple_GET_SIZE(object.ptr());
  for (Py_ssize_t at = 0; at < count; ++at) {
    to.push_back(integer(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(object.ptr(), at))));
  }
}

class Description {
 public:
  Description(const py::tuple& types, py::handle layout)
      : types_(types), layout_(layout), view_(types.empty() ? nullptr : dlpack::view_of(types[0])) {}

  void add(py::handle value) {
    std::int64_t form = -1, address = 0;
    if (is_one_of_types(value)) {
      try {
        if (!view(value, form, address)) {
          address = integer(call(value, data_ptr_));
          form = form_of(value, address);
        }
      } catch (const Indescribable&) {
        if (PyErr_ExceptionMatches(PyExc_Exception) == 0) throw py::error_already_set();
        PyErr_Clear();
        form = -1;
        address = 0;
      }
    }
    forms_.push_back(form);
    addresses_.push_back(address);
  }

  py::tuple result() const { return py::make_tuple(column(forms_), column(addresses_), table_); }

 private:
  struct DType {
    std::int64_t itemsize;
    bool is_complex;
  };

  bool is_one_of_types(py::handle value) const {
    for (const py::handle type : types_) {
      if (reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())) == type.ptr()) return true;
    }
    return false;
  }

  /// Form and address without Python's own calls; false if that cannot tell.
  bool view(py::handle tensor, std::int64_t& form, std::int64_t& address) {
    dlpack::Tensor seen;
    if (view_ == nullptr) return false;
    if (view_(tensor.ptr(), &seen) != 0) {
      PyErr_Clear();
      return false;
    }
    const bool is_cpu = seen.device.type == dlpack::kCpu;
    if (!is_cpu && seen.device.type != dlpack::kCuda) return false;
    const std::int64_t device = is_cpu ? -1 : seen.device.id;
    const std::uint32_t code = seen.dtype.code | seen.dtype.bits << 8 | seen.dtype.lanes << 16;
    auto known = viewed_.find(code);
    if (known == viewed_.end()) known = viewed_.emplace(code, get(tensor, dtype_name_)).first;
    const DType& type = type_of(known->second);
    const bool is_lazy = (type.is_complex && truth(call(tensor, is_conj_))) || truth(call(tensor, is_neg_));
    key_.assign(seen.shape, seen.shape + seen.ndim);
    key_.insert(key_.end(), seen.strides, seen.strides + seen.ndim);
    address = reinterpret_cast<std::intptr_t>(seen.data) + static_cast<std::int64_t>(seen.byte_offset);
    const auto dimensions = static_cast<std::size_t>(seen.ndim);
    const bool has_storage = has_all_elements(tensor, address, type.itemsize, dimensions);
    form = number_of(tensor, known->second, device, is_cpu, false, is_lazy, has_storage);
    return true;
  }

  /// The number of the tensor's form; -1 if its memory is not strided.
  std::int64_t form_of(py::handle tensor, std::int64_t address) {
    if (get(tensor, layout_name_).ptr() != layout_.ptr()) return -1;
    const py::object dtype = get(tensor, dtype_name_);
    const py::object shape = get(tensor, shape_name_);
    const py::object stride = call(tensor, stride_);
    const std::int64_t device = integer(call(tensor, get_device_));
    // In the order that takes fewest calls: most tensors are on a GPU, or on the CPU.
    const bool is_cpu = device < 0 && truth(get(tensor, is_cpu_));
    const bool is_meta = device < 0 && !is_cpu && truth(get(tensor, is_meta_));
    const DType& type = type_of(dtype);
    const bool is_lazy = (type.is_complex && truth(call(tensor, is_conj_))) || truth(call(tensor, is_neg_));
    key_.clear();
    append(shape, key_);
    const std::size_t dimensions = key_.size();
    append(stride, key_);
    const bool has_storage = is_meta || has_all_elements(tensor, address, type.itemsize, dimensions);
    return number_of(tensor, dtype, device, is_cpu, is_meta, is_lazy, has_storage);
  }

  /// The number of a form; key_ has sizes and strides.
  std::int64_t number_of(py::handle tensor, const py::object& dtype, std::int64_t device, bool is_cpu,
                         bool is_meta, bool is_lazy, bool has_storage) {
    key_.push_back(reinterpret_cast<std::intptr_t>(dtype.ptr()));
    key_.push_back(device);
    key_.push_back(is_cpu + 2 * is_meta + 4 * is_lazy + 8 * has_storage);
    const auto [found, is_new] = numbers_.try_emplace(key_, static_cast<std::int64_t>(numbers_.size()));
    if (is_new) {
      const py::object shape = owned(PySequence_Tuple(get(tensor, shape_name_).ptr()));
      table_.append(
          py::make_tuple(dtype, shape, call(tensor, stride_), device, is_cpu, is_meta, is_lazy, has_storage));
    }
    return found->second;
  }

  /// Whether there is a storage that reaches to the last element; key_ has sizes and strides.
  bool has_all_elements(py::handle tensor, std::int64_t address, std::int64_t itemsize,
                        std::size_t dimensions) {
    std::int64_t last = 0;
    for (std::size_t at = 0; at < dimensions; ++at) {
      if (key_[at] == 0) return true;
      last += (key_[at] - 1) * key_[dimensions + at];
    }
    if (address == 0) return false;
    const std::int64_t end = integer(call(tensor, storage_offset_)) + last + 1;
    return end * itemsize <= integer(call(call(tensor, untyped_storage_), nbytes_));
  }

  const DType& type_of(const py::object& dtype) {
    const auto found = dtypes_.find(dtype.ptr());
    if (found != dtypes_.end()) return found->second;
    const DType type{integer(get(dtype, itemsize_)), truth(get(dtype, is_complex_))};
    return dtypes_.emplace(dtype.ptr(), type).first->second;
  }

  static py::object get(py::handle object, const py::str& name) {
    return owned(PyObject_GetAttr(object.ptr(), name.ptr()));
  }

  static py::object call(py::handle object, const py::str& name) {
    return owned(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
  }

  static bool truth(const py::object& object) {
    const int is_true = PyObject_IsTrue(object.ptr());
    if (is_true < 0) throw Indescribable{};
    return is_true != 0;
  }

  static py::bytearray column(const std::vector<std::int64_t>& values) {
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(std::int64_t)};
  }

  const py::tuple types_;
  const py::handle layout_;
  const dlpack::View view_;
  // Made once: looking a name up by characters makes a string, and hashes it, every time.
  const py::str layout_name_{"layout"}, dtype_name_{"dtype"}, shape_name_{"shape"}, stride_{"stride"},
      get_device_{"get_device"}, is_cpu_{"is_cpu"}, is_meta_{"is_meta"}, is_conj_{"is_conj"},
      is_neg_{"is_neg"}, storage_offset_{"storage_offset"}, untyped_storage_{"untyped_storage"},
      nbytes_{"nbytes"}, itemsize_{"itemsize"}, is_complex_{"is_complex"}, data_ptr_{"data_ptr"};
  std::vector<std::int64_t> key_, forms_, addresses_;
  std::map<std::vector<std::int64_t>, std::int64_t> numbers_;
  std::map<PyObject*, DType> dtypes_;
  std::map<std::uint32_t, py::object> viewed_;
  py::list table_;
};

}  // namespace

py::tuple describe_tensors(const py::list& values, const py::tuple& types, py::handle layout) {
  Description description(types, layout);
  // By number: what is called could change the list.
  for (std::size_t at = 0; at < values.size(); ++at) description.add(py::object(values[at]));
  return description.result();
}

}  // namespace ckpt_fast
