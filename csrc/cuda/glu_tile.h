// SPDX-License-Identifier: Apache-2.0
// What one thread of the row permutation does, and how the work is divided. Plain C++, so that a test can
// run the same code on a CPU, one thread after another.
//
// k rows that are adjacent in one order are adjacent in the other: a *run* of k * row_nbytes bytes. Run 2b +
// h of the interleaved order is run h * B + b of the contiguous order, for h in {0 gate, 1 up} and b in [0,
// B). A run is copied in *units*, the largest power of two up to 16 bytes that divides both addresses and the
// run. Units are counted in 64 bits: a tensor may have more than 2^32 of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/glu.h"
#include "cuda/portable.h"

namespace ckpt_fast::cuda {

constexpr std::uint32_t kThreads = 256;
constexpr std::uint32_t kUnitsPerThread = 4;  // loads in flight before the first store
constexpr std::uint64_t kTileUnits = std::uint64_t{kThreads} * kUnitsPerThread;

/// n / divisor by one multiplication, exact for n < 2^63: the GPU's 64-bit division takes about a
/// hundred instructions, too many for a 16-byte copy at memory speed.
struct Divider {
  std::uint64_t multiplier;  // 0 stands for a divisor of 1
  std::uint32_t shift;

  CKPT_FAST_DEVICE std::uint64_t quotient(std::uint64_t n) const {
    if (multiplier == 0) return n;
#ifdef __CUDA_ARCH__
    return __umul64hi(n, multiplier) >> shift;
#else
    return static_cast<std::uint64_t>((static_cast<unsigned __int128>(n) * multiplier) >> 64) >> shift;
#endif
  }
};

/// With L = ceil(log2(divisor)) and m = floor(2^(63+L) / divisor) + 1, m * divisor exceeds 2^(63+L) by at
/// most divisor <= 2^L, so n * m / 2^(63+L) is off by less than 1/divisor while n < 2^63. m fits 64 bits for
/// divisor > 1.
inline Divider make_divider(std::uint64_t divisor) {
  if (divisor == 1) return {0, 0};
  std::uint32_t log = 64 - static_cast<std::uint32_t>(__builtin_clzll(divisor - 1));
  unsigned __int128 power = static_cast<unsigned __int128>(1) << (63 + log);
  return {static_cast<std::uint64_t>(power / divisor) + 1, log - 1};
}

struct Shape {
  std::uint64_t units;      // of the whole matrix
  std::uint64_t pairs;      // B
  std::uint64_t run_units;  // of one run
  Divider by_run;
  std::uint32_t unit_nbytes;
};

struct PlannedMatrix {
  std::uintptr_t destination;
  std::uintptr_t source;
  Shape shape;
};

struct Matrix {
  std::uintptr_t destination;
  std::uintptr_t source;
  std::uint32_t shape;  // index into the batch's shapes
};

/// As many matrices as fit into the arguments of one launch, which are limited to 4 KiB and need no upload.
/// The experts of a layer share a shape, so each shape is stored once. Tiles, each kTileUnits units of one
/// matrix, are numbered across all matrices.
struct Batch {
  static constexpr std::uint32_t kCapacity = 96;
  static constexpr std::uint32_t kShapes = 16;

  std::uint64_t tiles = 0;
  std::uint32_t count = 0;
  std::uint32_t shape_count = 0;
  bool interleave = false;
  std::uint64_t tiles_before[kCapacity + 1] = {};  // of matrix i; entry `count` is `tiles`
  Matrix matrices[kCapacity];
  Shape shapes[kShapes];
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments are limited to 4 KiB");

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("permute_rows: " + what);
}

inline PlannedMatrix plan_matrix(const RowPermutation& work) {
  require(work.block > 0, "block is " + std::to_string(work.block) + ", not positive");
  require(work.rows >= 0 && work.row_nbytes >= 0, "rows and row_nbytes must not be negative");
  // Compared without doubling the block, which could overflow.
  require(work.rows % work.block == 0 && work.rows / work.block % 2 == 0,
          std::to_string(work.rows) + " rows are not a multiple of 2 * " + std::to_string(work.block));
  std::int64_t nbytes = 0;
  require(!__builtin_mul_overflow(work.rows, work.row_nbytes, &nbytes),
          std::to_string(work.rows) + " rows of " + std::to_string(work.row_nbytes) + " bytes overflow");
  auto size = static_cast<std::uint64_t>(nbytes);
  if (size == 0) return {work.destination, work.source, {0, 0, 0, {0, 0}, 1}};
  require(work.destination + size <= work.source || work.source + size <= work.destination,
          "source and destination overlap");

  auto run_nbytes = static_cast<std::uint64_t>(work.block * work.row_nbytes);
  std::uint64_t bits = work.destination | work.source | run_nbytes | 16;
  std::uint64_t unit = bits & (~bits + 1);
  std::uint64_t run_units = run_nbytes / unit;
  Shape shape{size / unit, size / run_nbytes / 2, run_units, make_divider(run_units),
              static_cast<std::uint32_t>(unit)};
  return {work.destination, work.source, shape};
}

/// The other fields follow from these.
inline bool operator==(const Shape& a, const Shape& b) {
  return a.units == b.units && a.run_units == b.run_units && a.unit_nbytes == b.unit_nbytes;
}

/// Returns false, and leaves the batch unchanged, if it has no room for the matrix.
inline bool append(Batch& batch, const PlannedMatrix& matrix) {
  std::uint32_t shape = 0;
  while (shape < batch.shape_count && !(batch.shapes[shape] == matrix.shape)) ++shape;
  if (batch.count == Batch::kCapacity || shape == Batch::kShapes) return false;
  if (shape == batch.shape_count) batch.shapes[batch.shape_count++] = matrix.shape;
  batch.matrices[batch.count] = {matrix.destination, matrix.source, shape};
  batch.tiles += (matrix.shape.units + kTileUnits - 1) / kTileUnits;
  batch.tiles_before[++batch.count] = batch.tiles;
  return true;
}

/// The source unit that becomes unit `unit` of the destination.
CKPT_FAST_DEVICE std::uint64_t source_unit(const Shape& shape, std::uint64_t unit, bool interleave) {
  std::uint64_t run = shape.by_run.quotient(unit);
  std::uint64_t within = unit - run * shape.run_units;
  std::uint64_t from;
  if (interleave) {
    from = (run & 1) * shape.pairs + (run >> 1);
  } else {
    from = run < shape.pairs ? 2 * run : 2 * (run - shape.pairs) + 1;
  }
  return from * shape.run_units + within;
}

/// Each byte is read once and written once, so caching it is useless.
template <typename Unit>
CKPT_FAST_DEVICE Unit load(const Unit* address) {
#ifdef __CUDA_ARCH__
  return __ldcs(address);
#else
  return *address;
#endif
}

template <typename Unit>
CKPT_FAST_DEVICE void store(Unit* address, Unit value) {
#ifdef __CUDA_ARCH__
  __stcs(address, value);
#else
  *address = value;
#endif
}

/// Thread `thread` of kThreads copies its units of tile `tile` of the matrix. Neighbouring threads write
/// neighbouring units.
template <typename Unit>
CKPT_FAST_DEVICE void copy_tile(const Matrix& matrix, const Shape& shape, std::uint64_t tile,
                                std::uint32_t thread, bool interleave) {
  auto* destination = reinterpret_cast<Unit*>(matrix.destination);
  auto* source = reinterpret_cast<const Unit*>(matrix.source);
  std::uint64_t first = tile * kTileUnits + thread;
  Unit held[kUnitsPerThread];
  for (std::uint32_t i = 0; i < kUnitsPerThread; ++i) {
    std::uint64_t unit = first + i * kThreads;
    if (unit < shape.units) held[i] = load(source + source_unit(shape, unit, interleave));
  }
  for (std::uint32_t i = 0; i < kUnitsPerThread; ++i) {
    std::uint64_t unit = first + i * kThreads;
    if (unit < shape.units) store(destination + unit, held[i]);
  }
}

}  // namespace ckpt_fast::cuda
