// SPDX-License-Identifier: Apache-2.0
// A checked read request, regrouped into few transfers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "engine/base/column.h"
#include "engine/base/progress.h"

namespace ckpt_fast {

struct ReadRequest {
  std::vector<std::string> paths;
  Column extent_file, extent_offset, extent_nbytes, extent_address;
  Column range_file, range_offset, range_nbytes, range_block;
  int threads = 1;
  int64_t chunk_nbytes = 0;
  bool direct = false;
  Progress* progress = nullptr;
};

/// Bytes of a file and their destination in memory.
struct Extent {
  size_t row;  // in the request
  int64_t file;
  int64_t offset;
  int64_t nbytes;
  uint8_t* destination;

  int64_t end() const { return offset + nbytes; }
};

/// Bytes of a file that are read together for their checksum, because some of them are wanted.
struct Block {
  int64_t file;
  int64_t offset;
  int64_t nbytes;
  size_t index;  // among the blocks of all ranges, in the order of the request

  int64_t end() const { return offset + nbytes; }
};

/// One transfer: a range of a file that is read in one piece. It holds (parts of) extents first … last - 1
/// and of blocks first_block … last_block - 1, with short gaps between them.
struct Transfer {
  size_t file;
  int64_t begin;
  int64_t end;
  size_t first;
  size_t last;
  size_t first_block;
  size_t last_block;
  bool scatters;  // no byte belongs to two extents, and every byte of a block to one
};

/// The longest gap that is read rather than left out.
constexpr int64_t kLongestGap = 64 << 10;

struct ReadPlan {
  std::vector<Extent> extents;  // by file and offset; they may overlap
  std::vector<Block> blocks;    // those that extents touch, by file and offset, disjoint
  size_t block_count = 0;       // touched or not
  std::vector<Transfer> transfers;
  bool direct = false;  // requested, and worthwhile
};

/// Throws std::invalid_argument naming the first row that breaks the contract of read_extents, and
/// SystemError naming what a file does not hold: an extent, a block of which bytes are wanted, or a range
/// with so many blocks that their number alone takes memory. So no length beyond a file's end is cut into
/// transfers.
ReadPlan make_read_plan(const ReadRequest& request);

/// Throws SystemError naming the first extent, in the caller's order, that a file of this size does not hold:
/// the caller knows extents, not transfers.
void require_inside(const std::vector<Extent>& extents, size_t file, const std::string& path, int64_t size);

}  // namespace ckpt_fast
