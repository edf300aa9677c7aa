// SPDX-License-Identifier: Apache-2.0
// Python's view of the engine. Converts arguments, drops the GIL, maps errors; nothing else.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <unistd.h>

#include <chrono>
#include <deque>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/base/error.h"
#include "engine/checksum/checksum.h"
#include "engine/io/reader.h"
#include "engine/io/writer.h"
#include "engine/memory/copier.h"
#include "engine/memory/permute.h"
#include "engine/pickle/pickle_check.h"
#include "python/column_argument.h"
#include "python/describe_tensors.h"
#include "python/inventory.h"

namespace py = pybind11;
using namespace ckpt_fast;

namespace {

/// The columns of one call, by name.
class ColumnArguments {
 public:
  Column hold(const py::buffer& buffer, const char* name) { return held_.emplace_back(buffer, name); }

 private:
  std::deque<ColumnArgument> held_;
};

std::vector<std::string> encode_paths(const py::sequence& paths) {
  std::vector<std::string> encoded;
  for (const py::handle path : paths) {
    PyObject* bytes = nullptr;  // PyUnicode_FSConverter accepts str, bytes and os.PathLike
    if (PyUnicode_FSConverter(path.ptr(), &bytes) == 0) throw py::error_already_set();
    encoded.push_back(py::reinterpret_steal<py::bytes>(bytes));
  }
  return encoded;
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

/// Calls without the GIL. A thread that returns while the interpreter is shutting down stays here until the
/// process is gone: CPython would unwind it through destructors, which would call std::terminate or touch
/// objects without the GIL.
template <typename Call>
auto without_gil(Call&& call) -> decltype(call()) {
  std::optional<decltype(call())> result;
  std::exception_ptr error;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    result = call();
  } catch (...) {
    error = std::current_exception();
  }
  while (is_finalizing()) ::pause();
  PyEval_RestoreThread(thread);
  if (error) std::rethrow_exception(error);
  return std::move(*result);
}

py::object decode_path(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void raise_os_error(const SystemError& error) {
  const py::object text = decode_path(error.what());
  // An instance, because only OSError's constructor turns ENOENT into a FileNotFoundError, and Python 3.10
  // matches except clauses against the type given here.
  const py::object os_error =
      py::handle(PyExc_OSError)(error.error_number(), text, decode_path(error.path()));
  PyErr_SetObject(py::type::handle_of(os_error).ptr(), os_error.ptr());
}

uint32_t crc32_of(uintptr_t address, size_t nbytes, uint32_t seed) {
  return without_gil([&] { return crc32(reinterpret_cast<const void*>(address), nbytes, seed); });
}

uint32_t copy_crc32_of(uintptr_t destination, uintptr_t source, size_t nbytes, uint32_t seed) {
  return without_gil([&] {
    return copy_crc32(reinterpret_cast<void*>(destination), reinterpret_cast<const void*>(source), nbytes,
                      seed);
  });
}

void permute_rows_at(const py::buffer& destination, const py::buffer& source, const py::buffer& rows,
                     const py::buffer& row_nbytes, const py::buffer& block, bool interleave, int threads) {
  const ColumnArgument columns[] = {{destination, "destination"},
                                    {source, "source"},
                                    {rows, "rows"},
                                    {row_nbytes, "row_nbytes"},
                                    {block, "block"}};
  without_gil([&] {
    permute_rows({columns[0], columns[1], columns[2], columns[3], columns[4]}, interleave, threads);
    return true;
  });
}

void copy_runs_at(const py::buffer& destination, const py::buffer& source, const py::buffer& nbytes,
                  const py::buffer& run_count, const py::buffer& pitch, int threads) {
  const ColumnArgument columns[] = {{destination, "destination"},
                                    {source, "source"},
                                    {nbytes, "nbytes"},
                                    {run_count, "run_count"},
                                    {pitch, "pitch"}};
  without_gil([&] {
    copy_runs({columns[0], columns[1], columns[2], columns[3], columns[4]}, threads);
    return true;
  });
}

template <typename Number>
py::bytes as_bytes(const std::vector<Number>& numbers) {
  return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number)};
}

py::tuple write_files_from(const py::sequence& paths, const py::buffer& file_nbytes,
                           const py::buffer& piece_file, const py::buffer& piece_offset,
                           const py::buffer& piece_nbytes, const py::buffer& piece_address,
                           const py::buffer& piece_digest, const py::buffer& patch_file,
                           const py::buffer& patch_offset, const py::buffer& patch_digest,
                           int64_t digest_count, int threads, int64_t chunk_bytes, bool direct, bool fsync,
                           Progress* progress, int64_t block_bytes,
                           const std::optional<py::buffer>& piece_batch, Supply* supply) {
  if (piece_batch.has_value() != (supply != nullptr)) {
    throw py::value_error("piece_batch and supply go together");
  }
  ColumnArguments columns;
  WriteRequest request;
  request.paths = encode_paths(paths);
  request.file_nbytes = columns.hold(file_nbytes, "file_nbytes");
  request.piece_file = columns.hold(piece_file, "piece_file");
  request.piece_offset = columns.hold(piece_offset, "piece_offset");
  request.piece_nbytes = columns.hold(piece_nbytes, "piece_nbytes");
  request.piece_address = columns.hold(piece_address, "piece_address");
  request.piece_digest = columns.hold(piece_digest, "piece_digest");
  request.patch_file = columns.hold(patch_file, "patch_file");
  request.patch_offset = columns.hold(patch_offset, "patch_offset");
  request.patch_digest = columns.hold(patch_digest, "patch_digest");
  request.digest_count = digest_count;
  request.threads = threads;
  request.chunk_nbytes = chunk_bytes;
  request.direct = direct;
  request.fsync = fsync;
  request.progress = progress;
  request.block_nbytes = block_bytes;
  request.supply = supply;
  if (piece_batch) request.piece_batch = columns.hold(*piece_batch, "piece_batch");
  const WriteResult result = without_gil([&] { return write_files(request); });
  return py::make_tuple(result.stream_crcs, result.file_crcs, as_bytes(result.block_crcs));
}

std::unique_ptr<Supply> new_supply(const py::buffer& batch_nbytes) {
  const ColumnArgument argument(batch_nbytes, "batch_nbytes");
  const Column column = argument;
  return std::make_unique<Supply>(std::vector<int64_t>(column.data, column.data + column.size));
}

bool wait_written(Supply& supply, size_t batch, double timeout_s) {
  const auto at_most =
      std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::duration<double>(timeout_s));
  return without_gil([&] { return supply.wait_written(batch, at_most); });
}

py::bytes read_extents_into(const py::sequence& paths, const py::buffer& extent_file,
                            const py::buffer& extent_offset, const py::buffer& extent_nbytes,
                            const py::buffer& extent_address, const py::buffer& range_file,
                            const py::buffer& range_offset, const py::buffer& range_nbytes,
                            const py::buffer& range_block, int threads, int64_t chunk_bytes, bool direct,
                            Progress* progress) {
  ColumnArguments columns;
  ReadRequest request;
  request.paths = encode_paths(paths);
  request.extent_file = columns.hold(extent_file, "extent_file");
  request.extent_offset = columns.hold(extent_offset, "extent_offset");
  request.extent_nbytes = columns.hold(extent_nbytes, "extent_nbytes");
  request.extent_address = columns.hold(extent_address, "extent_address");
  request.range_file = columns.hold(range_file, "range_file");
  request.range_offset = columns.hold(range_offset, "range_offset");
  request.range_nbytes = columns.hold(range_nbytes, "range_nbytes");
  request.range_block = columns.hold(range_block, "range_block");
  request.threads = threads;
  request.chunk_nbytes = chunk_bytes;
  request.direct = direct;
  request.progress = progress;
  return as_bytes(without_gil([&] { return read_extents(request); }));
}

size_t check_pickle_in(const py::buffer& content, bool archive) {
  const py::buffer_info info = content.request();
  if (info.ndim != 1 || info.itemsize != 1 || (info.shape[0] > 1 && info.strides[0] != 1)) {
    throw py::type_error("content is not a buffer of bytes");
  }
  const auto reader = archive ? PickleReader::kArchive : PickleReader::kMetadata;
  return without_gil([&] {
    return check_pickle(static_cast<const uint8_t*>(info.ptr), static_cast<size_t>(info.shape[0]), reader);
  });
}

}  // namespace

PYBIND11_MODULE(_engine, m) {
  m.doc() = "The engine: bytes in, bytes out. Contracts are in _engine.pyi.";

  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const SystemError& error) {
      raise_os_error(error);
    }
  });

  m.def("crc32", crc32_of, py::arg("address"), py::arg("nbytes"), py::arg("seed") = 0);
  m.def("crc32_combine", crc32_combine, py::arg("first"), py::arg("second"), py::arg("second_nbytes"));
  m.def("copy_crc32", copy_crc32_of, py::arg("destination"), py::arg("source"), py::arg("nbytes"),
        py::arg("seed") = 0);
  m.def("copy_runs", copy_runs_at, py::arg("destination"), py::arg("source"), py::arg("nbytes"),
        py::arg("run_count"), py::arg("pitch"), py::arg("threads"));
  py::class_<Progress>(m, "Progress")
      .def(py::init<>())
      .def_property_readonly("nbytes", &Progress::nbytes)
      .def_property_readonly("stopped", &Progress::stopped)
      .def_property_readonly("renaming", &Progress::renaming)
      .def("stop", &Progress::stop)
      .def("begin_rename", &Progress::begin_rename)
      .def("end_rename", &Progress::end_rename);
  py::class_<Supply>(m, "Supply")
      .def(py::init(&new_supply), py::arg("batch_nbytes"))
      .def("arrive", &Supply::arrive, py::arg("count"))
      .def("wait_written", wait_written, py::arg("batch"), py::arg("timeout_s"))
      .def_property_readonly("ended", &Supply::ended)
      .def("end", &Supply::end);
  m.def("write_files", write_files_from, py::arg("paths"), py::kw_only(), py::arg("file_nbytes"),
        py::arg("piece_file"), py::arg("piece_offset"), py::arg("piece_nbytes"), py::arg("piece_address"),
        py::arg("piece_digest"), py::arg("patch_file"), py::arg("patch_offset"), py::arg("patch_digest"),
        py::arg("digest_count"), py::arg("threads"), py::arg("chunk_bytes"), py::arg("direct"),
        py::arg("fsync"), py::arg("progress") = nullptr, py::arg("block_bytes") = 0,
        py::arg("piece_batch") = py::none(), py::arg("supply") = nullptr);
  m.def("read_extents", read_extents_into, py::arg("paths"), py::kw_only(), py::arg("extent_file"),
        py::arg("extent_offset"), py::arg("extent_nbytes"), py::arg("extent_address"), py::arg("range_file"),
        py::arg("range_offset"), py::arg("range_nbytes"), py::arg("range_block"), py::arg("threads"),
        py::arg("chunk_bytes"), py::arg("direct"), py::arg("progress") = nullptr);
  m.def("permute_rows", permute_rows_at, py::arg("destination"), py::arg("source"), py::arg("rows"),
        py::arg("row_nbytes"), py::arg("block"), py::arg("interleave"), py::arg("threads"));
  m.def("check_pickle", check_pickle_in, py::arg("content"), py::arg("archive") = false);
  m.def("describe_tensors", describe_tensors, py::arg("values"), py::arg("types"), py::arg("layout"));
  m.def("refer_to", refer_to, py::arg("references"), py::arg("objects"));
  m.def("walk_modules", walk_modules, py::arg("roots"));
  m.def("walk_optimizer", walk_optimizer, py::arg("groups"), py::arg("state"), py::arg("tensor"));
  m.def("cpu_features", cpu_features);
}
