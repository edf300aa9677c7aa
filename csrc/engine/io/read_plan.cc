// SPDX-License-Identifier: Apache-2.0
#include "engine/io/read_plan.h"

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>

#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/io/write_plan.h"

namespace ckpt_fast {

namespace {

using std::to_string;

// Buffered reads are checked after they complete; this much is still in the CPU cache by then.
constexpr int64_t kCacheHot = 1 << 20;

// Reading this many unwanted bytes costs less than a system call that avoids it.
constexpr int64_t kFreeGap = 512;
// Longer gaps are read as long as their sum is at most this fraction of the wanted bytes around them.
constexpr int64_t kGapShare = 16;

// Transfers shorter on average than this fraction of a chunk are faster through the page cache, which reads
// each page once and reads ahead.
constexpr int64_t kDirectShare = 32;

// Results for this many blocks, 8 MiB, are made for ranges that end behind their files.
constexpr int64_t kFreeBlocks = 1 << 20;

void check_row(const char* kind, size_t row, int64_t file, size_t file_count, int64_t offset,
               int64_t nbytes) {
  if (file < 0 || file >= static_cast<int64_t>(file_count)) {
    refuse(kind, row, "file " + to_string(file) + " is not one of " + to_string(file_count));
  }
  if (offset < 0 || nbytes < 0 || offset > std::numeric_limits<int64_t>::max() - kDirectAlignment - nbytes) {
    refuse(kind, row, to_string(nbytes) + " bytes at " + to_string(offset) + " are not a valid range");
  }
}

template <typename Range>
void sort_by_place(std::vector<Range>* ranges) {
  std::stable_sort(ranges->begin(), ranges->end(), [](const Range& a, const Range& b) {
    return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
  });
}

void add_extents(const ReadRequest& request, ReadPlan* plan) {
  for (size_t row = 0; row < request.extent_file.size; ++row) {
    const Extent extent{row, request.extent_file[row], request.extent_offset[row], request.extent_nbytes[row],
                        reinterpret_cast<uint8_t*>(request.extent_address[row])};
    check_row("extent", row, extent.file, request.paths.size(), extent.offset, extent.nbytes);
    plan->extents.push_back(extent);
  }
  sort_by_place(&plan->extents);
}

/// A range with one checksum per `block_nbytes` bytes.
struct CheckedRange {
  size_t row;  // in the request
  int64_t file;
  int64_t offset;
  int64_t nbytes;
  int64_t block_nbytes;
  size_t first_block;

  int64_t end() const { return offset + nbytes; }
  int64_t count() const { return (nbytes - 1) / block_nbytes + 1; }
  Block block(int64_t number) const {
    const int64_t begin = number * block_nbytes;
    return {file, offset + begin, std::min(block_nbytes, nbytes - begin),
            first_block + static_cast<size_t>(number)};
  }
};

std::vector<CheckedRange> checked_ranges(const ReadRequest& request, ReadPlan* plan) {
  std::vector<CheckedRange> ranges;
  for (size_t row = 0; row < request.range_file.size; ++row) {
    const CheckedRange range{row,
                             request.range_file[row],
                             request.range_offset[row],
                             request.range_nbytes[row],
                             request.range_block[row],
                             plan->block_count};
    check_row("range", row, range.file, request.paths.size(), range.offset, range.nbytes);
    if (range.block_nbytes < 1) refuse("range", row, "its blocks have no bytes");
    if (range.nbytes == 0) continue;
    const size_t most = std::numeric_limits<size_t>::max();
    plan->block_count += std::min(static_cast<size_t>(range.count()), most - plan->block_count);
    ranges.push_back(range);
  }
  sort_by_place(&ranges);
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].file == ranges[i - 1].file && ranges[i].offset < ranges[i - 1].end()) {
      refuse("range", ranges[i].row, "overlaps range " + to_string(ranges[i - 1].row));
    }
  }
  return ranges;
}

/// Collects the blocks that extents touch. Extents and ranges are sorted by place, so one sweep finds them.
void add_blocks(const std::vector<CheckedRange>& ranges, ReadPlan* plan) {
  size_t first = 0;  // the first range that this or a later extent may touch
  size_t range_of_next = 0;
  int64_t next = 0;  // earlier blocks of that range have been handled
  for (const Extent& extent : plan->extents) {
    if (extent.nbytes == 0) continue;
    const auto is_before = [&](const CheckedRange& range) {
      return range.file < extent.file || (range.file == extent.file && range.end() <= extent.offset);
    };
    while (first < ranges.size() && is_before(ranges[first])) ++first;
    for (size_t i = first; i < ranges.size(); ++i) {
      const CheckedRange& range = ranges[i];
      if (range.file != extent.file || range.offset >= extent.end()) break;
      if (i > range_of_next) range_of_next = i, next = 0;
      if (i < range_of_next) continue;  // an earlier extent reached beyond it
      const int64_t last = (std::min(extent.end(), range.end()) - 1 - range.offset) / range.block_nbytes;
      const int64_t begin = std::max<int64_t>(extent.offset - range.offset, 0) / range.block_nbytes;
      for (next = std::max(next, begin); next <= last; ++next) plan->blocks.push_back(range.block(next));
    }
  }
}

bool are_disjoint(const std::vector<Extent>& extents, size_t first, size_t last) {
  int64_t end = 0;
  for (size_t i = first; i < last; ++i) {
    if (extents[i].nbytes > 0 && extents[i].offset < end) return false;
    end = std::max(end, extents[i].end());
  }
  return true;
}

/// Whether the transfer's extents, which are disjoint, cover every byte of its blocks.
bool cover_blocks(const ReadPlan& plan, const Transfer& transfer) {
  size_t extent = transfer.first;
  for (size_t i = transfer.first_block; i < transfer.last_block; ++i) {
    int64_t position = std::max(plan.blocks[i].offset, transfer.begin);
    const int64_t end = std::min(plan.blocks[i].end(), transfer.end);
    while (position < end) {
      while (extent < transfer.last && plan.extents[extent].end() <= position) ++extent;
      if (extent == transfer.last || plan.extents[extent].offset > position) return false;
      position = plan.extents[extent].end();
    }
  }
  return true;
}

/// A range to read: an extent, or a block around parts of extents.
struct Span {
  int64_t file;
  int64_t offset;
  int64_t nbytes;

  int64_t end() const { return offset + nbytes; }
};

/// Cuts clusters of spans into transfers. The cuts fall on multiples of a step, which keeps direct reads
/// aligned and lets each fit a chunk buffer.
class Cutter {
 public:
  Cutter(int64_t step, ReadPlan* plan) : step_(step), plan_(plan) {}

  /// Cuts [begin, end) of a file, after everything cut so far; spans cover it except for small gaps.
  void cut(int64_t file, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t cut = begin + std::min(end - begin, step_ - begin % step_);
      const auto [first, last] = within(plan_->extents, &extent_, file, begin, cut);
      const auto [first_block, last_block] = within(plan_->blocks, &block_, file, begin, cut);
      if (first < last || first_block < last_block) {
        Transfer transfer{static_cast<size_t>(file), begin, cut, first, last, first_block, last_block, false};
        transfer.scatters = are_disjoint(plan_->extents, first, last) && cover_blocks(*plan_, transfer);
        plan_->transfers.push_back(transfer);
      }
      begin = cut;
    }
  }

 private:
  /// The indices [first, last) of those `ranges` that may overlap [begin, end); advances `*from` to the
  /// first.
  template <typename Range>
  static std::pair<size_t, size_t> within(const std::vector<Range>& ranges, size_t* from, int64_t file,
                                          int64_t begin, int64_t end) {
    const auto is_before = [&](const Range& range) {
      return range.file < file || (range.file == file && range.end() <= begin);
    };
    while (*from < ranges.size() && is_before(ranges[*from])) ++*from;
    size_t to = *from;
    while (to < ranges.size() && ranges[to].file == file && ranges[to].offset < end) ++to;
    return {*from, to};
  }

  const int64_t step_;
  ReadPlan* plan_;
  size_t extent_ = 0;
  size_t block_ = 0;
};

/// A cluster of spans that are read together, gaps included.
class Cluster {
 public:
  explicit Cluster(const Span& first) : file_(first.file), end_(first.end()), wanted_(first.nbytes) {}

  int64_t end() const { return end_; }

  /// Adds the span if that reads few unwanted bytes.
  bool take(const Span& next) {
    const int64_t gap = std::max<int64_t>(next.offset - end_, 0);
    if (next.file != file_ || gap > kLongestGap) return false;
    if (gap > kFreeGap && unwanted_ + gap > wanted_ / kGapShare) return false;
    if (gap > kFreeGap) unwanted_ += gap;
    wanted_ += std::max<int64_t>(next.end() - std::max(next.offset, end_), 0);
    end_ = std::max(end_, next.end());
    return true;
  }

 private:
  int64_t file_;
  int64_t end_;
  int64_t wanted_;
  int64_t unwanted_ = 0;  // except free gaps
};

/// The sizes of files, each looked up once.
class FileSizes {
 public:
  explicit FileSizes(const std::vector<std::string>& paths) : paths_(paths), sizes_(paths.size(), -1) {}

  int64_t of(int64_t file) {
    int64_t& size = sizes_[static_cast<size_t>(file)];
    if (size < 0) size = regular_file_size(path(file));
    return size;
  }

  const std::string& path(int64_t file) const { return paths_[static_cast<size_t>(file)]; }

 private:
  const std::vector<std::string>& paths_;
  std::vector<int64_t> sizes_;
};

void require_extents(const std::vector<Extent>& extents, FileSizes* sizes) {
  int64_t file = -1;
  for (const Extent& extent : extents) {
    if (extent.nbytes == 0 || extent.file == file) continue;
    file = extent.file;
    require_inside(extents, static_cast<size_t>(file), sizes->path(file), sizes->of(file));
  }
}

/// There is a result for every block, so those that lie behind the ends of files must not be many.
void require_ranges(const std::vector<CheckedRange>& ranges, size_t block_count, FileSizes* sizes) {
  if (block_count <= static_cast<size_t>(kFreeBlocks)) return;
  int64_t free = kFreeBlocks;
  for (const CheckedRange& range : ranges) {
    const int64_t there = std::min(std::max<int64_t>(sizes->of(range.file) - range.offset, 0), range.nbytes);
    const int64_t missing = range.count() - (there == 0 ? 0 : (there - 1) / range.block_nbytes + 1);
    if (missing > free) {
      throw_file_ends(range.nbytes, range.offset, sizes->path(range.file), sizes->of(range.file));
    }
    free -= missing;
  }
}

/// Blocks are read whole.
void require_blocks(const std::vector<Block>& blocks, FileSizes* sizes) {
  for (const Block& block : blocks) {
    const int64_t size = sizes->of(block.file);
    if (block.end() > size) throw_file_ends(block.nbytes, block.offset, sizes->path(block.file), size);
  }
}

/// Extents with bytes, and blocks, by position. An empty extent may lie anywhere, behind the file's end as
/// well.
std::vector<Span> spans_of(const ReadPlan& plan) {
  std::vector<Span> spans;
  for (const Extent& extent : plan.extents) {
    if (extent.nbytes > 0) spans.push_back({extent.file, extent.offset, extent.nbytes});
  }
  for (const Block& block : plan.blocks) spans.push_back({block.file, block.offset, block.nbytes});
  if (!plan.blocks.empty()) sort_by_place(&spans);
  return spans;
}

void cut_transfers(const ReadRequest& request, ReadPlan* plan) {
  const int64_t step = request.direct ? request.chunk_nbytes : std::min(request.chunk_nbytes, kCacheHot);
  const std::vector<Span> spans = spans_of(*plan);
  Cutter cutter(step, plan);
  for (size_t first = 0; first < spans.size();) {
    Cluster cluster(spans[first]);
    size_t last = first + 1;
    while (last < spans.size() && cluster.take(spans[last])) ++last;
    cutter.cut(spans[first].file, spans[first].offset, cluster.end());
    first = last;
  }
  int64_t nbytes = 0;
  for (const Transfer& transfer : plan->transfers) nbytes += transfer.end - transfer.begin;
  const auto count = static_cast<int64_t>(plan->transfers.size());
  plan->direct = request.direct && nbytes >= request.chunk_nbytes / kDirectShare * count;
}

}  // namespace

ReadPlan make_read_plan(const ReadRequest& request) {
  check_job(request.threads, request.chunk_nbytes);
  check_lengths("extent",
                {request.extent_file, request.extent_offset, request.extent_nbytes, request.extent_address});
  check_lengths("range",
                {request.range_file, request.range_offset, request.range_nbytes, request.range_block});
  ReadPlan plan;
  add_extents(request, &plan);
  const std::vector<CheckedRange> ranges = checked_ranges(request, &plan);
  FileSizes sizes(request.paths);
  require_extents(plan.extents, &sizes);
  require_ranges(ranges, plan.block_count, &sizes);
  add_blocks(ranges, &plan);
  require_blocks(plan.blocks, &sizes);
  cut_transfers(request, &plan);
  return plan;
}

void require_inside(const std::vector<Extent>& extents, size_t file, const std::string& path, int64_t size) {
  const auto wanted = static_cast<int64_t>(file);
  const auto before = [](const Extent& extent, int64_t value) { return extent.file < value; };
  auto extent = std::lower_bound(extents.begin(), extents.end(), wanted, before);
  const Extent* first = nullptr;
  for (; extent != extents.end() && extent->file == wanted; ++extent) {
    const bool missing = extent->nbytes > 0 && extent->end() > size;
    if (missing && (first == nullptr || extent->row < first->row)) first = &*extent;
  }
  if (first != nullptr) throw_file_ends(first->nbytes, first->offset, path, size);
}

}  // namespace ckpt_fast
