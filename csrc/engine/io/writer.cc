// SPDX-License-Identifier: Apache-2.0
#include "engine/io/writer.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <memory>
#include <mutex>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/parallel.h"
#include "engine/checksum/checksum.h"
#include "engine/checksum/stream_digests.h"
#include "engine/io/chunk_image.h"
#include "engine/memory/buffer_pool.h"

namespace ckpt_fast {

namespace {

/// A range of a file's image, the unit of work of one thread.
struct Chunk {
  size_t file;
  int64_t begin;
  int64_t end;

  int64_t nbytes() const { return end - begin; }
};

/// A file's state: open from its first chunk to its last, and published with all others at the end.
struct OpenFile {
  std::mutex opening;
  std::unique_ptr<OutputFile> output;
  std::atomic<int64_t> chunks_left{0};
  std::atomic<uint32_t> crc{0};
};

class WriteJob {
 public:
  explicit WriteJob(const WriteRequest& request)
      : request_(request),
        plan_(make_write_plan(request)),
        digests_(plan_.stream_nbytes),
        block_crcs_(plan_.block_count),
        open_files_(plan_.files.size()),
        chunks_(cut_chunks()) {}

  WriteResult run();

 private:
  std::vector<Chunk> cut_chunks();
  void write_chunk(const Chunk& chunk);
  void require_going_on(size_t file) const;
  OutputFile& output_of(size_t file);
  void finish_file(size_t file);
  void publish_files();

  template <typename Action>
  void for_each_supplied(const Chunk& chunk, Action&& action) const;
  void wait_for_pieces(const Chunk& chunk) const;
  void release_pieces(const Chunk& chunk) const;
  std::vector<Piece>::const_iterator first_piece(const Chunk& chunk) const;

  void fill(const Chunk& chunk, ChunkImage* image);
  void append(const Piece& piece, int64_t begin, int64_t end, bool patched, ChunkImage* image);
  bool is_patched(size_t file, int64_t begin, int64_t end) const;
  bool apply_patches(const Chunk& chunk, ChunkImage* image);

  const WriteRequest& request_;
  const WritePlan plan_;
  StreamDigests digests_;
  std::vector<std::atomic<uint32_t>> block_crcs_;
  std::vector<OpenFile> open_files_;
  const std::vector<Chunk> chunks_;
};

/// As many files concurrently as there are threads (a file system may serialize the writers of one file), and
/// no more, to keep the number of open descriptors small. Within a file the order is by offset, which makes
/// waiting for a stream safe: the chunks that hold its bytes were taken earlier.
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
  const PoolUse pool_use;
  // A direct write does not occupy the processor until it is done: with three threads per granted one, one
  // can fill its buffer while two wait, which keeps the device's queue from running empty.
  const bool direct = !chunks_.empty() && output_of(chunks_.front().file).direct();
  parallel_for(
      chunks_.size(), direct ? 3 * request_.threads : request_.threads,
      [this](size_t i) { write_chunk(chunks_[i]); },
      [this] {
        digests_.abandon();
        if (request_.supply != nullptr) request_.supply->end();
      });
  publish_files();
  WriteResult result{digests_.crcs(), {}, {block_crcs_.begin(), block_crcs_.end()}};
  for (const OpenFile& file : open_files_) result.file_crcs.push_back(file.crc);
  return result;
}

void WriteJob::require_going_on(size_t file) const {
  if (request_.progress != nullptr && request_.progress->stopped()) {
    throw_file_error("write", plan_.files[file].path, ECANCELED);
  }
}

OutputFile& WriteJob::output_of(size_t file) {
  OpenFile& state = open_files_[file];
  const std::lock_guard<std::mutex> lock(state.opening);
  if (!state.output) {
    require_going_on(file);
    const PlannedFile& planned = plan_.files[file];
    state.output = std::make_unique<OutputFile>(planned.path, planned.nbytes, request_.direct);
  }
  return *state.output;
}

void WriteJob::finish_file(size_t file) {
  require_going_on(file);
  OutputFile& output = *open_files_[file].output;
  if (request_.fsync) output.sync();
  output.close();
}

/// Called when all files are complete. Once the job is stopped, no more files are renamed: another save may
/// own the names.
void WriteJob::publish_files() {
  Progress* const progress = request_.progress;
  for (size_t file = 0; file < open_files_.size(); ++file) {
    if (progress != nullptr && !progress->begin_rename()) require_going_on(file);
    try {
      open_files_[file].output->publish();
    } catch (...) {
      if (progress != nullptr) progress->end_rename();
      throw;
    }
    if (progress != nullptr) progress->end_rename();
  }
}

void WriteJob::write_chunk(const Chunk& chunk) {
  Progress* const progress = request_.progress;
  require_going_on(chunk.file);
  OutputFile& output = output_of(chunk.file);
  if (chunk.nbytes() > 0) {
    const Buffer buffer(static_cast<size_t>(request_.chunk_nbytes));
    ChunkImage image(buffer.data(), output.direct() ? ChunkImage::Mode::kFlat : ChunkImage::Mode::kGather);
    wait_for_pieces(chunk);
    fill(chunk, &image);
    if (!apply_patches(chunk, &image)) return;
    output.write(image.parts(), chunk.nbytes(), chunk.begin);
    release_pieces(chunk);
    if (progress != nullptr) progress->add(chunk.nbytes());
    const int64_t behind = plan_.files[chunk.file].nbytes - chunk.end;
    open_files_[chunk.file].crc ^= crc32_shift(image.crc(), static_cast<uint64_t>(behind));
  }
  if (--open_files_[chunk.file].chunks_left == 0) finish_file(chunk.file);
}

/// The first piece that ends behind the chunk's beginning.
std::vector<Piece>::const_iterator WriteJob::first_piece(const Chunk& chunk) const {
  const std::vector<Piece>& pieces = plan_.files[chunk.file].pieces;
  const auto ends_behind = [](int64_t position, const Piece& piece) { return position < piece.end(); };
  return std::upper_bound(pieces.begin(), pieces.end(), chunk.begin, ends_behind);
}

/// Calls action(batch, bytes of the chunk) for each of its pieces that comes with a batch.
template <typename Action>
void WriteJob::for_each_supplied(const Chunk& chunk, Action&& action) const {
  if (request_.supply == nullptr) return;
  const auto end = plan_.files[chunk.file].pieces.end();
  for (auto piece = first_piece(chunk); piece != end && piece->offset < chunk.end; ++piece) {
    const int64_t nbytes = std::min(piece->end(), chunk.end) - std::max(piece->offset, chunk.begin);
    if (piece->batch >= 0 && nbytes > 0) action(static_cast<size_t>(piece->batch), nbytes);
  }
}

/// Chunks are taken in the order of the batches, so those that are waited for find room.
void WriteJob::wait_for_pieces(const Chunk& chunk) const {
  for_each_supplied(chunk, [&](size_t batch, int64_t) {
    if (!request_.supply->wait_arrived(batch, request_.progress)) {
      throw_file_error("write", plan_.files[chunk.file].path, ECANCELED);
    }
  });
}

void WriteJob::release_pieces(const Chunk& chunk) const {
  for_each_supplied(chunk,
                    [&](size_t batch, int64_t nbytes) { request_.supply->add_written(batch, nbytes); });
}

/// Assembles the chunk's image, without its patches, and adds its parts to their streams.
void WriteJob::fill(const Chunk& chunk, ChunkImage* image) {
  const std::vector<Piece>& pieces = plan_.files[chunk.file].pieces;
  auto piece = first_piece(chunk);
  int64_t position = chunk.begin;
  for (; piece != pieces.end() && piece->offset < chunk.end; ++piece) {
    const int64_t begin = std::max(piece->offset, chunk.begin);
    const int64_t end = std::min(piece->end(), chunk.end);
    if (begin > position) image->append_zeros(static_cast<size_t>(begin - position));
    append(*piece, begin, end, is_patched(chunk.file, begin, end), image);
    position = end;
  }
  if (position < chunk.end) image->append_zeros(static_cast<size_t>(chunk.end - position));
}

/// Appends the piece's bytes between two positions of the file, block of its stream by block.
void WriteJob::append(const Piece& piece, int64_t begin, int64_t end, bool patched, ChunkImage* image) {
  const int64_t block_nbytes = request_.block_nbytes;
  while (begin < end) {
    int64_t cut = end;
    int64_t block_behind = 0;  // bytes of the block after this part
    size_t block = 0;
    if (piece.digest >= 0 && block_nbytes > 0) {
      const int64_t stream_nbytes = plan_.stream_nbytes[piece.digest];
      const int64_t at = stream_nbytes - piece.digest_behind - (piece.end() - begin);
      const int64_t block_end = std::min((at / block_nbytes + 1) * block_nbytes, stream_nbytes);
      cut = std::min(end, begin + (block_end - at));
      block_behind = block_end - at - (cut - begin);
      block = plan_.first_block[piece.digest] + static_cast<size_t>(at / block_nbytes);
    }
    const uint32_t crc =
        image->append(piece.source + (begin - piece.offset), static_cast<size_t>(cut - begin), patched);
    if (piece.digest >= 0) {
      // The block first: if the stream is seen complete, so are its blocks.
      if (block_nbytes > 0) block_crcs_[block] ^= crc32_shift(crc, static_cast<uint64_t>(block_behind));
      digests_.add(piece.digest, crc, cut - begin, piece.digest_behind + (piece.end() - cut));
    }
    begin = cut;
  }
}

/// The first patch that ends after `position`.
std::vector<Patch>::const_iterator patch_behind(const std::vector<Patch>& patches, int64_t position) {
  const auto ends_behind = [](int64_t at, const Patch& patch) { return at < patch.offset + kPatchNbytes; };
  return std::upper_bound(patches.begin(), patches.end(), position, ends_behind);
}

bool WriteJob::is_patched(size_t file, int64_t begin, int64_t end) const {
  const std::vector<Patch>& patches = plan_.files[file].patches;
  const auto patch = patch_behind(patches, begin);
  return patch != patches.end() && patch->offset < end;
}

/// Stores finished checksums; returns false if the job was abandoned while waiting for one. Call it after all
/// of the chunk's own bytes have been added: other chunks may be waiting for them.
bool WriteJob::apply_patches(const Chunk& chunk, ChunkImage* image) {
  const std::vector<Patch>& patches = plan_.files[chunk.file].patches;
  auto patch = patch_behind(patches, chunk.begin);
  for (; patch != patches.end() && patch->offset < chunk.end; ++patch) {
    if (!digests_.wait_complete(patch->digest)) return false;
    const uint32_t crc = digests_.crc(patch->digest);
    uint8_t bytes[kPatchNbytes];
    for (int i = 0; i < kPatchNbytes; ++i) bytes[i] = static_cast<uint8_t>(crc >> (8 * i));
    const int64_t begin = std::max(patch->offset, chunk.begin);  // a patch may straddle two chunks
    const int64_t end = std::min(patch->offset + kPatchNbytes, chunk.end);
    image->patch(static_cast<size_t>(begin - chunk.begin), bytes + (begin - patch->offset),
                 static_cast<size_t>(end - begin));
  }
  return true;
}

}  // namespace

WriteResult write_files(const WriteRequest& request) { return WriteJob(request).run(); }

}  // namespace ckpt_fast
