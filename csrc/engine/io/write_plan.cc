// SPDX-License-Identifier: Apache-2.0
#include "engine/io/write_plan.h"

#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <unordered_set>

#include "engine/base/file.h"

namespace ckpt_fast {

namespace {

using std::to_string;

void check_range(const char* kind, size_t row, int64_t offset, int64_t nbytes, int64_t file_nbytes) {
  if (offset < 0 || nbytes < 0 || nbytes > file_nbytes || offset > file_nbytes - nbytes) {
    refuse(kind, row,
           to_string(nbytes) + " bytes at " + to_string(offset) + " are outside its file of " +
               to_string(file_nbytes) + " bytes");
  }
}

void check_file(const char* kind, size_t row, int64_t file, size_t file_count) {
  if (file < 0 || file >= static_cast<int64_t>(file_count)) {
    refuse(kind, row, "file " + to_string(file) + " is not one of " + to_string(file_count));
  }
}

void check_digest(const char* kind, size_t row, int64_t digest, int64_t lowest, int64_t digest_count) {
  if (digest < lowest || digest >= digest_count) {
    refuse(kind, row, "digest " + to_string(digest) + " is not one of " + to_string(digest_count));
  }
}

void add_files(const WriteRequest& request, WritePlan* plan) {
  if (request.file_nbytes.size != request.paths.size()) {
    throw std::invalid_argument("file columns differ in length: " + to_string(request.paths.size()) +
                                " and " + to_string(request.file_nbytes.size));
  }
  std::unordered_set<std::string> seen;
  for (size_t row = 0; row < request.paths.size(); ++row) {
    if (request.file_nbytes[row] < 0) refuse("file", row, "negative size");
    if (!seen.insert(request.paths[row]).second) refuse("file", row, "its path occurs twice");
    plan->files.push_back({request.paths[row], request.file_nbytes[row], {}, {}});
  }
}

/// The end of each stream, which its patch must follow.
struct StreamEnd {
  int64_t file = -1;
  int64_t offset = 0;
};

int64_t batch_of(const WriteRequest& request, size_t row) {
  if (request.supply == nullptr) return -1;
  const int64_t batch = request.piece_batch[row];
  const auto count = static_cast<int64_t>(request.supply->batch_count());
  if (batch < -1 || batch >= count) {
    refuse("piece", row, "batch " + to_string(batch) + " is not one of " + to_string(count));
  }
  return batch;
}

std::vector<StreamEnd> add_pieces(const WriteRequest& request, WritePlan* plan) {
  std::vector<StreamEnd> ends(plan->stream_nbytes.size());
  int64_t last_file = 0;
  int64_t last_end = 0;
  for (size_t row = 0; row < request.piece_file.size; ++row) {
    const int64_t file = request.piece_file[row];
    const int64_t digest = request.piece_digest[row];
    check_file("piece", row, file, plan->files.size());
    PlannedFile& planned = plan->files[file];
    const Piece piece{request.piece_offset[row],
                      request.piece_nbytes[row],
                      reinterpret_cast<const uint8_t*>(request.piece_address[row]),
                      digest,
                      0,
                      batch_of(request, row)};
    check_range("piece", row, piece.offset, piece.nbytes, planned.nbytes);
    check_digest("piece", row, digest, -1, request.digest_count);
    if (file < last_file || (file == last_file && piece.offset < last_end)) {
      refuse("piece", row, "begins before the piece ahead of it ends; pieces go by file and offset");
    }
    if (digest >= 0) {
      if (ends[digest].file >= 0 && ends[digest].file != file) {
        refuse("piece", row, "digest " + to_string(digest) + " began in another file");
      }
      ends[digest] = {file, piece.end()};
      plan->stream_nbytes[digest] += piece.nbytes;
    }
    planned.pieces.push_back(piece);
    last_file = file;
    last_end = piece.end();
  }
  return ends;
}

void count_digest_behind(WritePlan* plan) {
  std::vector<int64_t> missing = plan->stream_nbytes;
  for (PlannedFile& file : plan->files) {
    for (Piece& piece : file.pieces) {
      if (piece.digest < 0) continue;
      piece.digest_behind = missing[piece.digest] -= piece.nbytes;
    }
  }
}

void number_blocks(int64_t block_nbytes, WritePlan* plan) {
  if (block_nbytes == 0) return;
  for (const int64_t nbytes : plan->stream_nbytes) {
    plan->first_block.push_back(plan->block_count);
    plan->block_count += static_cast<size_t>((nbytes + block_nbytes - 1) / block_nbytes);
  }
}

void add_patches(const WriteRequest& request, const std::vector<StreamEnd>& ends, WritePlan* plan) {
  for (size_t row = 0; row < request.patch_file.size; ++row) {
    const int64_t file = request.patch_file[row];
    const Patch patch{request.patch_offset[row], request.patch_digest[row]};
    check_file("patch", row, file, plan->files.size());
    PlannedFile& planned = plan->files[file];
    check_range("patch", row, patch.offset, kPatchNbytes, planned.nbytes);
    check_digest("patch", row, patch.digest, 0, request.digest_count);
    const StreamEnd& end = ends[patch.digest];
    if (end.file >= 0 && (end.file != file || patch.offset < end.offset)) {
      refuse("patch", row, "does not lie behind the end of digest " + to_string(patch.digest));
    }
    planned.patches.push_back(patch);
  }
  for (PlannedFile& file : plan->files) {
    const auto by_offset = [](const Patch& a, const Patch& b) { return a.offset < b.offset; };
    std::sort(file.patches.begin(), file.patches.end(), by_offset);
    for (size_t i = 1; i < file.patches.size(); ++i) {
      if (file.patches[i].offset < file.patches[i - 1].offset + kPatchNbytes) {
        throw std::invalid_argument("patches overlap at " + to_string(file.patches[i].offset) + " of " +
                                    file.path);
      }
    }
  }
}

}  // namespace

void refuse(const char* kind, size_t row, const std::string& why) {
  throw std::invalid_argument(std::string(kind) + " " + to_string(row) + ": " + why);
}

void check_lengths(const char* kind, std::initializer_list<Column> columns) {
  for (const Column& column : columns) {
    if (column.size != columns.begin()->size) {
      throw std::invalid_argument(std::string(kind) + " columns differ in length: " +
                                  to_string(columns.begin()->size) + " and " + to_string(column.size));
    }
  }
}

void check_job(int threads, int64_t chunk_nbytes) {
  if (threads < 1) throw std::invalid_argument("threads is " + to_string(threads) + ", not at least 1");
  if (chunk_nbytes < kDirectAlignment || chunk_nbytes % kDirectAlignment != 0) {
    throw std::invalid_argument("chunk_bytes is " + to_string(chunk_nbytes) +
                                ", not a positive multiple of 4096");
  }
}

WritePlan make_write_plan(const WriteRequest& request) {
  check_job(request.threads, request.chunk_nbytes);
  check_lengths("piece", {request.piece_file, request.piece_offset, request.piece_nbytes,
                          request.piece_address, request.piece_digest});
  if (request.supply != nullptr) check_lengths("piece", {request.piece_file, request.piece_batch});
  check_lengths("patch", {request.patch_file, request.patch_offset, request.patch_digest});
  if (request.digest_count < 0) throw std::invalid_argument("digest_count is negative");
  if (request.block_nbytes < 0) throw std::invalid_argument("block_bytes is negative");
  WritePlan plan;
  plan.stream_nbytes.assign(static_cast<size_t>(request.digest_count), 0);
  add_files(request, &plan);
  const std::vector<StreamEnd> ends = add_pieces(request, &plan);
  count_digest_behind(&plan);
  number_blocks(request.block_nbytes, &plan);
  add_patches(request, ends, &plan);
  return plan;
}

}  // namespace ckpt_fast
