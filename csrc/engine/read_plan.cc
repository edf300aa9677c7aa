// SPDX-License-Identifier: Apache-2.0
#include "read_plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "error.h"
#include "file.h"
#include "write_plan.h"

namespace ckpt_fast {

namespace {

using std::to_string;

// Buffered reads are checked when they are done; this much is still in the cache by then.
constexpr int64_t kCacheHot = 1 << 20;

// Reading so much for nothing costs less than the system call that leaves it out.
constexpr int64_t kFreeGap = 512;
// Longer gaps are read as long as they are together at most this part of the bytes wanted around them.
constexpr int64_t kGapShare = 16;

// Transfers that are shorter on average than this part of a chunk come sooner through the page cache, which
// reads each page once and reads ahead.
constexpr int64_t kDirectShare = 32;

[[noreturn]] void refuse(size_t row, const std::string& why) {
  throw std::invalid_argument("extent " + to_string(row) + ": " + why);
}

void check_columns(const ReadRequest& request) {
  check_job(request.threads, request.chunk_nbytes);
  if (request.digest_count < 0) throw std::invalid_argument("digest_count is negative");
  for (const Column& column :
       {request.extent_offset, request.extent_nbytes, request.extent_address, request.extent_digest}) {
    if (column.size != request.extent_file.size) {
      throw std::invalid_argument("extent columns differ in length: " + to_string(request.extent_file.size) +
                                  " and " + to_string(column.size));
    }
  }
}

void add_extents(const ReadRequest& request, ReadPlan* plan) {
  const auto file_count = static_cast<int64_t>(request.paths.size());
  for (size_t row = 0; row < request.extent_file.size; ++row) {
    const Extent extent{row,
                        request.extent_file[row],
                        request.extent_offset[row],
                        request.extent_nbytes[row],
                        reinterpret_cast<uint8_t*>(request.extent_address[row]),
                        request.extent_digest[row],
                        0};
    if (extent.file < 0 || extent.file >= file_count) {
      refuse(row, "file " + to_string(extent.file) + " is not one of " + to_string(file_count));
    }
    if (extent.offset < 0 || extent.nbytes < 0 ||
        extent.offset > std::numeric_limits<int64_t>::max() - kDirectAlignment - extent.nbytes) {
      refuse(row, to_string(extent.nbytes) + " bytes at " + to_string(extent.offset) + " are no range");
    }
    if (extent.digest < -1 || extent.digest >= request.digest_count) {
      refuse(row, "digest " + to_string(extent.digest) + " is not one of " + to_string(request.digest_count));
    }
    if (extent.digest >= 0) plan->stream_nbytes[extent.digest] += extent.nbytes;
    plan->extents.push_back(extent);
  }
}

void count_digest_behind(ReadPlan* plan) {
  std::vector<int64_t> missing = plan->stream_nbytes;
  for (Extent& extent : plan->extents) {
    if (extent.digest >= 0) extent.digest_behind = missing[extent.digest] -= extent.nbytes;
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

/// Cuts [begin, end), which extents first … last - 1 cover but for small gaps, into transfers. The cuts fall
/// on multiples of `step`, which keeps direct reads aligned and lets each fit a chunk buffer.
void cut_run(int64_t step, int64_t begin, int64_t end, size_t first, size_t last, ReadPlan* plan) {
  const std::vector<Extent>& extents = plan->extents;
  const auto file = static_cast<size_t>(extents[first].file);
  size_t from = first;
  while (begin < end) {
    const int64_t cut = begin + std::min(end - begin, step - begin % step);
    while (from < last && extents[from].end() <= begin) ++from;
    size_t to = from;
    while (to < last && extents[to].offset < cut) ++to;
    if (from < to) plan->transfers.push_back({file, begin, cut, from, to, are_disjoint(extents, from, to)});
    begin = cut;
  }
}

/// A run of extents that are read together, gaps included.
class Run {
 public:
  explicit Run(const Extent& first) : file_(first.file), end_(first.end()), wanted_(first.nbytes) {}

  int64_t end() const { return end_; }

  /// Takes the extent in if that reads little for nothing.
  bool take(const Extent& next) {
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
  int64_t unwanted_ = 0;  // but for free gaps
};

/// Looks at each file that bytes are wanted of.
void check_sizes(const ReadRequest& request, const std::vector<Extent>& extents) {
  size_t file = request.paths.size();
  for (const Extent& extent : extents) {
    if (extent.nbytes == 0 || static_cast<size_t>(extent.file) == file) continue;
    file = static_cast<size_t>(extent.file);
    require_inside(extents, file, request.paths[file], regular_file_size(request.paths[file]));
  }
}

void cut_transfers(const ReadRequest& request, ReadPlan* plan) {
  const std::vector<Extent>& extents = plan->extents;
  const int64_t step = request.direct ? request.chunk_nbytes : std::min(request.chunk_nbytes, kCacheHot);
  for (size_t first = 0; first < extents.size();) {
    Run run(extents[first]);
    size_t last = first + 1;
    while (last < extents.size() && run.take(extents[last])) ++last;
    cut_run(step, extents[first].offset, run.end(), first, last, plan);
    first = last;
  }
  int64_t nbytes = 0;
  for (const Transfer& transfer : plan->transfers) nbytes += transfer.end - transfer.begin;
  const auto count = static_cast<int64_t>(plan->transfers.size());
  plan->direct = request.direct && nbytes >= request.chunk_nbytes / kDirectShare * count;
}

}  // namespace

ReadPlan make_read_plan(const ReadRequest& request) {
  check_columns(request);
  ReadPlan plan;
  plan.stream_nbytes.assign(static_cast<size_t>(request.digest_count), 0);
  add_extents(request, &plan);
  count_digest_behind(&plan);
  std::stable_sort(plan.extents.begin(), plan.extents.end(), [](const Extent& a, const Extent& b) {
    return std::tie(a.file, a.offset) < std::tie(b.file, b.offset);
  });
  check_sizes(request, plan.extents);
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
