// SPDX-License-Identifier: Apache-2.0
// Runs the row permutation's device code on the CPU, one thread of the grid after another, against the
// definition of the two row orders. Prints the first difference and exits with 1.
#include "cuda/glu_tile.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

using namespace ckpt_fast::cuda;

namespace {

struct Unit16 {
  std::uint64_t low, high;
};

void expect(bool holds, const char* what, std::uint64_t a, std::uint64_t b) {
  if (holds) return;
  std::printf("%s: %llu, %llu\n", what, static_cast<unsigned long long>(a),
              static_cast<unsigned long long>(b));
  std::exit(1);
}

// The kernel's loop over tiles, for every block and thread of a grid.
void run_grid(const Batch& batch, std::uint64_t blocks) {
  for (std::uint64_t block = 0; block < blocks; ++block) {
    std::uint32_t i = 0;
    for (std::uint64_t tile = block; tile < batch.tiles; tile += blocks) {
      while (tile >= batch.tiles_before[i + 1]) ++i;
      const Matrix& matrix = batch.matrices[i];
      const Shape& shape = batch.shapes[matrix.shape];
      for (std::uint32_t thread = 0; thread < kThreads; ++thread) {
        std::uint64_t of_matrix = tile - batch.tiles_before[i];
        switch (shape.unit_nbytes) {
          case 16:
            copy_tile<Unit16>(matrix, shape, of_matrix, thread, batch.interleave);
            break;
          case 8:
            copy_tile<std::uint64_t>(matrix, shape, of_matrix, thread, batch.interleave);
            break;
          case 4:
            copy_tile<std::uint32_t>(matrix, shape, of_matrix, thread, batch.interleave);
            break;
          case 2:
            copy_tile<std::uint16_t>(matrix, shape, of_matrix, thread, batch.interleave);
            break;
          default:
            copy_tile<std::uint8_t>(matrix, shape, of_matrix, thread, batch.interleave);
        }
      }
    }
  }
}

// Source row of a destination row, from the definition.
std::int64_t source_row(std::int64_t row, std::int64_t rows, std::int64_t k, bool interleave) {
  std::int64_t half = rows / 2;
  if (interleave) return (row / k % 2) * half + row / (2 * k) * k + row % k;
  std::int64_t of_half = row % half;
  return of_half / k * 2 * k + (row / half) * k + of_half % k;
}

struct Case {
  std::int64_t rows, row_nbytes, block;
  std::size_t destination_shift, source_shift;
  std::vector<unsigned char> destination, source;

  RowPermutation work() {
    return {reinterpret_cast<std::uintptr_t>(destination.data()) + destination_shift,
            reinterpret_cast<std::uintptr_t>(source.data()) + source_shift, rows, row_nbytes, block};
  }
};

Case make_case(std::mt19937_64& random) {
  auto below = [&](std::uint64_t n) { return random() % n; };
  Case c;
  c.block = static_cast<std::int64_t>(1 + below(5));
  c.rows = 2 * c.block * static_cast<std::int64_t>(below(12));
  c.row_nbytes = static_cast<std::int64_t>(below(3) ? below(70) : 16 * below(300));
  c.destination_shift = below(2) ? 0 : below(17);
  c.source_shift = below(2) ? 0 : below(17);
  auto nbytes = static_cast<std::size_t>(c.rows * c.row_nbytes);
  c.source.resize(nbytes + 64);
  for (auto& byte : c.source) byte = static_cast<unsigned char>(random());
  c.destination.assign(nbytes + 64, 0xA5);
  return c;
}

void check_case(const Case& c, bool interleave) {
  const unsigned char* to = c.destination.data() + c.destination_shift;
  const unsigned char* from = c.source.data() + c.source_shift;
  auto width = static_cast<std::size_t>(c.row_nbytes);
  for (std::int64_t row = 0; row < c.rows; ++row) {
    std::int64_t origin = source_row(row, c.rows, c.block, interleave);
    bool same = std::memcmp(to + row * c.row_nbytes, from + origin * c.row_nbytes, width) == 0;
    expect(same, "wrong row, of rows", static_cast<std::uint64_t>(row), static_cast<std::uint64_t>(c.rows));
  }
  std::size_t end = c.destination_shift + static_cast<std::size_t>(c.rows) * width;
  for (std::size_t i = 0; i < c.destination.size(); ++i) {
    if (i < c.destination_shift || i >= end) expect(c.destination[i] == 0xA5, "wrote outside, at", i, end);
  }
}

void test_batches() {
  std::mt19937_64 random(7);
  for (int round = 0; round < 40; ++round) {
    bool interleave = round % 2 == 0;
    std::vector<Case> cases;
    for (std::uint32_t i = 0; i < 1 + random() % Batch::kCapacity; ++i) cases.push_back(make_case(random));
    for (std::size_t i = 0; i < cases.size();) {
      Batch batch;
      batch.interleave = interleave;
      while (i < cases.size() && append(batch, plan_matrix(cases[i].work()))) ++i;
      run_grid(batch, 1 + random() % 40);
    }
    for (const Case& c : cases) check_case(c, interleave);
  }
}

void test_divider() {
  std::mt19937_64 random(11);
  const std::uint64_t most = (std::uint64_t{1} << 63) - 1;
  for (int i = 0; i < 200000; ++i) {
    std::uint64_t divisor = (random() >> (1 + random() % 63)) | 1;
    if (i % 3 == 0) divisor = std::uint64_t{1} << (random() % 63);
    if (i % 3 == 1) divisor = 1 + random() % 100000;
    Divider by = make_divider(divisor);
    std::uint64_t multiple = most / divisor * divisor;
    for (std::uint64_t n :
         {std::uint64_t{0}, divisor - 1, divisor, multiple - 1, multiple, most, random() >> 1}) {
      expect(by.quotient(n) == n / divisor, "wrong quotient of, by", n, divisor);
    }
  }
}

// Indices beyond 2^32, for which the memory itself would be too large: addresses are never dereferenced.
void test_large() {
  std::mt19937_64 random(13);
  for (std::int64_t row_nbytes : {1, 2, 48, 8192}) {
    for (std::int64_t block : {1, 32}) {
      std::int64_t rows = (std::int64_t{1} << 33) / row_nbytes / 64 * 64 * 5;
      Shape shape =
          plan_matrix({std::uintptr_t{1} << 50, std::uintptr_t{1} << 40, rows, row_nbytes, block}).shape;
      auto unit = static_cast<std::int64_t>(shape.unit_nbytes);
      for (int i = 0; i < 1000; ++i) {
        std::uint64_t to = i == 0 ? shape.units - 1 : random() % shape.units;
        std::int64_t byte = static_cast<std::int64_t>(to) * unit;
        for (bool interleave : {true, false}) {
          std::int64_t row = source_row(byte / row_nbytes, rows, block, interleave);
          auto want = static_cast<std::uint64_t>((row * row_nbytes + byte % row_nbytes) / unit);
          std::uint64_t from = source_unit(shape, to, interleave);
          expect(from == want, "wrong source unit, wanted", from, want);
        }
      }
    }
  }
}

// The weights of 64 experts go into one launch; one that does not fit leaves the batch unchanged.
void test_capacity() {
  Batch batch;
  auto expert = [&](std::uint64_t i, std::int64_t row_nbytes) {
    return append(batch, plan_matrix({(i + 1) << 32, (i + 1000) << 32, 256, row_nbytes, 32}));
  };
  for (std::uint64_t i = 0; i < 64; ++i) expect(expert(i, 4096), "no room for expert", i, batch.count);
  for (std::uint64_t i = 64; i < Batch::kCapacity; ++i) expect(expert(i, 2), "no room", i, batch.count);
  expect(batch.shape_count == 2, "shapes", batch.shape_count, 2);
  expect(!expert(0, 2) && batch.count == Batch::kCapacity, "more than fit", batch.count, Batch::kCapacity);

  batch = Batch();
  for (std::int64_t i = 0; i < Batch::kShapes; ++i) expert(0, 16 * (i + 1));
  expect(!expert(0, 8) && batch.count == Batch::kShapes, "more shapes than fit", batch.count, Batch::kShapes);
  expect(expert(0, 16), "no room for a known shape", batch.count, Batch::kShapes);
}

void test_unit_is_the_widest() {
  std::uintptr_t base = std::uintptr_t{1} << 40;
  auto unit = [&](std::uintptr_t destination_shift, std::int64_t row_nbytes, std::int64_t block) {
    return plan_matrix({base + destination_shift, base * 2, 64, row_nbytes, block}).shape.unit_nbytes;
  };
  expect(unit(0, 8192, 1) == 16, "aligned rows", unit(0, 8192, 1), 16);
  expect(unit(0, 2, 8) == 16, "a run of short rows", unit(0, 2, 8), 16);
  expect(unit(0, 2, 1) == 2, "single short rows", unit(0, 2, 1), 2);
  expect(unit(4, 8192, 1) == 4, "an address on 4", unit(4, 8192, 1), 4);
  expect(unit(0, 24, 1) == 8, "rows of 24", unit(0, 24, 1), 8);
  expect(unit(1, 8192, 32) == 1, "an odd address", unit(1, 8192, 32), 1);
}

}  // namespace

int main() {
  test_divider();
  test_unit_is_the_widest();
  test_capacity();
  test_large();
  test_batches();
}
