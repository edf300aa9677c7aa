// SPDX-License-Identifier: Apache-2.0
// ckpt_fast.native._cuda: conversions only; ckpt_fast/native/_cuda.pyi is the contract. A CudaError becomes a
// RuntimeError, an std::invalid_argument a ValueError.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda/copier.h"
#include "cuda/device.h"
#include "cuda/glu.h"

namespace py = pybind11;
namespace cuda = ckpt_fast::cuda;

namespace {

// One column of a table: a one-dimensional buffer of signed 64-bit integers, as array.array("q") gives.
class Column {
 public:
  Column(const py::buffer& buffer, const std::string& name) : info_(buffer.request()) {
    bool sound = info_.ndim == 1 && info_.itemsize == sizeof(std::int64_t) &&
                 (info_.format == "q" || info_.format == "l") &&
                 (info_.size <= 1 || info_.strides[0] == info_.itemsize);
    if (!sound) throw std::invalid_argument(name + " must be a buffer of signed 64-bit integers");
  }

  std::size_t size() const { return static_cast<std::size_t>(info_.size); }
  std::int64_t operator[](std::size_t row) const { return static_cast<const std::int64_t*>(info_.ptr)[row]; }

 private:
  py::buffer_info info_;
};

cuda::Stream as_stream(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

void permute_rows(const py::buffer& destination, const py::buffer& source, const py::buffer& rows,
                  const py::buffer& row_nbytes, const py::buffer& block, bool interleave, int device,
                  std::uintptr_t stream) {
  Column destinations(destination, "destination"), sources(source, "source"), all_rows(rows, "rows"),
      widths(row_nbytes, "row_nbytes"), blocks(block, "block");
  std::size_t count = destinations.size();
  for (const Column* column : {&sources, &all_rows, &widths, &blocks}) {
    if (column->size() != count) throw std::invalid_argument("permute_rows: columns differ in length");
  }
  std::vector<cuda::RowPermutation> works;
  works.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    works.push_back({static_cast<std::uintptr_t>(destinations[i]), static_cast<std::uintptr_t>(sources[i]),
                     all_rows[i], widths[i], blocks[i]});
  }
  py::gil_scoped_release release;
  cuda::permute_rows(works.data(), works.size(), interleave, device, as_stream(stream));
}

std::vector<cuda::Copy> as_copies(const py::buffer& destination, const py::buffer& source,
                                  const py::buffer& nbytes) {
  Column destinations(destination, "destination"), sources(source, "source"), sizes(nbytes, "nbytes");
  if (sources.size() != destinations.size() || sizes.size() != destinations.size()) {
    throw std::invalid_argument("destination, source and nbytes differ in length");
  }
  std::vector<cuda::Copy> copies;
  copies.reserve(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    copies.push_back(
        {static_cast<std::uintptr_t>(destinations[i]), static_cast<std::uintptr_t>(sources[i]), sizes[i]});
  }
  return copies;
}

using Move = void (*)(const cuda::Copy*, std::size_t, int, cuda::Stream);

template <Move move>
void enqueue(const py::buffer& destination, const py::buffer& source, const py::buffer& nbytes, int device,
             std::uintptr_t stream) {
  std::vector<cuda::Copy> copies = as_copies(destination, source, nbytes);
  py::gil_scoped_release release;
  move(copies.data(), copies.size(), device, as_stream(stream));
}

void copy_rows(std::uintptr_t destination, std::int64_t destination_pitch, std::uintptr_t source,
               std::int64_t source_pitch, std::int64_t row_nbytes, std::int64_t rows, int device,
               std::uintptr_t stream) {
  cuda::RowCopy copy{destination, destination_pitch, source, source_pitch, row_nbytes, rows};
  py::gil_scoped_release release;
  cuda::copy_rows(copy, device, as_stream(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.attr("cuda_version") = CUDART_VERSION;
  module.def("device_count", &cuda::device_count);
  for (auto [name, function] : {std::pair{"copy_to_host", &enqueue<cuda::copy_to_host>},
                                std::pair{"gather", &enqueue<cuda::gather>}}) {
    module.def(name, function, py::arg("destination"), py::arg("source"), py::arg("nbytes"),
               py::arg("device"), py::arg("stream"));
  }
  module.def("copy_rows", &copy_rows, py::arg("destination"), py::arg("destination_pitch"), py::arg("source"),
             py::arg("source_pitch"), py::arg("row_nbytes"), py::arg("rows"), py::arg("device"),
             py::arg("stream"));
  module.def("permute_rows", &permute_rows, py::arg("destination"), py::arg("source"), py::arg("rows"),
             py::arg("row_nbytes"), py::arg("block"), py::arg("interleave"), py::arg("device"),
             py::arg("stream"));
}
