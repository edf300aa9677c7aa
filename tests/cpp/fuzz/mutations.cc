// SPDX-License-Identifier: Apache-2.0
#include "mutations.h"

#include <algorithm>

namespace {

constexpr size_t kLongestBlock = 64;

constexpr uint64_t kExtremes[] = {0,
                                  1,
                                  0x20,
                                  0x7F,
                                  0x80,
                                  0xFF,
                                  0x7FFF,
                                  0x8000,
                                  0xFFFF,
                                  0x10000,
                                  0x7FFFFFFF,
                                  0x80000000,
                                  0xFFFFFFFF,
                                  uint64_t{1} << 32,
                                  uint64_t{1} << 62,
                                  (uint64_t{1} << 63) - 1,
                                  uint64_t{1} << 63,
                                  ~uint64_t{0}};

struct Range {
  size_t begin;
  size_t end;
};

/// A short range of bytes that are there; the input has at least one.
Range some_range(Random& random, const Bytes& input) {
  const size_t begin = below(random, input.size());
  return {begin, begin + 1 + below(random, std::min(kLongestBlock, input.size() - begin))};
}

/// Replaces a number, or changes it a little.
void change_number(Random& random, Bytes* input) {
  const size_t width = size_t{1} << below(random, 4);
  if (input->size() < width) return;
  const size_t at = below(random, input->size() - width + 1);
  const bool is_big_endian = below(random, 4) == 0;
  const auto place = [&](size_t i) { return at + (is_big_endian ? width - 1 - i : i); };
  uint64_t number = 0;
  for (size_t i = 0; i < width; ++i) number |= static_cast<uint64_t>((*input)[place(i)]) << (8 * i);
  switch (below(random, 4)) {
    case 0:
      number += 1 + below(random, 16);
      break;
    case 1:
      number -= 1 + below(random, 16);
      break;
    case 2:
      number = input->size() + below(random, 3) - 1;
      break;
    default:
      number = kExtremes[below(random, std::size(kExtremes))];
  }
  for (size_t i = 0; i < width; ++i) (*input)[place(i)] = static_cast<uint8_t>(number >> (8 * i));
}

void change_block(Random& random, Bytes* input) {
  const auto [begin, end] = some_range(random, *input);
  const Bytes block(input->begin() + static_cast<long>(begin), input->begin() + static_cast<long>(end));
  switch (below(random, 4)) {
    case 0:
      input->erase(input->begin() + static_cast<long>(begin), input->begin() + static_cast<long>(end));
      break;
    case 1:
      for (size_t copies = 1 + below(random, 8); copies > 0; --copies) {
        input->insert(input->begin() + static_cast<long>(end), block.begin(), block.end());
      }
      break;
    case 2: {
      const size_t to = below(random, input->size() + 1);
      input->insert(input->begin() + static_cast<long>(to), block.begin(), block.end());
      break;
    }
    default: {
      const size_t kind = below(random, 3);
      for (size_t i = begin; i < end; ++i) {
        (*input)[i] = kind == 0 ? 0 : kind == 1 ? 0xFF : static_cast<uint8_t>(random());
      }
    }
  }
}

}  // namespace

void mutate(Random& random, Bytes* input) {
  if (input->empty()) return input->push_back(static_cast<uint8_t>(random()));
  uint8_t& byte = (*input)[below(random, input->size())];
  switch (below(random, 8)) {
    case 0:
    case 1:
      byte = static_cast<uint8_t>(byte ^ 1u << below(random, 8));
      break;
    case 2:
      byte = static_cast<uint8_t>(random());
      break;
    case 3:
    case 4:
      change_number(random, input);
      break;
    case 5:
    case 6:
      change_block(random, input);
      break;
    default:
      if (below(random, 4) == 0) input->resize(below(random, input->size()));
  }
}

void splice(Random& random, const Bytes& other, Bytes* input) {
  if (other.empty()) return;
  const size_t at = below(random, input->size() + 1);
  if (below(random, 2) == 0) {
    const size_t from = below(random, other.size());
    input->resize(at);
    input->insert(input->end(), other.begin() + static_cast<long>(from), other.end());
  } else {
    const auto [begin, end] = some_range(random, other);
    input->insert(input->begin() + static_cast<long>(at), other.begin() + static_cast<long>(begin),
                  other.begin() + static_cast<long>(end));
  }
}
