// SPDX-License-Identifier: Apache-2.0
// Runs the gather's device code on the CPU, one thread after another: every size and alignment, and no byte
// outside. Prints the first difference and exits with 1.
#include "cuda/gather_copy.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace ckpt_fast::cuda;

struct Wide {
  std::uint64_t low, high;
};

int main() {
  constexpr std::size_t kMargin = 64;
  for (std::size_t nbytes : {0, 1, 3, 4, 15, 16, 17, 100, 4095, 4096, 131071}) {
    for (std::size_t from : {0, 1, 2, 4, 8, 16}) {
      for (std::size_t to : {0, 1, 4, 16}) {
        // 16 spare bytes: a vector's memory is aligned only to that.
        std::vector<std::uint8_t> source(nbytes + 2 * kMargin), destination(nbytes + 2 * kMargin, 0xEE);
        for (std::size_t i = 0; i < source.size(); ++i) source[i] = static_cast<std::uint8_t>(i * 7 + i / 251);
        std::uint8_t* first = destination.data() + to;
        Copy copy{reinterpret_cast<std::uintptr_t>(first),
                  reinterpret_cast<std::uintptr_t>(source.data() + from), static_cast<std::int64_t>(nbytes)};
        for (std::uint32_t thread = 0; thread < kGatherThreads; ++thread) copy_one<Wide>(copy, thread);
        for (std::size_t i = 0; i < destination.size(); ++i) {
          bool inside = i >= to && i < to + nbytes;
          std::uint8_t expected = inside ? source[from + i - to] : 0xEE;
          if (destination[i] != expected) {
            std::printf("%zu bytes from +%zu to +%zu differ at %zu\n", nbytes, from, to, i);
            return 1;
          }
        }
      }
    }
  }
  return 0;
}
