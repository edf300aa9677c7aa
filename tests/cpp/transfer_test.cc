// SPDX-License-Identifier: Apache-2.0
// writer and reader, with enough threads and small enough chunks that their waits and races happen.
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
#include "checksum.h"
#include "error.h"
#include "reader.h"
#include "writer.h"

using namespace ckpt_fast;

namespace {

constexpr size_t kPieces = 60;
constexpr int64_t kPieceNbytes = 9001;
constexpr int64_t kFileNbytes = kPieces * kPieceNbytes + 10;

/// Two files of many pieces; all pieces of a file form its stream, whose CRC lies at the end.
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
  a_failure_ends_all_waits();
  bad_requests_name_the_row();
}

/// Whenever a job is stopped: what has its name is whole, nothing else is left, and nothing appears later.
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
  // The same pieces again, last first, so that each file's stream is reversed.
  Example mirror;
  std::vector<uint8_t> expected = mirror.memory;
  std::fill(mirror.memory.begin(), mirror.memory.end(), uint8_t{0});
  for (auto* values : {&mirror.file, &mirror.offset, &mirror.address, &mirror.digest}) {
    std::reverse(values->begin(), values->end());
  }
  for (const bool direct : {false, true}) {
    for (const int64_t chunk_nbytes : {4096, 65536}) {
      const ReadRequest request{paths,
                                Example::column(mirror.file),
                                Example::column(mirror.offset),
                                Example::column(mirror.nbytes),
                                Example::column(mirror.address),
                                Example::column(mirror.digest),
                                2,
                                4,
                                chunk_nbytes,
                                direct,
                                nullptr};
      const std::vector<uint32_t> crcs = read_extents(request);
      CHECK(mirror.memory == expected);
      for (size_t f = 0; f < 2; ++f) {
        uint32_t crc = 0;
        for (size_t i = kPieces; i-- > 0;) {
          crc = crc32(expected.data() + (f * kPieces + i) * kPieceNbytes, kPieceNbytes, crc);
        }
        CHECK(crcs[f] == crc);
      }
    }
  }
}
