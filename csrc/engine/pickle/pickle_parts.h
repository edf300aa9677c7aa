// SPDX-License-Identifier: Apache-2.0
// The parts of a pickle of plain data: opcodes with arguments, and the values that they create.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>

namespace ckpt_fast {

constexpr size_t kLargestPickle = std::numeric_limits<uint32_t>::max();
constexpr uint64_t kWeightPerByte = 64;
constexpr uint64_t kFreeWeight = 100'000;
constexpr uint64_t kTextPerWeight = 8;  // bytes; a constructor may scan a whole text
constexpr int kDeepest = 256;           // hashing and comparing recurse at every level
constexpr uint64_t kLongestInteger = 64;
constexpr int64_t kLongestName = 1024;
constexpr uint32_t kEmpty = std::numeric_limits<uint32_t>::max();  // an unused memo slot

/// The argument of an opcode: a number of `width` bytes or, if `counted`, as many bytes as that number says.
struct Argument {
  int width;  // -1: an opcode that plain data does not need
  bool counted;
  bool in_metadata;
};

/// The argument of every opcode.
struct ArgumentTable {
  ArgumentTable();

  Argument of[256];
};

enum class Kind : uint8_t {
  kPlain,
  kText,
  kBytes,
  kTuple,
  kList,
  kDict,
  kSet,
  kRange,
  kGlobal,
  kMade,
  kNew,
  kCounted
};

enum class Makes : uint8_t { kAnything, kBytes, kRange, kEncoded, kCounted, kAttribute };

/// What calling a class or function creates.
Makes makes_when_called(const std::string& module, const std::string& name);

/// The kind of the created value; `otherwise` if nothing more is known.
Kind kind_made(Makes makes, Kind otherwise);

/// Whether bytes() of a value of this kind is no longer than the value itself.
bool is_sized(Kind kind);

/// What is known of a value without creating it. There is one for every few bytes, so it is small.
struct Value {
  uint64_t weight = 1;  // values in it, counting shared ones each time they occur
  uint32_t begin = 0;   // of a text, in the pickle
  uint32_t nbytes = 0;
  uint16_t depth = 0;
  Kind kind = Kind::kPlain;
  Makes makes = Makes::kAnything;  // a global that is called
  bool part = false;               // of another value, which would miss a change
  bool has_number = false;         // a tuple directly holds something that bytes() takes for a size
  bool has_range = false;          // a tuple directly holds a range

  explicit Value(Kind its_kind) : kind(its_kind) {}
};

}  // namespace ckpt_fast
