// SPDX-License-Identifier: Apache-2.0
#include "python/inventory.h"

#include <array>
#include <charconv>
#include <cstdint>
#include <limits>
#include <string>

namespace py = pybind11;

namespace ckpt_fast {
namespace {

void append_utf8(std::string& text, PyObject* name) {
  Py_ssize_t nbytes = 0;
  const char* characters = PyUnicode_AsUTF8AndSize(name, &nbytes);
  if (characters == nullptr) throw py::error_already_set();
  text.append(characters, static_cast<size_t>(nbytes));
}

template <typename Integer>
void append_number(std::string& text, Integer number) {
  std::array<char, std::numeric_limits<Integer>::digits10 + 2> digits;
  const auto [end, error] = std::to_chars(digits.data(), digits.data() + digits.size(), number);
  text.append(digits.data(), end);
}

class Walk {
 public:
  void visit(py::handle module) {
    if (Py_EnterRecursiveCall(" in a module tree") != 0) throw py::error_already_set();
    try {
      take(module);
    } catch (...) {
      Py_LeaveRecursiveCall();
      throw;
    }
    Py_LeaveRecursiveCall();
  }

  py::tuple result() const { return py::make_tuple(modules_, tensors_, py::bytes(names_)); }

 private:
  void take(py::handle module) {
    modules_.append(module);
    const auto attributes = py::reinterpret_steal<py::object>(PyObject_GetAttr(module.ptr(), dict_.ptr()));
    if (!attributes) {
      PyErr_Clear();
      throw py::type_error("not a torch module: it has no attributes");
    }
    take_identity(reinterpret_cast<PyObject*>(Py_TYPE(module.ptr())));
    take_tensors(dictionary(attributes, parameters_));
    take_tensors(dictionary(attributes, buffers_));
    take_set(part(attributes, non_persistent_));
    take_hooks(dictionary(attributes, hooks_));
    take_hooks(dictionary(attributes, pre_hooks_));
    for (const py::str* method : {&sharded_method_, &method_, &saving_method_}) {
      take_identity(PyDict_GetItem(attributes.ptr(), method->ptr()));
    }
    const py::object children = dictionary(attributes, children_);
    PyObject *name, *child;
    for (Py_ssize_t at = 0; PyDict_Next(children.ptr(), &at, &name, &child) != 0;) {
      take_name(name);
      if (child != Py_None) visit(child);
      names_ += ')';
    }
  }

  void take_tensors(const py::object& tensors) {
    PyObject *name, *tensor;
    for (Py_ssize_t at = 0; PyDict_Next(tensors.ptr(), &at, &name, &tensor) != 0;) {
      take_name(name);
      if (tensor == Py_None) {
        names_ += '0';
      } else {
        tensors_.append(py::handle(tensor));
      }
    }
    names_ += ';';
  }

  void take_name(py::handle name) {
    append_utf8(names_, name.ptr());
    names_ += '\0';
  }

  void take_set(const py::object& names) {
    if (PyAnySet_Check(names.ptr()) && PySet_GET_SIZE(names.ptr()) == 0) {
      names_ += ',';
      return;
    }
    const py::list sorted(names);
    if (PyList_Sort(sorted.ptr()) != 0) throw py::error_already_set();
    for (const py::handle name : sorted) take_name(name);
    names_ += ',';
  }

  /// torch numbers hooks in the order in which they are registered, and no number is used twice.
  void take_hooks(const py::object& hooks) {
    PyObject *number, *hook;
    for (Py_ssize_t at = 0; PyDict_Next(hooks.ptr(), &at, &number, &hook) != 0;) {
      const long long value = PyLong_AsLongLong(number);
      if (value == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
      append_number(names_, value);
      names_ += '\0';
    }
    names_ += ',';
  }

  void take_identity(PyObject* object) {
    if (object != nullptr) append_number(names_, reinterpret_cast<std::uintptr_t>(object));
    names_ += '-';
  }

  /// A part of a module's own dictionary, held while it is walked.
  static py::object part(const py::object& attributes, const py::str& name) {
    const auto found = py::reinterpret_borrow<py::object>(PyDict_GetItem(attributes.ptr(), name.ptr()));
    if (!found) throw py::type_error("not a torch module: it has no " + std::string(name));
    return found;
  }

  static py::object dictionary(const py::object& attributes, const py::str& name) {
    const py::object found = part(attributes, name);
    if (!PyDict_Check(found.ptr())) throw py::type_error(std::string(name) + " of a module is no dictionary");
    return found;
  }

  // Made once: looking a name up by characters makes a string, and hashes it, every time.
  const py::str dict_{"__dict__"}, parameters_{"_parameters"}, buffers_{"_buffers"},
      non_persistent_{"_non_persistent_buffers_set"}, hooks_{"_state_dict_hooks"},
      pre_hooks_{"_state_dict_pre_hooks"}, children_{"_modules"}, sharded_method_{"sharded_state_dict"},
      method_{"state_dict"}, saving_method_{"_save_to_state_dict"};
  py::list modules_, tensors_;
  std::string names_;
};

/// The state of parameters, most of which come in the order of the parameters: no look-up, which would run
/// Python for each tensor's hash.
class States {
 public:
  explicit States(const py::dict& state) : state_(state) {}

  /// Borrowed; null if there is none.
  PyObject* of(PyObject* parameter) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t next = at_;
    if (PyDict_Next(state_.ptr(), &next, &key, &value) != 0 && key == parameter) {
      at_ = next;
      return value;
    }
    PyObject* found = PyDict_GetItemWithError(state_.ptr(), parameter);
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return found;
  }

 private:
  const py::dict& state_;
  Py_ssize_t at_ = 0;
};

PyObject* referent(PyObject* reference) {
  if (PyWeakref_Check(reference) == 0) throw py::type_error("refer_to takes weak references");
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference, &found) < 0) throw py::error_already_set();
  Py_XDECREF(found);  // the list of objects holds it, if it is the one
  return found;
#else
  return PyWeakref_GetObject(reference);
#endif
}

}  // namespace

py::tuple walk_modules(const py::sequence& roots) {
  Walk walk;
  for (const py::handle root : roots) walk.visit(root);
  return walk.result();
}

py::tuple walk_optimizer(const py::list& groups, const py::dict& state, const py::type& tensor) {
  py::list tensors;
  std::string facts;
  States states(state);
  const py::str params("params");
  for (const py::handle group : groups) {
    if (!py::isinstance<py::dict>(group)) throw py::type_error("a group of parameters is no dictionary");
    const py::object held = py::reinterpret_borrow<py::dict>(group)[params];
    if (!py::isinstance<py::list>(held)) throw py::type_error("the parameters of a group are no list");
    append_number(facts, PyList_GET_SIZE(held.ptr()));
    facts += ':';
    for (const py::handle parameter : py::reinterpret_borrow<py::list>(held)) {
      tensors.append(parameter);
      const auto own = py::reinterpret_borrow<py::object>(states.of(parameter.ptr()));
      if (!own) continue;
      if (!PyDict_Check(own.ptr())) throw py::type_error("the state of a parameter is no dictionary");
      PyObject *name, *value;
      for (Py_ssize_t at = 0; PyDict_Next(own.ptr(), &at, &name, &value) != 0;) {
        if (PyObject_TypeCheck(value, reinterpret_cast<PyTypeObject*>(tensor.ptr())) == 0) continue;
        append_utf8(facts, name);
        facts += '\0';
        tensors.append(py::handle(value));
      }
      facts += ';';
    }
  }
  return py::make_tuple(tensors, py::bytes(facts));
}

bool refer_to(const py::list& references, const py::list& objects) {
  const Py_ssize_t size = PyList_GET_SIZE(references.ptr());
  if (size != PyList_GET_SIZE(objects.ptr())) return false;
  for (Py_ssize_t at = 0; at < size; ++at) {
    if (referent(PyList_GET_ITEM(references.ptr(), at)) != PyList_GET_ITEM(objects.ptr(), at)) return false;
  }
  return true;
}

}  // namespace ckpt_fast
