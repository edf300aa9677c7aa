// SPDX-License-Identifier: Apache-2.0
// A checked read request, regrouped into few transfers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "column.h"

namespace ckpt_fast {

struct ReadRequest {
  std::vector<std::string> paths;
  Column extent_file, extent_offset, extent_nbytes, extent_address, extent_digest;
  int64_t digest_count = 0;
  int threads = 1;
  int64_t chunk_nbytes = 0;
  bool direct = false;
};

/// Bytes of a file and the memory they go to.
struct Extent {
  size_t row;  // in the request
  int64_t file;
  int64_t offset;
  int64_t nbytes;
  uint8_t* destination;
  int64_t digest;         // the stream they belong to, or -1
  int64_t digest_behind;  // bytes of that stream after this extent

  int64_t end() const { return offset + nbytes; }
};

/// One transfer: a range of a file that is read at once and holds (parts of) extents first … last - 1, with
/// short gaps between them.
struct Transfer {
  size_t file;
  int64_t begin;
  int64_t end;
  size_t first;
  size_t last;
  bool disjoint;  // no byte belongs to two extents
};

/// The longest gap that is read rather than left out.
constexpr int64_t kLongestGap = 64 << 10;

struct ReadPlan {
  std::vector<Extent> extents;  // by file and offset; they may overlap
  std::vector<Transfer> transfers;
  std::vector<int64_t> stream_nbytes;
  bool direct = false;  // asked for, and worth it
};

/// Throws std::invalid_argument naming the first row that breaks the contract of read_extents, and what
/// require_inside throws: lengths that no file has are not cut into transfers.
ReadPlan make_read_plan(const ReadRequest& request);

/// Throws SystemError naming the first row, as given, that a file of this size does not hold: the caller
/// knows rows, not transfers.
void require_inside(const std::vector<Extent>& extents, size_t file, const std::string& path, int64_t size);

}  // namespace ckpt_fast
