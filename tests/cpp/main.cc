// SPDX-License-Identifier: Apache-2.0
// The engine's tests without Python, meant to run under sanitizers: `make cpp-test`.
#include "check.h"
#include "faults.h"

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
