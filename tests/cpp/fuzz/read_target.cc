// SPDX-License-Identifier: Apache-2.0
// read_extents, on tables of numbers as a checkpoint's .metadata leads to, compared with what it has to
// return by definition. An input is a byte of options, and one row after the other.
#include <algorithm>
#include <fstream>
#include <limits>
#include <memory>
#include <stdexcept>

#include "check.h"
#include "engine/base/error.h"
#include "engine/base/file.h"
#include "engine/checksum/checksum.h"
#include "engine/io/reader.h"

using namespace ckpt_fast;

namespace {

constexpr int64_t kFileNbytes[] = {0, 4096, 10'001, 65'553};
constexpr int64_t kFileCount = std::size(kFileNbytes);  // there is one more path, of no file
constexpr size_t kMostRows = 64;
// Destinations longer than any file are not given: nothing may be written to them.
constexpr int64_t kLongestDestination = 1 << 17;
constexpr int64_t kFreeBlocks = 1 << 20;
constexpr uint8_t kUntouched = 0xA5;

struct Files {
  TemporaryDirectory directory;
  std::vector<std::string> paths;
  std::vector<std::vector<uint8_t>> contents;

  Files() {
    for (int64_t file = 0; file <= kFileCount; ++file) {
      paths.push_back(directory.file("file" + std::to_string(file)));
      if (file == kFileCount) break;
      contents.push_back(noise(static_cast<size_t>(kFileNbytes[file]), 20 + static_cast<uint64_t>(file)));
      std::ofstream stream(paths.back(), std::ios::binary);
      stream.write(reinterpret_cast<const char*>(contents.back().data()), kFileNbytes[file]);
      CHECK(stream.good());
    }
  }
};

const Files& files() {
  static const Files instance;
  return instance;
}

struct Row {
  int64_t file;
  int64_t offset;
  int64_t nbytes;
  int64_t block;

  int64_t end() const { return offset + nbytes; }
  int64_t block_count() const { return nbytes == 0 ? 0 : (nbytes - 1) / block + 1; }
  bool touches(const Row& other, int64_t begin, int64_t behind) const {
    return nbytes > 0 && file == other.file && offset < behind && end() > begin;
  }
};

/// Takes numbers off the front of an input; zeros follow its end.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  bool at_end() const { return position_ >= size_; }
  uint8_t byte() { return at_end() ? 0 : data_[position_++]; }

  /// Four bytes, which are the upper half of a number if it is to be huge.
  int64_t number(bool is_huge) {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) value |= static_cast<uint32_t>(byte()) << (8 * i);
    if (is_huge) return static_cast<int64_t>(static_cast<uint64_t>(value) << 32);
    return static_cast<int32_t>(value);
  }

 private:
  const uint8_t* data_;
  size_t size_;
  size_t position_ = 0;
};

struct Table {
  bool direct;
  int64_t chunk_nbytes;
  std::vector<Row> extents;
  std::vector<Row> ranges;

  Table(const uint8_t* data, size_t size) {
    Input input(data, size);
    const uint8_t options = input.byte();
    direct = (options & 1) != 0;
    chunk_nbytes = int64_t{4096} << (options >> 1 & 7);
    while (!input.at_end() && extents.size() < kMostRows && ranges.size() < kMostRows) {
      const uint8_t kind = input.byte();
      const uint8_t file = input.byte();
      Row row{file == 0xFF ? -1 : file % (kFileCount + 2), 0, 0, 1};
      const int huge = kind >> 1 & 7;
      row.offset = input.number(huge == 5);
      row.nbytes = input.number(huge == 4 || huge == 6);
      if ((kind & 1) != 0) row.block = input.number(huge == 4 || huge == 7);
      ((kind & 1) != 0 ? ranges : extents).push_back(row);
    }
  }
};

bool is_valid(const Row& row) {
  constexpr int64_t kLargest = std::numeric_limits<int64_t>::max() - kDirectAlignment;
  return row.file >= 0 && row.file <= kFileCount && row.offset >= 0 && row.nbytes >= 0 && row.block >= 1 &&
         row.offset <= kLargest - row.nbytes;
}

/// Whether the contract allows the table, whatever the files are.
bool is_valid(const Table& table) {
  for (const Row& extent : table.extents) {
    if (!is_valid(extent)) return false;
  }
  for (const Row& range : table.ranges) {
    if (!is_valid(range)) return false;
    for (const Row& other : table.ranges) {
      if (&other != &range && range.nbytes > 0 && other.touches(range, range.offset, range.end()))
        return false;
    }
  }
  return true;
}

int64_t nbytes_of_file(const Row& row) { return row.file < kFileCount ? kFileNbytes[row.file] : -1; }

/// Whether results are asked for that take memory, for blocks that no file has.
bool is_out_of_proportion(const Table& table) {
  double all = 0;
  double missing = 0;
  for (const Row& range : table.ranges) {
    Row there = range;
    there.nbytes = std::clamp<int64_t>(nbytes_of_file(range) - range.offset, 0, range.nbytes);
    all += static_cast<double>(range.block_count());
    missing += static_cast<double>(range.block_count() - there.block_count());
  }
  const bool names_no_file = std::any_of(table.ranges.begin(), table.ranges.end(), [](const Row& range) {
    return range.nbytes > 0 && nbytes_of_file(range) < 0;
  });
  return all > kFreeBlocks && (names_no_file || missing > kFreeBlocks);
}

/// Whether the extents, and the blocks that they touch, are in the files.
bool is_there(const Table& table) {
  for (const Row& extent : table.extents) {
    if (extent.nbytes > 0 && extent.end() > nbytes_of_file(extent)) return false;
  }
  for (const Row& range : table.ranges) {
    for (const Row& extent : table.extents) {
      if (range.nbytes == 0 || !extent.touches(range, range.offset, range.end())) continue;
      const int64_t last = (std::min(extent.end(), range.end()) - 1 - range.offset) / range.block;
      const bool is_last = last == range.block_count() - 1;
      if ((is_last ? range.end() : range.offset + (last + 1) * range.block) > nbytes_of_file(range))
        return false;
    }
  }
  return true;
}

/// The columns of a request, and destinations with nothing behind them.
class Request {
 public:
  explicit Request(const Table& table) {
    for (const Row& extent : table.extents) {
      const auto nbytes =
          static_cast<size_t>(extent.nbytes >= 0 && extent.nbytes <= kLongestDestination ? extent.nbytes : 0);
      destinations_.push_back(std::make_unique<uint8_t[]>(nbytes));
      std::fill_n(destinations_.back().get(), nbytes, kUntouched);
      add(extent, extents_);
      extents_[3].push_back(reinterpret_cast<int64_t>(destinations_.back().get()));
    }
    for (const Row& range : table.ranges) {
      add(range, ranges_);
      ranges_[3].push_back(range.block);
    }
    request_.paths = files().paths;
    request_.direct = table.direct;
    request_.chunk_nbytes = table.chunk_nbytes;
    Column* const extents[] = {&request_.extent_file, &request_.extent_offset, &request_.extent_nbytes,
                               &request_.extent_address};
    Column* const ranges[] = {&request_.range_file, &request_.range_offset, &request_.range_nbytes,
                              &request_.range_block};
    for (size_t i = 0; i < 4; ++i) {
      *extents[i] = {extents_[i].data(), extents_[i].size()};
      *ranges[i] = {ranges_[i].data(), ranges_[i].size()};
    }
  }

  const ReadRequest& request() const { return request_; }
  const uint8_t* destination(size_t row) const { return destinations_[row].get(); }

 private:
  using Columns = std::vector<int64_t>[4];

  static void add(const Row& row, Columns& columns) {
    columns[0].push_back(row.file);
    columns[1].push_back(row.offset);
    columns[2].push_back(row.nbytes);
  }

  std::vector<std::unique_ptr<uint8_t[]>> destinations_;
  Columns extents_, ranges_;
  ReadRequest request_;
};

void check_bytes(const Table& table, const Request& request) {
  for (size_t row = 0; row < table.extents.size(); ++row) {
    const Row& extent = table.extents[row];
    if (extent.nbytes == 0) continue;
    const uint8_t* const expected = files().contents[static_cast<size_t>(extent.file)].data() + extent.offset;
    CHECK(std::equal(expected, expected + extent.nbytes, request.destination(row)));
  }
}

void check_crcs(const Table& table, const std::vector<int64_t>& crcs) {
  size_t index = 0;
  for (const Row& range : table.ranges) {
    for (int64_t number = 0; number < range.block_count(); ++number, ++index) {
      const int64_t begin = range.offset + number * range.block;
      const int64_t nbytes = std::min(range.block, range.end() - begin);
      const bool touched = std::any_of(table.extents.begin(), table.extents.end(), [&](const Row& extent) {
        return extent.touches(range, begin, begin + nbytes);
      });
      CHECK(index < crcs.size());
      if (!touched) {
        CHECK(crcs[index] == -1);
      } else {
        const uint8_t* const bytes = files().contents[static_cast<size_t>(range.file)].data() + begin;
        CHECK(crcs[index] == crc32(bytes, static_cast<size_t>(nbytes)));
      }
    }
  }
  CHECK(index == crcs.size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const Table table(data, size);
  const Request request(table);
  try {
    const std::vector<int64_t> crcs = read_extents(request.request());
    CHECK(is_valid(table) && is_there(table) && !is_out_of_proportion(table));
    check_bytes(table, request);
    check_crcs(table, crcs);
  } catch (const std::invalid_argument&) {
    CHECK(!is_valid(table));
  } catch (const SystemError&) {
    CHECK(is_valid(table) && (!is_there(table) || is_out_of_proportion(table)));
  }
  return 0;
}
