// SPDX-License-Identifier: Apache-2.0
#include "engine/io/reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <mutex>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/base/parallel.h"
#include "engine/checksum/checksum.h"
#include "engine/checksum/stream_digests.h"
#include "engine/memory/buffer_pool.h"

namespace ckpt_fast {

namespace {

/// A file's state while it is being read: open from its first transfer to its last.
struct OpenFile {
  std::mutex opening;
  std::unique_ptr<InputFile> input;
  std::atomic<int64_t> transfers_left{0};
};

/// Used instead of a block's number.
constexpr size_t kNoBlock = static_cast<size_t>(-1);

std::vector<int64_t> block_sizes(const ReadPlan& plan) {
  std::vector<int64_t> sizes;
  for (const Block& block : plan.blocks) sizes.push_back(block.nbytes);
  return sizes;
}

class ReadJob {
 public:
  explicit ReadJob(const ReadRequest& request)
      : request_(request),
        plan_(make_read_plan(request)),
        digests_(block_sizes(plan_)),
        open_files_(request.paths.size()) {
    for (const Transfer& transfer : plan_.transfers) ++open_files_[transfer.file].transfers_left;
  }

  std::vector<int64_t> run();

 private:
  void require_going_on(const Transfer& transfer) const;
  InputFile& input_of(size_t file);
  void read_in_place(const Transfer& transfer, InputFile& input);
  void read_through_buffer(const Transfer& transfer, InputFile& input);
  template <typename Visit>
  void for_each_part(const Transfer& transfer, Visit&& visit) const;
  template <typename Visit>
  void for_each_piece(const Transfer& transfer, Visit&& visit) const;
  template <typename Visit>
  void for_each_block_part(const Transfer& transfer, Visit&& visit) const;
  void add(size_t block, uint32_t crc, int64_t begin, int64_t end);

  const ReadRequest& request_;
  const ReadPlan plan_;
  StreamDigests digests_;  // of plan_.blocks
  std::vector<OpenFile> open_files_;
};

std::vector<int64_t> ReadJob::run() {
  const PoolUse pool_use;
  // As in the writer: a thread can copy out of its buffer while others wait for the device, which benefits
  // from even more concurrent requests when reading.
  const bool direct = !plan_.transfers.empty() && input_of(plan_.transfers.front().file).direct();
  parallel_for(plan_.transfers.size(), direct ? 4 * request_.threads : request_.threads, [this](size_t i) {
    const Transfer& transfer = plan_.transfers[i];
    require_going_on(transfer);
    InputFile& input = input_of(transfer.file);
    if (transfer.scatters && !input.direct()) {
      read_in_place(transfer, input);
    } else {
      read_through_buffer(transfer, input);
    }
    if (request_.progress != nullptr) request_.progress->add(transfer.end - transfer.begin);
    OpenFile& state = open_files_[transfer.file];
    if (--state.transfers_left == 0) state.input.reset();
  });
  std::vector<int64_t> crcs(plan_.block_count, -1);
  for (size_t i = 0; i < plan_.blocks.size(); ++i) {
    crcs[plan_.blocks[i].index] = digests_.crc(static_cast<int64_t>(i));
  }
  return crcs;
}

void ReadJob::require_going_on(const Transfer& transfer) const {
  if (request_.progress != nullptr && request_.progress->stopped()) {
    throw_file_error("read", request_.paths[transfer.file], ECANCELED);
  }
}

InputFile& ReadJob::input_of(size_t file) {
  OpenFile& state = open_files_[file];
  const std::lock_guard<std::mutex> lock(state.opening);
  if (!state.input) {
    auto input = std::make_unique<InputFile>(request_.paths[file], plan_.direct);
    require_inside(plan_.extents, file, input->path(), input->size());
    state.input = std::move(input);
  }
  return *state.input;
}

/// One scattering read puts every wanted byte in place, and the bytes between extents into scratch memory.
void ReadJob::read_in_place(const Transfer& transfer, InputFile& input) {
  uint8_t aside[kLongestGap];
  std::vector<iovec> parts;
  int64_t position = transfer.begin;
  for_each_part(transfer, [&](const Extent& extent, int64_t begin, int64_t end) {
    if (begin > position) parts.push_back({aside, static_cast<size_t>(begin - position)});
    parts.push_back({extent.destination + (begin - extent.offset), static_cast<size_t>(end - begin)});
    position = end;
  });
  input.read(std::move(parts), position - transfer.begin, transfer.begin);
  for_each_piece(transfer, [&](const Extent& extent, int64_t begin, int64_t end, size_t block) {
    if (block == kNoBlock) return;
    const uint8_t* const bytes = extent.destination + (begin - extent.offset);
    add(block, crc32(bytes, static_cast<size_t>(end - begin)), begin, end);
  });
}

void ReadJob::read_through_buffer(const Transfer& transfer, InputFile& input) {
  const int64_t base = transfer.begin / kDirectAlignment * kDirectAlignment;
  const Buffer buffer(static_cast<size_t>(request_.chunk_nbytes));
  const int64_t wanted = transfer.end - base;
  const int64_t whole = (wanted + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment;
  input.read({{buffer.data(), static_cast<size_t>(whole)}}, wanted, base);
  if (transfer.scatters) {
    for_each_piece(transfer, [&](const Extent& extent, int64_t begin, int64_t end, size_t block) {
      uint8_t* const destination = extent.destination + (begin - extent.offset);
      const uint8_t* const source = buffer.data() + (begin - base);
      const auto nbytes = static_cast<size_t>(end - begin);
      if (block == kNoBlock) {
        std::memcpy(destination, source, nbytes);
      } else {
        add(block, copy_crc32(destination, source, nbytes), begin, end);
      }
    });
    return;
  }
  for_each_block_part(transfer, [&](size_t block, int64_t begin, int64_t end) {
    add(block, crc32(buffer.data() + (begin - base), static_cast<size_t>(end - begin)), begin, end);
  });
  for_each_part(transfer, [&](const Extent& extent, int64_t begin, int64_t end) {
    std::memcpy(extent.destination + (begin - extent.offset), buffer.data() + (begin - base),
                static_cast<size_t>(end - begin));
  });
}

/// Calls visit(extent, begin, end) for each extent's part of the transfer, by offset.
template <typename Visit>
void ReadJob::for_each_part(const Transfer& transfer, Visit&& visit) const {
  for (size_t i = transfer.first; i < transfer.last; ++i) {
    const Extent& extent = plan_.extents[i];
    const int64_t begin = std::max(extent.offset, transfer.begin);
    const int64_t end = std::min(extent.end(), transfer.end);
    if (begin < end) visit(extent, begin, end);
  }
}

/// Calls visit(extent, begin, end, block) for each part of an extent inside one block or, with kNoBlock,
/// between blocks. The transfer scatters: extents are disjoint, so one sweep over both finds all parts.
template <typename Visit>
void ReadJob::for_each_piece(const Transfer& transfer, Visit&& visit) const {
  size_t block = transfer.first_block;
  for_each_part(transfer, [&](const Extent& extent, int64_t begin, int64_t end) {
    while (begin < end) {
      while (block < transfer.last_block && plan_.blocks[block].end() <= begin) ++block;
      const bool any = block < transfer.last_block;
      const bool inside = any && plan_.blocks[block].offset <= begin;
      const int64_t limit = inside ? plan_.blocks[block].end() : any ? plan_.blocks[block].offset : end;
      const int64_t cut = std::min(end, limit);
      visit(extent, begin, cut, inside ? block : kNoBlock);
      begin = cut;
    }
  });
}

/// Calls visit(block, begin, end) for each block's part of the transfer, by offset.
template <typename Visit>
void ReadJob::for_each_block_part(const Transfer& transfer, Visit&& visit) const {
  for (size_t i = transfer.first_block; i < transfer.last_block; ++i) {
    const int64_t begin = std::max(plan_.blocks[i].offset, transfer.begin);
    const int64_t end = std::min(plan_.blocks[i].end(), transfer.end);
    if (begin < end) visit(i, begin, end);
  }
}

void ReadJob::add(size_t block, uint32_t crc, int64_t begin, int64_t end) {
  digests_.add(static_cast<int64_t>(block), crc, end - begin, plan_.blocks[block].end() - end);
}

}  // namespace

std::vector<int64_t> read_extents(const ReadRequest& request) { return ReadJob(request).run(); }

}  // namespace ckpt_fast
