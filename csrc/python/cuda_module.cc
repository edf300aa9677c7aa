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
#include "python/column_argument.h"

namespace py = pybind11;
namespace cuda = ckpt_fast::cuda;
using ckpt_fast::Column;
using ckpt_fast::ColumnArgument;

namespace {

cuda::Stream as_stream(std::uintptr_t handle) { return reinterpret_cast<cuda::Stream>(handle); }

void permute_rows(const py::buffer& destination, const py::buffer& source, const py::buffer& rows,
                  const py::buffer& row_nbytes, const py::buffer& block, bool interleave, int device,
                  std::uintptr_t stream) {
  const ColumnArgument arguments[] = {{destination, "destination"},
                                      {source, "source"},
                                      {rows, "rows"},
                                      {row_nbytes, "row_nbytes"},
                                      {block, "block"}};
  const Column destinations = arguments[0], sources = arguments[1], row_counts = arguments[2],
               widths = arguments[3], blocks = arguments[4];
  std::size_t count = destinations.size;
  for (const Column* column : {&sources, &row_counts, &widths, &blocks}) {
    if (column->size != count) throw std::invalid_argument("permute_rows: columns differ in length");
  }
  std::vector<cuda::RowPermutation> works;
  works.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    works.push_back({static_cast<std::uintptr_t>(destinations[i]), static_cast<std::uintptr_t>(sources[i]),
                     row_counts[i], widths[i], blocks[i]});
  }
  py::gil_scoped_release release;
  cuda::permute_rows(works.data(), works.size(), interleave, device, as_stream(stream));
}

std::vector<cuda::Copy> as_copies(const py::buffer& destination, const py::buffer& source,
                                  const py::buffer& nbytes) {
  const ColumnArgument arguments[] = {{destination, "destination"}, {source, "source"}, {nbytes, "nbytes"}};
  const Column destinations = arguments[0], sources = arguments[1], sizes = arguments[2];
  if (sources.size != destinations.size || sizes.size != destinations.size) {
    throw std::invalid_argument("destination, source and nbytes differ in length");
  }
  std::vector<cuda::Copy> copies;
  copies.reserve(sizes.size);
  for (std::size_t i = 0; i < sizes.size; ++i) {
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
