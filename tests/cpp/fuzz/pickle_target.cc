// SPDX-License-Identifier: Apache-2.0
// The pickle check, on a whole input for each of its readers. Mutations know operations.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "engine/pickle/pickle_check.h"
#include "engine/pickle/pickle_parts.h"
#include "fuzz/mutations.h"

using namespace ckpt_fast;

// Of libFuzzer, or of our driver.
extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

namespace {

const ArgumentTable kArguments;

/// The position behind the pickle, or 0 if it is refused.
size_t end_of(const uint8_t* data, size_t size, PickleReader reader) {
  try {
    const size_t end = check_pickle(data, size, reader);
    CHECK(end >= 3 && end <= size && data[end - 1] == '.');
    return end;
  } catch (const std::invalid_argument& error) {
    CHECK(std::strncmp(error.what(), "opcode 0x", 9) == 0);
    return 0;
  }
}

/// Where the operation at `begin` ends; 0 if it is none, or does not end.
size_t operation_end(const Bytes& pickle, size_t begin) {
  const Argument argument = kArguments.of[pickle[begin]];
  if (argument.width < 0) return 0;
  size_t end = begin + 1;
  if (pickle[begin] == 'c') {
    for (int line = 0; line < 2; ++line) {
      const auto from = pickle.begin() + static_cast<long>(std::min(end, pickle.size()));
      end = static_cast<size_t>(std::find(from, pickle.end(), '\n') - pickle.begin()) + 1;
    }
  }
  uint64_t number = 0;
  for (int i = 0; i < argument.width; ++i, ++end) {
    if (end < pickle.size()) number |= static_cast<uint64_t>(pickle[end]) << (8 * i);
  }
  if (end > pickle.size()) return 0;
  if (!argument.counted) return end;
  return number <= pickle.size() - end ? end + number : 0;
}

/// Where operations begin, and the last of them ends.
std::vector<size_t> operations_of(const Bytes& pickle) {
  std::vector<size_t> places;
  for (size_t at = 2; at != 0 && at <= pickle.size(); at = operation_end(pickle, at)) {
    places.push_back(at);
    if (at == pickle.size()) break;
  }
  return places;
}

uint8_t some_opcode(Random& random) {
  while (true) {
    const auto opcode = static_cast<uint8_t>(random());
    if (kArguments.of[opcode].width >= 0) return opcode;
  }
}

/// Leaves an operation out, repeats, copies or replaces it, changes its argument, or adds one without any.
void change_operation(Random& random, const std::vector<size_t>& places, Bytes* pickle) {
  const size_t chosen = below(random, places.size() - 1);
  const auto begin = pickle->begin() + static_cast<long>(places[chosen]);
  const auto end = pickle->begin() + static_cast<long>(places[chosen + 1]);
  const Bytes operation(begin, end);
  switch (below(random, 6)) {
    case 0:
      pickle->erase(begin, end);
      break;
    case 1: {
      Bytes copies;
      for (size_t count = 1 + below(random, 300 / operation.size() + 1); count > 0; --count) {
        copies.insert(copies.end(), operation.begin(), operation.end());
      }
      pickle->insert(end, copies.begin(), copies.end());
      break;
    }
    case 2: {
      const size_t to = places[below(random, places.size())];
      pickle->insert(pickle->begin() + static_cast<long>(to), operation.begin(), operation.end());
      break;
    }
    case 3:
      *begin = some_opcode(random);
      break;
    case 4:
      if (operation.size() > 1)
        begin[static_cast<long>(1 + below(random, operation.size() - 1))] = static_cast<uint8_t>(random());
      break;
    default:
      pickle->insert(begin, some_opcode(random));
  }
}

}  // namespace

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
  Random random(seed);
  Bytes pickle(data, data + size);
  const std::vector<size_t> places = operations_of(pickle);
  if (places.size() < 2 || below(random, 3) == 0) return LLVMFuzzerMutate(data, size, max_size);
  change_operation(random, places, &pickle);
  size = std::min(pickle.size(), max_size);
  std::copy_n(pickle.begin(), size, data);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const size_t archive = end_of(data, size, PickleReader::kArchive);
  const size_t metadata = end_of(data, size, PickleReader::kMetadata);
  // Whatever .metadata may contain, an archive may.
  CHECK(metadata == 0 || metadata == archive);
  return 0;
}
