// SPDX-License-Identifier: Apache-2.0
// Checks that stay on in release builds, and the list of test groups.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                  \
    }                                                                                \
  } while (false)

/// The text of the exception of type Error that the call throws; fails if it does not throw.
template <typename Error, typename Call>
std::string text_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  CHECK(!"an exception was thrown");
  return {};
}

/// Deterministic bytes.
inline std::vector<uint8_t> noise(size_t nbytes, uint64_t seed) {
  std::vector<uint8_t> bytes(nbytes);
  uint64_t state = seed * 2 + 1;
  for (uint8_t& byte : bytes) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<uint8_t>(state >> 56);
  }
  return bytes;
}

/// A temporary directory, removed at the end together with the files that were requested by name.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  std::string file(const std::string& name);

 private:
  std::string path_;
  std::vector<std::string> files_;
};

std::vector<uint8_t> read_whole(const std::string& path);

void test_checksum();
void test_parallel();
void test_threads_without_memory();
void test_buffer_pool();
void test_fork();
void test_file();
void test_file_faults();
void test_writer();
void test_writer_stops();
void test_supply();
void test_reader();
void test_copy_runs();
void test_permute();
void test_pickle_check();
