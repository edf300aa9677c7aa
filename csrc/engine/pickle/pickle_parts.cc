// SPDX-License-Identifier: Apache-2.0
#include "engine/pickle/pickle_parts.h"

#include <cstring>

namespace ckpt_fast {

namespace {

bool is_one_of(const char* opcodes, uint8_t opcode) {
  return opcode != 0 && std::strchr(opcodes, opcode) != nullptr;
}

Argument look_up(uint8_t opcode) {
  // MARK, EMPTY_TUPLE, STOP, NONE, REDUCE, EMPTY_LIST, APPEND, BUILD, GLOBAL, APPENDS, SETITEM, TUPLE,
  // SETITEMS, EMPTY_DICT; NEWOBJ, TUPLE1 to TUPLE3, NEWTRUE, NEWFALSE; EMPTY_SET to FROZENSET; STACK_GLOBAL,
  // MEMOIZE
  if (is_one_of("().NR]abcestu}\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94", opcode))
    return {0, false, true};
  if (is_one_of("Khq", opcode)) return {1, false, true};           // BININT1, BINGET, BINPUT
  if (is_one_of("M", opcode)) return {2, false, true};             // BININT2
  if (is_one_of("Jjr", opcode)) return {4, false, true};           // BININT, LONG_BINGET, LONG_BINPUT
  if (is_one_of("G\x95", opcode)) return {8, false, true};         // BINFLOAT, FRAME
  if (is_one_of("C\x8a\x8c", opcode)) return {1, true, true};      // SHORT_BINBYTES, LONG1, SHORT_BINUNICODE
  if (is_one_of("BX", opcode)) return {4, true, true};             // BINBYTES, BINUNICODE
  if (is_one_of("Q\x92", opcode)) return {0, false, false};        // BINPERSID, NEWOBJ_EX
  if (is_one_of("U", opcode)) return {1, true, false};             // SHORT_BINSTRING
  if (is_one_of("T\x8b", opcode)) return {4, true, false};         // BINSTRING, LONG4
  if (is_one_of("\x8d\x8e\x96", opcode)) return {8, true, false};  // BINUNICODE8, BINBYTES8, BYTEARRAY8
  return {-1, false, false};
}

}  // namespace

Makes makes_when_called(const std::string& module, const std::string& name) {
  if (module == "builtins" || module == "__builtin__") {
    if (name == "bytes" || name == "bytearray") return Makes::kBytes;
    if (name == "range" || name == "xrange") return Makes::kRange;
    // How protocol 2 spells a class inside another class.
    if (name == "getattr") return Makes::kAttribute;
  }
  // Protocol 2's encoding of bytes.
  if (module == "_codecs" && name == "encode") return Makes::kEncoded;
  // The metadata unpickler counts comparisons of these.
  if (module == "torch.distributed.checkpoint.metadata" && name == "MetadataIndex") return Makes::kCounted;
  return Makes::kAnything;
}

Kind kind_made(Makes makes, Kind otherwise) {
  switch (makes) {
    case Makes::kRange:
      return Kind::kRange;
    case Makes::kEncoded:
      return Kind::kBytes;
    case Makes::kCounted:
      return Kind::kCounted;
    case Makes::kAttribute:
      return Kind::kGlobal;
    default:
      return otherwise;
  }
}

bool is_sized(Kind kind) {
  return kind == Kind::kText || kind == Kind::kBytes || kind == Kind::kTuple || kind == Kind::kList;
}

ArgumentTable::ArgumentTable() {
  for (int opcode = 0; opcode < 256; ++opcode) of[opcode] = look_up(static_cast<uint8_t>(opcode));
}

}  // namespace ckpt_fast
