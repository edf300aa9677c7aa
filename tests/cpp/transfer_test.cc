// SPDX-License-Identifier: Apache-2.0
// Writer and reader, with enough threads and small enough chunks to provoke waits and races.
#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "engine/base/error.h"
#include "engine/checksum/checksum.h"
#include "engine/io/reader.h"
#include "engine/io/writer.h"

using namespace ckpt_fast;

namespace {

constexpr size_t kPieces = 60;
constexpr int64_t kPieceNbytes = 9001;
constexpr int64_t kFileNbytes = kPieces * kPieceNbytes + 10;

/// Two files of many pieces; all pieces of a file form its stream, whose CRC is at the end.
struct Example {
  std::vector<uint8_t> memory = noise(2 * kPieces * kPieceNbytes, 6);
  std::vector<int64_t> file_nbytes = {kFileNbytes, kFileNbytes};
  std::vector<int64_t> file, offset, nbytes, address, digest;
  std::vector<int64_t> patch_file = {0, 1};
  std::vector<int64_t> patch_offset = {kFileNbytes - 7, kFileNbytes - 4};
  std::vector<int64_t> patch_digest = {0, 1};

  Example() {
    for (size_t i = 0; i < 2 * kPieces; ++i) {
      file.push_back(static_cast<int64_t>(i / kPieces));
      offset.push_back(static_cast<int64_t>(i % kPieces) * kPieceNbytes);
      nbytes.push_back(kPieceNbytes);
      address.push_back(reinterpret_cast<int64_t>(memory.data() + i * kPieceNbytes));
      digest.push_back(file.back());
    }
  }

  static Column column(const std::vector<int64_t>& values) { return {values.data(), values.size()}; }

  WriteRequest request(const std::vector<std::string>& paths, bool direct) const {
    return {paths,
            column(file_nbytes),
            column(file),
            column(offset),
            column(nbytes),
            column(address),
            column(digest),
            column(patch_file),
            column(patch_offset),
            column(patch_digest),
            2,
            4,
            4096,
            direct,
            false,
            nullptr};
  }

  std::vector<uint8_t> image(size_t index) const {
    const auto begin = memory.begin() + static_cast<int64_t>(index) * kPieces * kPieceNbytes;
    std::vector<uint8_t> bytes(begin, begin + kPieces * kPieceNbytes);
    const uint32_t crc = crc32(bytes.data(), bytes.size());
    bytes.resize(kFileNbytes);
    for (int i = 0; i < 4; ++i) bytes[patch_offset[index] + i] = static_cast<uint8_t>(crc >> (8 * i));
    return bytes;
  }
};

void files_are_what_was_asked_for() {
  TemporaryDirectory directory;
  const std::vector<std::string> paths = {directory.file("a"), directory.file("b")};
  const Example example;
  for (const bool direct : {false, true}) {
    const WriteResult result = write_files(example.request(paths, direct));
    for (size_t i = 0; i < 2; ++i) {
      const std::vector<uint8_t> image = example.image(i);
      CHECK(read_whole(paths[i]) == image);
      CHECK(result.file_crcs[i] == crc32(image.data(), image.size()));
      CHECK(result.stream_crcs[i] == crc32(image.data(), kPieces * kPieceNbytes));
    }
    CHECK(result.block_crcs.empty());
  }
}

void blocks_of_streams_have_digests() {
  TemporaryDirectory directory;
  const Example example;
  for (const bool direct : {false, true}) {
    WriteRequest request = example.request({directory.file("a"), directory.file("b")}, direct);
    request.block_nbytes = 10'000;
    const WriteResult result = write_files(request);
    const size_t blocks = (kPieces * kPieceNbytes + 9'999) / 10'000;
    CHECK(result.block_crcs.size() == 2 * blocks);
    for (size_t i = 0; i < 2 * blocks; ++i) {
      const std::vector<uint8_t> image = example.image(i / blocks);
      const size_t begin = i % blocks * 10'000;
      const size_t length = std::min<size_t>(10'000, kPieces * kPieceNbytes - begin);
      CHECK(result.block_crcs[i] == crc32(image.data() + begin, length));
    }
  }
}

/// The chunk with the patch waits for chunks that will never be written.
void a_failure_ends_all_waits() {
  TemporaryDirectory directory;
  const std::vector<std::string> paths = {directory.file("a"), directory.file("b")};
  const Example example;
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  CHECK(getrlimit(RLIMIT_FSIZE, &before) == 0);
  for (rlim_t limit = 4096; limit < kFileNbytes; limit += 50000) {
    const rlimit lowered{limit, before.rlim_max};
    CHECK(setrlimit(RLIMIT_FSIZE, &lowered) == 0);
    const std::string text = text_of<SystemError>([&] { write_files(example.request(paths, false)); });
    CHECK(text.rfind("write 4096 bytes at ", 0) == 0);
    CHECK(text.find(": File too large") != std::string::npos);
  }
  CHECK(setrlimit(RLIMIT_FSIZE, &before) == 0);
}

std::vector<std::string> names_in(const std::string& path) {
  std::vector<std::string> names;
  DIR* const directory = opendir(path.c_str());
  CHECK(directory != nullptr);
  while (const dirent* const entry = readdir(directory)) {
    if (entry->d_name != std::string(".") && entry->d_name != std::string("..")) {
      names.push_back(entry->d_name);
    }
  }
  closedir(directory);
  return names;
}

void bad_requests_name_the_row() {
  Example example;
  example.digest[70] = 0;
  const auto call = [&] { write_files(example.request({"a", "b"}, false)); };
  CHECK(text_of<std::invalid_argument>(call) == "piece 70: digest 0 began in another file");
}

}  // namespace

void test_writer() {
  files_are_what_was_asked_for();
  blocks_of_streams_have_digests();
  a_failure_ends_all_waits();
  bad_requests_name_the_row();
}

/// Whenever a job is stopped: published files are complete, nothing else is left, and nothing appears later.
void test_writer_stops() {
  const Example example;
  for (int round = 0; round < 60; ++round) {
    TemporaryDirectory directory;
    const std::vector<std::string> paths = {directory.file("a"), directory.file("b")};
    Progress progress;
    WriteRequest request = example.request(paths, round % 2 == 1);
    request.progress = &progress;
    std::thread stopping([&] {
      std::this_thread::sleep_for(std::chrono::microseconds(round * 200));
      progress.stop();
    });
    std::string text;
    try {
      write_files(request);
    } catch (const SystemError& error) {
      CHECK(error.error_number() == ECANCELED);
      text = error.what();
    }
    stopping.join();
    CHECK(!progress.renaming() && !progress.begin_rename());
    for (size_t i = 0; i < 2; ++i) {
      if (access(paths[i].c_str(), F_OK) == 0) CHECK(read_whole(paths[i]) == example.image(i));
    }
    const size_t left = names_in(paths[0].substr(0, paths[0].rfind('/'))).size();
    CHECK(text.empty() ? left == 2 : left <= 1);
  }
}

void test_reader() {
  TemporaryDirectory directory;
  const std::vector<std::string> paths = {directory.file("a"), directory.file("b")};
  const Example example;
  write_files(example.request(paths, false));
  // The same pieces again, last first, except every tenth: blocks around those are read all the same.
  Example mirror;
  std::vector<int64_t> file, offset, nbytes, address;
  for (size_t i = mirror.file.size(); i-- > 0;) {
    if (i % 10 == 3) continue;
    file.push_back(mirror.file[i]);
    offset.push_back(mirror.offset[i]);
    nbytes.push_back(mirror.nbytes[i]);
    address.push_back(mirror.address[i]);
  }
  std::vector<uint8_t> expected = mirror.memory;
  for (size_t i = 3; i < 2 * kPieces; i += 10) {
    std::fill_n(expected.begin() + static_cast<int64_t>(i * kPieceNbytes), kPieceNbytes, uint8_t{0});
  }
  constexpr int64_t kBlockNbytes = 20'000;
  const std::vector<int64_t> range_file = {1, 0};
  const std::vector<int64_t> range_offset = {0, 5000};
  const std::vector<int64_t> range_nbytes = {kPieces * kPieceNbytes, kPieces * kPieceNbytes - 5000};
  const std::vector<int64_t> range_block = {kBlockNbytes, kPieces * kPieceNbytes};
  for (const bool direct : {false, true}) {
    for (const int64_t chunk_nbytes : {4096, 65536}) {
      std::fill(mirror.memory.begin(), mirror.memory.end(), uint8_t{0});
      const ReadRequest request{paths,
                                Example::column(file),
                                Example::column(offset),
                                Example::column(nbytes),
                                Example::column(address),
                                Example::column(range_file),
                                Example::column(range_offset),
                                Example::column(range_nbytes),
                                Example::column(range_block),
                                4,
                                chunk_nbytes,
                                direct,
                                nullptr};
      const std::vector<int64_t> crcs = read_extents(request);
      CHECK(mirror.memory == expected);
      const std::vector<uint8_t> second = example.image(1);
      const int64_t blocks = (range_nbytes[0] + kBlockNbytes - 1) / kBlockNbytes;
      CHECK(static_cast<int64_t>(crcs.size()) == blocks + 1);
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t length = std::min(kBlockNbytes, range_nbytes[0] - i * kBlockNbytes);
        CHECK(crcs[i] == crc32(second.data() + i * kBlockNbytes, static_cast<size_t>(length)));
      }
      CHECK(crcs[blocks] == crc32(example.image(0).data() + 5000, static_cast<size_t>(range_nbytes[1])));
    }
  }
}
