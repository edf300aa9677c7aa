// SPDX-License-Identifier: Apache-2.0
// Whether a pickle may be given to an unpickler: its opcodes are followed without making anything, to see
// that memory and time for it stay in proportion to its length.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ckpt_fast {

/// Who reads it decides which opcodes it needs.
enum class PickleReader {
  kMetadata,  // that of `.metadata`: plain data and torch's data classes
  kArchive,  // that of torch.save's archives: storages by name, all that protocols 2 to 5 have for plain data
};

/// Follows the pickle at `data`, up to its STOP. Returns the position behind it; more bytes may follow.
/// Throws std::invalid_argument naming opcode and position if
/// - an argument reaches beyond `nbytes`, or an opcode is none that the reader needs,
/// - the unpickler's memo would grow beyond the bytes there are,
/// - the name of a class or function has more than 1024 bytes,
/// - values are nested deeper than 256, or one contains itself,
/// - written out, with what is shared repeated, it has more than 64 values for each byte (and 100 000),
/// - a call makes as many bytes or elements as a number says.
size_t check_pickle(const uint8_t* data, size_t nbytes, PickleReader reader);

}  // namespace ckpt_fast
