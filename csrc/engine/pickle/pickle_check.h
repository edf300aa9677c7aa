// SPDX-License-Identifier: Apache-2.0
// Checks whether a pickle may be passed to an unpickler: follows its opcodes without creating objects, to
// make sure that memory and time stay in proportion to its length.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt_fast {

/// The reader determines which opcodes are allowed.
enum class PickleReader {
  kMetadata,  // that of `.metadata`: plain data and torch's data classes
  kArchive,  // that of torch.save's archives: storages by name, everything in protocols 2 to 5 for plain data
};

/// Follows the pickle at `data`, up to its STOP. Returns the position after it; more bytes may follow.
/// Throws std::invalid_argument naming opcode and position if
/// - an argument reaches beyond `nbytes`, or the reader does not need an opcode,
/// - the unpickler's memo would have more entries than the pickle has bytes,
/// - the name of a class or function has more than 1024 bytes,
/// - values are nested deeper than 256, or one contains itself,
/// - expanded, with shared values repeated, it has more than 64 values per byte (plus 100 000),
/// - a call would create as many bytes or elements as a number says.
size_t check_pickle(const uint8_t* data, size_t nbytes, PickleReader reader);

}  // namespace ckpt_fast
