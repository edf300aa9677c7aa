// SPDX-License-Identifier: Apache-2.0
// Arithmetic of CRC-32 polynomials over GF(2), evaluated at compile time if the operands are.
//
// A polynomial of degree < 32 is a uint32_t in reflected order: the coefficient of x^j is bit 31 - j.
#pragma once

#include <array>
#include <cstdint>

namespace ckpt_fast::crc {

constexpr uint32_t kPolynomial = 0xEDB88320u;  // P without its x^32 term
constexpr uint32_t kOne = 0x80000000u;         // x^0

constexpr uint32_t times_x(uint32_t a) { return (a >> 1) ^ (kPolynomial & (0u - (a & 1u))); }

/// a * b mod P.
constexpr uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (; a != 0; a <<= 1) {
    product ^= b & (0u - (a >> 31));
    b = times_x(b);
  }
  return product;
}

/// x^exponent mod P.
constexpr uint32_t x_to_the(unsigned exponent) {
  uint32_t power = kOne;
  for (unsigned i = 0; i < exponent; ++i) power = times_x(power);
  return power;
}

/// tables[k][b]: the CRC register after byte b and k zero bytes, starting from 0 (slice-by-8).
using ByteTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr ByteTables make_byte_tables() {
  ByteTables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
    tables[0][b] = crc;
  }
  for (unsigned k = 1; k < 8; ++k) {
    for (uint32_t b = 0; b < 256; ++b) {
      const uint32_t crc = tables[k - 1][b];
      tables[k][b] = tables[0][crc & 255u] ^ (crc >> 8);
    }
  }
  return tables;
}

/// powers[k][d]: x^(8 * d * 256^k) mod P, so a shift by n bytes costs one product per byte of n.
using ShiftTables = std::array<std::array<uint32_t, 256>, 8>;

constexpr ShiftTables make_shift_tables() {
  ShiftTables powers{};
  uint32_t step = x_to_the(8);
  for (unsigned k = 0; k < 8; ++k) {
    powers[k][0] = kOne;
    for (unsigned d = 1; d < 256; ++d) powers[k][d] = multiply(powers[k][d - 1], step);
    step = multiply(powers[k][255], step);
  }
  return powers;
}

/// Carry-less multipliers that move a 128-bit lane `distance` bits towards the end of the message. A lane's
/// low 64 bits are its first 8 bytes, hence 64 degrees higher; a product of reflected operands comes out
/// one degree too high, hence the -1.
struct FoldConstants {
  uint64_t low;
  uint64_t high;
};

constexpr FoldConstants fold_constants(unsigned distance) {
  return {static_cast<uint64_t>(x_to_the(distance + 64 - 1)) << 32,
          static_cast<uint64_t>(x_to_the(distance - 1)) << 32};
}

}  // namespace ckpt_fast::crc
