// SPDX-License-Identifier: Apache-2.0
// A checked write request: the contents of each file, and the sources and targets of each checksum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "engine/base/column.h"
#include "engine/base/progress.h"
#include "engine/base/supply.h"

namespace ckpt_fast {

struct WriteRequest {
  std::vector<std::string> paths;
  Column file_nbytes;
  Column piece_file, piece_offset, piece_nbytes, piece_address, piece_digest;
  Column patch_file, patch_offset, patch_digest;
  int64_t digest_count = 0;
  int threads = 1;
  int64_t chunk_nbytes = 0;
  bool direct = false;
  bool fsync = false;
  Progress* progress = nullptr;
  int64_t block_nbytes = 0;  // 0: no block digests
  Column piece_batch = {};   // with a supply: the batch each piece comes with, or -1
  Supply* supply = nullptr;
};

/// Bytes of memory and their position in a file.
struct Piece {
  int64_t offset;
  int64_t nbytes;
  const uint8_t* source;
  int64_t digest;         // the stream they belong to, or -1
  int64_t digest_behind;  // bytes of that stream after this piece
  int64_t batch;          // of the supply, or -1: it is there from the beginning

  int64_t end() const { return offset + nbytes; }
};

/// Four bytes that receive a stream's CRC-32.
struct Patch {
  int64_t offset;
  int64_t digest;
};

struct PlannedFile {
  std::string path;
  int64_t nbytes;
  std::vector<Piece> pieces;   // by offset, disjoint
  std::vector<Patch> patches;  // by offset, disjoint
};

struct WritePlan {
  std::vector<PlannedFile> files;
  std::vector<int64_t> stream_nbytes;
  std::vector<size_t> first_block;  // of each stream; empty without block digests
  size_t block_count = 0;
};

constexpr int64_t kPatchNbytes = 4;

/// Throws std::invalid_argument naming the first row that breaks the contract of write_files.
WritePlan make_write_plan(const WriteRequest& request);

/// Throws std::invalid_argument naming a row of a table.
[[noreturn]] void refuse(const char* kind, size_t row, const std::string& why);

/// Throws std::invalid_argument unless all columns of a table have one entry per row.
void check_lengths(const char* kind, std::initializer_list<Column> columns);

/// Throws std::invalid_argument unless `threads` and `chunk_nbytes` are valid.
void check_job(int threads, int64_t chunk_nbytes);

}  // namespace ckpt_fast
