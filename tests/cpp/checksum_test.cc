// SPDX-License-Identifier: Apache-2.0
#include "engine/checksum/checksum.h"

#include <algorithm>

#include "check.h"
#include "engine/checksum/checksum_kernels.h"
#if defined(__x86_64__)
#include "engine/checksum/features_x86.h"
#endif

using namespace ckpt_fast;

namespace {

/// The definition, one bit at a time.
uint32_t reference(const uint8_t* data, size_t nbytes, uint32_t state) {
  for (size_t i = 0; i < nbytes; ++i) {
    state ^= data[i];
    for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ ((state & 1) != 0 ? 0xEDB88320u : 0);
  }
  return state;
}

void every_kernel_agrees_with_the_definition() {
  const std::vector<uint8_t> source = noise(8192 + 64, 1);
  alignas(64) uint8_t destination[8192];
  for (const crc::Kernels& kernels : crc::available_kernels()) {
    for (size_t nbytes = 64; nbytes <= 8192; nbytes += nbytes < 1024 ? 64 : 1472) {
      for (const size_t misaligned : {0, 1, 63}) {
        const uint8_t* const from = source.data() + misaligned;
        const uint32_t expected = reference(from, nbytes, 0x89abcdefu);
        CHECK(kernels.update(from, nbytes, 0x89abcdefu) == expected);
        for (const crc::CopyKernel copy : {kernels.copy, kernels.copy_streaming}) {
          std::fill(std::begin(destination), std::end(destination), uint8_t{0});
          CHECK(copy(destination, from, nbytes, 0x89abcdefu) == expected);
          CHECK(std::equal(from, from + nbytes, destination));
        }
      }
    }
  }
}

void copies_touch_only_their_destination() {
  const std::vector<uint8_t> source = noise(1000, 2);
  for (const Store store : {Store::kCached, Store::kStreaming}) {
    for (size_t begin = 0; begin < 70; begin += 3) {
      for (size_t nbytes = 0; nbytes < 700; nbytes += 31) {
        std::vector<uint8_t> destination(1000, 0xee);
        const uint32_t crc = copy_crc32(destination.data() + begin, source.data() + 5, nbytes, 7, store);
        CHECK(crc == ~reference(source.data() + 5, nbytes, ~7u));
        for (size_t i = 0; i < destination.size(); ++i) {
          const bool copied = i >= begin && i < begin + nbytes;
          CHECK(destination[i] == (copied ? source[5 + i - begin] : 0xee));
        }
      }
    }
  }
}

void parts_combine_in_any_order() {
  const std::vector<uint8_t> bytes = noise(100000, 3);
  const uint32_t whole = crc32(bytes.data(), bytes.size());
  uint32_t combined = 0;
  for (size_t end = bytes.size(); end > 0;) {
    const size_t begin = end - std::min<size_t>(end, 7919);
    combined ^= crc32_shift(crc32(bytes.data() + begin, end - begin), bytes.size() - end);
    end = begin;
  }
  CHECK(combined == whole);
  CHECK(crc32_combine(whole, 0, 0) == whole);
}

#if defined(__x86_64__)
void features_are_those_that_the_compiler_finds() {
  __builtin_cpu_init();
  const crc::X86Features found = crc::x86_features();
  CHECK(found.pclmul == (__builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")));
  CHECK(found.vpclmulqdq == (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq")));
}
#endif

}  // namespace

void test_checksum() {
#if defined(__x86_64__)
  features_are_those_that_the_compiler_finds();
#endif
  every_kernel_agrees_with_the_definition();
  copies_touch_only_their_destination();
  parts_combine_in_any_order();
}
