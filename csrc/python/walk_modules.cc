// SPDX-License-Identifier: Apache-2.0
#include "python/walk_modules.h"

#include <string>

namespace py = pybind11;

namespace ckpt_fast {
namespace {

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
    if (!py::hasattr(module, dict_)) throw py::type_error("not a torch module: it has no attributes");
    const py::object attributes = module.attr(dict_);
    take_tensors(dictionary(attributes, parameters_));
    take_tensors(dictionary(attributes, buffers_));
    count(PySet_Size(part(attributes, non_persistent_).ptr()));
    count(PyDict_Size(dictionary(attributes, hooks_).ptr()));
    count(PyDict_Size(dictionary(attributes, pre_hooks_).ptr()));
    names_ += PyDict_GetItem(attributes.ptr(), own_method_.ptr()) != nullptr ? '+' : '-';
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
    Py_ssize_t nbytes = 0;
    const char* text = PyUnicode_AsUTF8AndSize(name.ptr(), &nbytes);
    if (text == nullptr) throw py::error_already_set();
    names_.append(text, static_cast<size_t>(nbytes));
    names_ += '\0';
  }

  void count(Py_ssize_t number) {
    if (number < 0) throw py::error_already_set();
    names_ += std::to_string(number);
    names_ += ',';
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
      pre_hooks_{"_state_dict_pre_hooks"}, own_method_{"sharded_state_dict"}, children_{"_modules"};
  py::list modules_, tensors_;
  std::string names_;
};

}  // namespace

py::tuple walk_modules(const py::sequence& roots) {
  Walk walk;
  for (const py::handle root : roots) walk.visit(root);
  return walk.result();
}

}  // namespace ckpt_fast
