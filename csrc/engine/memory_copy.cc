// SPDX-License-Identifier: Apache-2.0
#include "memory_copy.h"

#include <algorithm>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace ckpt_fast {

namespace {

constexpr int64_t kCachesNbytes = 8 << 20;
constexpr int64_t kShortestRun = 1 << 10;

// A core keeps too few lines in flight to saturate memory while it also stores.
constexpr size_t kPrefetchAhead = 2048;

#if defined(__x86_64__)
// SSE2 is part of x86-64, and four stores fill a cache line as one 512-bit store does.
void copy_streaming(uint8_t* to, const uint8_t* from, size_t nbytes) {
  const size_t head = std::min(nbytes, (0 - reinterpret_cast<uintptr_t>(to)) & size_t{63});
  std::memcpy(to, from, head);
  to += head;
  from += head;
  nbytes -= head;
  for (; nbytes >= 64; nbytes -= 64, to += 64, from += 64) {
    _mm_prefetch(reinterpret_cast<const char*>(from + kPrefetchAhead), _MM_HINT_T0);
    const auto* lines = reinterpret_cast<const __m128i*>(from);
    auto* stores = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(lines);
    const __m128i b = _mm_loadu_si128(lines + 1);
    const __m128i c = _mm_loadu_si128(lines + 2);
    const __m128i d = _mm_loadu_si128(lines + 3);
    _mm_stream_si128(stores, a);
    _mm_stream_si128(stores + 1, b);
    _mm_stream_si128(stores + 2, c);
    _mm_stream_si128(stores + 3, d);
  }
  _mm_sfence();
  std::memcpy(to, from, nbytes);
}
#endif

}  // namespace

bool streaming_pays(int64_t total_nbytes, int64_t run_nbytes) {
  return total_nbytes >= kCachesNbytes && run_nbytes >= kShortestRun;
}

void copy_memory(void* destination, const void* source, size_t nbytes, Store store) {
#if defined(__x86_64__)
  if (store == Store::kStreaming) {
    copy_streaming(static_cast<uint8_t*>(destination), static_cast<const uint8_t*>(source), nbytes);
    return;
  }
#else
  static_cast<void>(store);
#endif
  std::memcpy(destination, source, nbytes);
}

}  // namespace ckpt_fast
