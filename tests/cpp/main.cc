// SPDX-License-Identifier: Apache-2.0
// The engine's tests without Python, meant to run under sanitizers: `make cpp-test`.
#include <unistd.h>

#include <fstream>
#include <iterator>

#include "check.h"
#include "faults.h"

TemporaryDirectory::TemporaryDirectory() {
  const char* const base = std::getenv("TMPDIR");
  path_ = std::string(base != nullptr ? base : "/tmp") + "/ckpt_fast_test.XXXXXX";
  CHECK(mkdtemp(path_.data()) != nullptr);
}

TemporaryDirectory::~TemporaryDirectory() {
  for (const std::string& file : files_) unlink(file.c_str());
  rmdir(path_.c_str());
}

std::string TemporaryDirectory::file(const std::string& name) {
  files_.push_back(path_ + "/" + name);
  return files_.back();
}

std::vector<uint8_t> read_whole(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  CHECK(stream.good());
  return {std::istreambuf_iterator<char>(stream), {}};
}

int main() {
  test_checksum();
  test_parallel();
  test_threads_without_memory();
  test_buffer_pool();
  test_fork();
  test_file();
  test_file_faults();
  test_writer();
  test_writer_stops();
  test_supply();
  test_reader();
  {
    const Interruptions interruptions;
    test_writer();
    test_reader();
    CHECK(interruptions.count() > 1000);
  }
  test_copy_runs();
  test_permute();
  test_pickle_check();
  std::puts("engine tests passed");
  return 0;
}
