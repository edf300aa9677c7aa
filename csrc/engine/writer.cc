// SPDX-License-Identifier: Apache-2.0
#include "writer.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>

#include "buffer_pool.h"
#include "checksum.h"
#include "file.h"
#include "parallel.h"
#include "stream_digests.h"

namespace ckpt_fast {

namespace {

/// A range of a file's image, the unit of work of one thread.
struct Chunk {
  size_t file;
  int64_t begin;
  int64_t end;

  int64_t nbytes() const { return end - begin; }
};

/// A file's state while its chunks are being written: open from its first chunk to its last.
struct OpenFile {
  std::mutex opening;
  std::unique_ptr<OutputFile> output;
  std::atomic<int64_t> chunks_left{0};
  std::atomic<uint32_t> crc{0};
};

// Below this many bytes per piece, one more checksum pass over a chunk that is still in the cache is cheaper
// than combining its pieces' checksums.
constexpr int64_t kCombineThreshold = 16 << 10;

class WriteJob {
 public:
  explicit WriteJob(const WriteRequest& request)
      : request_(request),
        plan_(make_write_plan(request)),
        digests_(plan_.stream_nbytes),
        open_files_(plan_.files.size()),
        chunks_(cut_chunks()) {}

  WriteResult run();

 private:
  std::vector<Chunk> cut_chunks();
  void write_chunk(const Chunk& chunk);
  OutputFile& output_of(size_t file);
  void finish_file(size_t file);

  uint32_t fill(const Chunk& chunk, Store store, uint8_t* image);
  uint32_t copy_piece(const Piece& piece, const Chunk& chunk, Store store, uint8_t* image);
  bool apply_patches(const Chunk& chunk, uint8_t* image, bool* patched);

  const WriteRequest& request_;
  const WritePlan plan_;
  StreamDigests digests_;
  std::vector<OpenFile> open_files_;
  const std::vector<Chunk> chunks_;
};

/// As many files side by side as there are threads (a file system may serialize the writers of one file),
/// and not more, so that open descriptors stay few. Within a file the order is by offset, which is what makes
/// waiting for a stream safe: the chunks that hold its bytes have been taken earlier.
std::vector<Chunk> WriteJob::cut_chunks() {
  std::vector<Chunk> chunks;
  const size_t window = static_cast<size_t>(request_.threads);
  for (size_t first = 0; first < plan_.files.size(); first += window) {
    const size_t last = std::min(first + window, plan_.files.size());
    bool more = true;
    for (int64_t begin = 0; more; begin += request_.chunk_nbytes) {
      more = false;
      for (size_t file = first; file < last; ++file) {
        const int64_t nbytes = plan_.files[file].nbytes;
        if (begin >= nbytes && begin > 0) continue;  // an empty file has one empty chunk, which creates it
        const int64_t end = std::min(begin + request_.chunk_nbytes, nbytes);
        chunks.push_back({file, begin, end});
        ++open_files_[file].chunks_left;
        more = more || end < nbytes;
      }
    }
  }
  return chunks;
}

WriteResult WriteJob::run() {
  parallel_for(
      chunks_.size(), request_.threads, [this](size_t i) { write_chunk(chunks_[i]); },
      [this] { digests_.abandon(); });
  WriteResult result{digests_.crcs(), {}};
  for (const OpenFile& file : open_files_) result.file_crcs.push_back(file.crc);
  return result;
}

OutputFile& WriteJob::output_of(size_t file) {
  OpenFile& state = open_files_[file];
  const std::lock_guard<std::mutex> lock(state.opening);
  if (!state.output) {
    const PlannedFile& planned = plan_.files[file];
    state.output = std::make_unique<OutputFile>(planned.path, planned.nbytes, request_.direct);
  }
  return *state.output;
}

void WriteJob::finish_file(size_t file) {
  OutputFile& output = *open_files_[file].output;
  if (request_.fsync) output.sync();
  output.close();
}

void WriteJob::write_chunk(const Chunk& chunk) {
  OutputFile& output = output_of(chunk.file);
  if (chunk.nbytes() > 0) {
    const Buffer buffer(static_cast<size_t>(request_.chunk_nbytes));
    uint8_t* const image = buffer.data();
    uint32_t crc = fill(chunk, output.direct() ? Store::kStreaming : Store::kCached, image);
    bool patched = false;
    if (!apply_patches(chunk, image, &patched)) return;
    if (patched) crc = crc32(image, static_cast<size_t>(chunk.nbytes()));
    output.write(image, chunk.nbytes(), chunk.begin);
    open_files_[chunk.file].crc ^= crc32_shift(crc, plan_.files[chunk.file].nbytes - chunk.end);
  }
  if (--open_files_[chunk.file].chunks_left == 0) finish_file(chunk.file);
}

/// Builds the chunk's image without its patches and returns the image's CRC-32.
uint32_t WriteJob::fill(const Chunk& chunk, Store store, uint8_t* image) {
  const std::vector<Piece>& pieces = plan_.files[chunk.file].pieces;
  const auto ends_before = [](int64_t position, const Piece& piece) { return position < piece.end(); };
  const auto first = std::upper_bound(pieces.begin(), pieces.end(), chunk.begin, ends_before);
  const auto begins_before = [](const Piece& piece, int64_t position) { return piece.offset < position; };
  const auto last = std::lower_bound(first, pieces.end(), chunk.end, begins_before);

  bool combine = (last - first) * kCombineThreshold <= chunk.nbytes();
  uint32_t crc = 0;
  int64_t position = chunk.begin;
  for (auto piece = first; piece != last; ++piece) {
    const int64_t begin = std::max(piece->offset, chunk.begin);
    const int64_t end = std::min(piece->end(), chunk.end);
    if (begin > position) {
      std::memset(image + (position - chunk.begin), 0, static_cast<size_t>(begin - position));
      combine = false;
    }
    const uint32_t part = copy_piece(*piece, chunk, store, image);
    if (combine) crc = crc32_combine(crc, part, static_cast<uint64_t>(end - begin));
    position = std::max(position, end);
  }
  if (position < chunk.end) {
    std::memset(image + (position - chunk.begin), 0, static_cast<size_t>(chunk.end - position));
    combine = false;
  }
  return combine ? crc : crc32(image, static_cast<size_t>(chunk.nbytes()));
}

/// Copies the part of a piece that lies in the chunk and accounts for it; returns its CRC-32.
uint32_t WriteJob::copy_piece(const Piece& piece, const Chunk& chunk, Store store, uint8_t* image) {
  const int64_t begin = std::max(piece.offset, chunk.begin);
  const int64_t end = std::min(piece.end(), chunk.end);
  const int64_t nbytes = std::max<int64_t>(end - begin, 0);
  const uint32_t crc = copy_crc32(image + (begin - chunk.begin), piece.source + (begin - piece.offset),
                                  static_cast<size_t>(nbytes), 0, store);
  if (piece.digest >= 0 && nbytes > 0) {
    digests_.add(piece.digest, crc, nbytes, piece.digest_behind + (piece.end() - end));
  }
  return crc;
}

/// Stores finished checksums; false when the job was abandoned while waiting for one. Call it when all of
/// the chunk's own bytes are accounted for: other chunks may be waiting for them.
bool WriteJob::apply_patches(const Chunk& chunk, uint8_t* image, bool* patched) {
  const std::vector<Patch>& patches = plan_.files[chunk.file].patches;
  const auto ends_before = [](int64_t position, const Patch& patch) {
    return position < patch.offset + kPatchNbytes;
  };
  auto patch = std::upper_bound(patches.begin(), patches.end(), chunk.begin, ends_before);
  for (; patch != patches.end() && patch->offset < chunk.end; ++patch) {
    if (!digests_.wait_complete(patch->digest)) return false;
    const uint32_t crc = digests_.crc(patch->digest);
    for (int64_t i = 0; i < kPatchNbytes; ++i) {
      const int64_t position = patch->offset + i;  // a patch may straddle two chunks
      if (position < chunk.begin || position >= chunk.end) continue;
      image[position - chunk.begin] = static_cast<uint8_t>(crc >> (8 * i));
    }
    *patched = true;
  }
  return true;
}

}  // namespace

WriteResult write_files(const WriteRequest& request) { return WriteJob(request).run(); }

}  // namespace ckpt_fast
