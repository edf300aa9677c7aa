// SPDX-License-Identifier: Apache-2.0
// A job whose bytes come while it writes them, through less memory than they take.
#include <algorithm>
#include <cerrno>
#include <chrono>
#include <thread>

#include "check.h"
#include "engine/base/error.h"
#include "engine/checksum/checksum.h"
#include "engine/io/writer.h"

using namespace ckpt_fast;

namespace {

constexpr int64_t kFiles = 3;
constexpr int64_t kBatches = 40;
constexpr int64_t kPart = 4096;  // bytes of one file in a batch
constexpr int64_t kSlabs = 3;
constexpr int kThreads = 3;  // files written at a time
constexpr int64_t kFileNbytes = kBatches * kPart + 4;

/// Files whose chunks come in batches, one chunk of each file with each; the CRC of a file at its end.
struct Supplied {
  std::vector<uint8_t> content = noise(kFiles * kBatches * kPart, 8);
  std::vector<uint8_t> ring = std::vector<uint8_t>(kSlabs * kFiles * kPart);
  std::vector<int64_t> file_nbytes = std::vector<int64_t>(kFiles, kFileNbytes);
  std::vector<int64_t> file, offset, nbytes, address, digest, batch;
  std::vector<int64_t> patch_file, patch_offset, patch_digest;

  Supplied() {
    for (int64_t f = 0; f < kFiles; ++f) {
      for (int64_t b = 0; b < kBatches; ++b) {
        file.push_back(f);
        offset.push_back(b * kPart);
        nbytes.push_back(kPart);
        address.push_back(reinterpret_cast<int64_t>(slot(f, b)));
        digest.push_back(f);
        batch.push_back(b);
      }
      patch_file.push_back(f);
      patch_offset.push_back(kBatches * kPart);
      patch_digest.push_back(f);
    }
  }

  uint8_t* slot(int64_t f, int64_t b) { return ring.data() + (b % kSlabs * kFiles + f) * kPart; }

  /// Brings all batches, or those before `end`.
  void bring(Supply* supply, int64_t end = kBatches) {
    for (int64_t b = 0; b < end; ++b) {
      if (b >= kSlabs && !supply->wait_written(static_cast<size_t>(b - kSlabs), std::chrono::minutes(1)))
        return;
      for (int64_t f = 0; f < kFiles; ++f) {
        std::copy_n(content.begin() + (f * kBatches + b) * kPart, kPart, slot(f, b));
      }
      supply->arrive(static_cast<size_t>(b + 1));
    }
  }

  WriteRequest request(const std::vector<std::string>& paths, bool direct, Supply* supply) {
    const auto column = [](const std::vector<int64_t>& values) {
      return Column{values.data(), values.size()};
    };
    WriteRequest request{paths,
                         column(file_nbytes),
                         column(file),
                         column(offset),
                         column(nbytes),
                         column(address),
                         column(digest),
                         column(patch_file),
                         column(patch_offset),
                         column(patch_digest),
                         kFiles,
                         kThreads,
                         kPart,
                         direct,
                         false,
                         nullptr};
    request.piece_batch = column(batch);
    request.supply = supply;
    return request;
  }

  std::vector<uint8_t> image(int64_t f) const {
    const auto begin = content.begin() + f * kBatches * kPart;
    std::vector<uint8_t> bytes(begin, begin + kBatches * kPart);
    const uint32_t crc = crc32(bytes.data(), bytes.size());
    for (int i = 0; i < 4; ++i) bytes.push_back(static_cast<uint8_t>(crc >> (8 * i)));
    return bytes;
  }
};

std::vector<std::string> paths_in(TemporaryDirectory* directory) {
  return {directory->file("a"), directory->file("b"), directory->file("c")};
}

Supply new_supply() { return Supply(std::vector<int64_t>(kBatches, kFiles * kPart)); }

void files_are_what_came() {
  TemporaryDirectory directory;
  const std::vector<std::string> paths = paths_in(&directory);
  Supplied example;
  for (const bool direct : {false, true}) {
    Supply supply = new_supply();
    std::thread bringing([&] { example.bring(&supply); });
    write_files(example.request(paths, direct, &supply));
    bringing.join();
    for (int64_t f = 0; f < kFiles; ++f) CHECK(read_whole(paths[f]) == example.image(f));
  }
}

/// Whoever waits is woken, on either side.
void an_early_end(bool by_the_writer) {
  TemporaryDirectory directory;
  Supplied example;
  Supply supply = new_supply();
  Progress progress;
  WriteRequest request = example.request(paths_in(&directory), true, &supply);
  request.progress = &progress;
  std::thread bringing([&] {
    example.bring(&supply, kBatches / 2);
    if (by_the_writer) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      progress.stop();
    } else {
      supply.end();
    }
  });
  const std::string text = text_of<SystemError>([&] { write_files(request); });
  CHECK(text.find("Operation canceled") != std::string::npos);
  bringing.join();
  CHECK(!supply.wait_written(kBatches - 1, std::chrono::minutes(1)) && supply.ended());
}

void bad_batches_name_the_row() {
  Supplied example;
  example.batch[5] = kBatches;
  Supply supply = new_supply();
  const auto call = [&] { write_files(example.request({"a", "b", "c"}, false, &supply)); };
  CHECK(text_of<std::invalid_argument>(call) == "piece 5: batch 40 is not one of 40");
}

}  // namespace

void test_supply() {
  files_are_what_came();
  an_early_end(false);
  an_early_end(true);
  bad_batches_name_the_row();
}
