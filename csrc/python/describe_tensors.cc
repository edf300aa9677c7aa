// SPDX-License-Identifier: Apache-2.0
#include "python/describe_tensors.h"

#include <cstdint>
#include <map>
#include <optional>
#include <unordered_map>
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

/// A method of a type that takes no arguments. To look it up takes longer than what it does here.
class Method {
 public:
  Method(PyTypeObject* type, const char* name)
      : function_(owned(PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), name))) {
    if (Py_TYPE(function_.ptr()) != &PyMethodDescr_Type) return;
    const PyMethodDef* definition = reinterpret_cast<PyMethodDescrObject*>(function_.ptr())->d_method;
    if (definition->ml_flags == METH_NOARGS) native_ = definition->ml_meth;
  }

  /// Of an instance of the type.
  py::object operator()(py::handle self) const {
    return owned(native_ != nullptr ? native_(self.ptr(), nullptr)
                                    : PyObject_CallOneArg(function_.ptr(), self.ptr()));
  }

 private:
  py::object function_;
  PyCFunction native_ = nullptr;
};

/// What tensors of one type are asked.
struct Methods {
  explicit Methods(PyTypeObject* type)
      : is_conj(type, "is_conj"),
        is_neg(type, "is_neg"),
        storage_offset(type, "storage_offset"),
        untyped_storage(type, "untyped_storage"),
        data_ptr(type, "data_ptr"),
        stride(type, "stride"),
        get_device(type, "get_device") {}

  Method is_conj, is_neg, storage_offset, untyped_storage, data_ptr, stride, get_device;
};

struct Hash {
  std::size_t operator()(const std::vector<std::int64_t>& key) const {
    std::uint64_t hash = key.size();
    for (const std::int64_t each : key) {
      hash = (hash ^ static_cast<std::uint64_t>(each)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

class Description {
 public:
  Description(const py::tuple& types, py::handle layout, std::size_t size)
      : types_(types),
        methods_(types.size()),
        layout_(layout),
        view_(types.empty() ? nullptr : dlpack::view_of(types[0])) {
    forms_.reserve(size);
    addresses_.reserve(size);
  }

  /// Has the memory of a tensor fetched that is added soon. What it takes for addresses is never read: the
  /// first words of a tensor's object lead to what is said of the tensor.
  void expect(const PyObject* value) const {
    constexpr std::size_t kWords = 2, kLine = 64, kLines = 4;
    if (type_number(value) == types_.size()) return;
    if (Py_TYPE(value)->tp_basicsize < static_cast<Py_ssize_t>(sizeof(PyObject) + kWords * sizeof(void*)))
      return;
    const auto* words = reinterpret_cast<const char* const*>(value + 1);
    for (std::size_t word = 0; word < kWords; ++word) {
      for (std::size_t line = 0; line < kLines; ++line) __builtin_prefetch(words[word] + line * kLine);
    }
  }

  void add(py::handle value) {
    std::int64_t form = -1, address = 0;
    const std::size_t type = type_number(value.ptr());
    if (type < types_.size()) {
      try {
        if (!methods_[type]) methods_[type].emplace(Py_TYPE(value.ptr()));
        const Methods& methods = *methods_[type];
        if (!view(value, methods, form, address)) {
          address = integer(methods.data_ptr(value));
          form = form_of(value, methods, address);
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
    py::object object;
    std::int64_t itemsize;
    bool is_complex;
  };

  /// Which of the types a value has; their number if none.
  std::size_t type_number(const PyObject* value) const {
    std::size_t number = 0;
    while (number < types_.size() &&
           PyTuple_GET_ITEM(types_.ptr(), number) != reinterpret_cast<PyObject*>(Py_TYPE(value))) {
      ++number;
    }
    return number;
  }

  /// Form and address without Python's own calls; false if that cannot tell.
  bool view(py::handle tensor, const Methods& methods, std::int64_t& form, std::int64_t& address) {
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
    const DType*& type = viewed_[code];
    if (type == nullptr) type = &type_of(get(tensor, dtype_name_));
    key_.assign(seen.shape, seen.shape + seen.ndim);
    key_.insert(key_.end(), seen.strides, seen.strides + seen.ndim);
    address = reinterpret_cast<std::intptr_t>(seen.data) + static_cast<std::int64_t>(seen.byte_offset);
    const auto dimensions = static_cast<std::size_t>(seen.ndim);
    const bool has_storage = has_all_elements(tensor, methods, address, type->itemsize, dimensions);
    form = number_of(tensor, methods, *type, device, is_cpu, false, has_storage);
    return true;
  }

  /// The number of the tensor's form; -1 if its memory is not strided.
  std::int64_t form_of(py::handle tensor, const Methods& methods, std::int64_t address) {
    if (get(tensor, layout_name_).ptr() != layout_.ptr()) return -1;
    const DType& type = type_of(get(tensor, dtype_name_));
    const py::object shape = get(tensor, shape_name_);
    const py::object stride = methods.stride(tensor);
    const std::int64_t device = integer(methods.get_device(tensor));
    // In the order that takes fewest calls: most tensors are on a GPU, or on the CPU.
    const bool is_cpu = device < 0 && truth(get(tensor, is_cpu_));
    const bool is_meta = device < 0 && !is_cpu && truth(get(tensor, is_meta_));
    key_.clear();
    append(shape, key_);
    const std::size_t dimensions = key_.size();
    append(stride, key_);
    const bool has_storage = is_meta || has_all_elements(tensor, methods, address, type.itemsize, dimensions);
    return number_of(tensor, methods, type, device, is_cpu, is_meta, has_storage);
  }

  /// The number of a form; key_ has sizes and strides.
  std::int64_t number_of(py::handle tensor, const Methods& methods, const DType& type, std::int64_t device,
                         bool is_cpu, bool is_meta, bool has_storage) {
    const bool is_lazy = (type.is_complex && truth(methods.is_conj(tensor))) || truth(methods.is_neg(tensor));
    key_.push_back(reinterpret_cast<std::intptr_t>(type.object.ptr()));
    key_.push_back(device);
    key_.push_back(is_cpu + 2 * is_meta + 4 * is_lazy + 8 * has_storage);
    const auto [found, is_new] = numbers_.try_emplace(key_, static_cast<std::int64_t>(numbers_.size()));
    if (is_new) {
      const py::object shape = owned(PySequence_Tuple(get(tensor, shape_name_).ptr()));
      table_.append(py::make_tuple(type.object, shape, methods.stride(tensor), device, is_cpu, is_meta,
                                   is_lazy, has_storage));
    }
    return found->second;
  }

  /// Whether there is a storage that reaches to the last element; key_ has sizes and strides.
  bool has_all_elements(py::handle tensor, const Methods& methods, std::int64_t address,
                        std::int64_t itemsize, std::size_t dimensions) {
    std::int64_t last = 0;
    for (std::size_t at = 0; at < dimensions; ++at) {
      if (key_[at] == 0) return true;
      last += (key_[at] - 1) * key_[dimensions + at];
    }
    if (address == 0) return false;
    const std::int64_t end = integer(methods.storage_offset(tensor)) + last + 1;
    return end * itemsize <= nbytes_of(methods.untyped_storage(tensor));
  }

  std::int64_t nbytes_of(const py::object& storage) {
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(storage.ptr()));
    if (type != storage_type_.ptr()) {
      nbytes_.emplace(Py_TYPE(storage.ptr()), "nbytes");
      storage_type_ = py::reinterpret_borrow<py::object>(type);
    }
    return integer((*nbytes_)(storage));
  }

  const DType& type_of(const py::object& dtype) {
    const auto found = dtypes_.find(dtype.ptr());
    if (found != dtypes_.end()) return found->second;
    const DType type{dtype, integer(get(dtype, itemsize_)), truth(get(dtype, is_complex_))};
    return dtypes_.emplace(dtype.ptr(), type).first->second;
  }

  static py::object get(py::handle object, const py::str& name) {
    return owned(PyObject_GetAttr(object.ptr(), name.ptr()));
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
  std::vector<std::optional<Methods>> methods_;
  const py::handle layout_;
  const dlpack::View view_;
  py::object storage_type_;
  std::optional<Method> nbytes_;
  // Made once: looking a name up by characters makes a string, and hashes it, every time.
  const py::str layout_name_{"layout"}, dtype_name_{"dtype"}, shape_name_{"shape"}, is_cpu_{"is_cpu"},
      is_meta_{"is_meta"}, itemsize_{"itemsize"}, is_complex_{"is_complex"};
  std::vector<std::int64_t> key_, forms_, addresses_;
  std::unordered_map<std::vector<std::int64_t>, std::int64_t, Hash> numbers_;
  std::map<PyObject*, DType> dtypes_;
  std::map<std::uint32_t, const DType*> viewed_;
  py::list table_;
};

}  // namespace

py::tuple describe_tensors(const py::list& values, const py::tuple& types, py::handle layout) {
  // Of so many tensors at a time memory is fetched, which takes as long as looking at some of them does.
  constexpr std::size_t kAhead = 6;
  Description description(types, layout, values.size());
  // By number: what is called could change the list.
  for (std::size_t at = 0; at < values.size(); ++at) {
    if (at + 2 * kAhead < values.size()) __builtin_prefetch(PyList_GET_ITEM(values.ptr(), at + 2 * kAhead));
    if (at + kAhead < values.size()) description.expect(PyList_GET_ITEM(values.ptr(), at + kAhead));
    description.add(py::object(values[at]));
  }
  return description.result();
}

}  // namespace ckpt_fast
