// SPDX-License-Identifier: Apache-2.0
#include "engine/memory/memory_copy.h"

#include <algorithm>
#include <cstring>

#include "engine/base/stream_line_arm.h"

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
#define CKPT_FAST_STREAMS 1
#endif

namespace ckpt_fast {

namespace {

constexpr int64_t kCachesNbytes = 8 << 20;
constexpr int64_t kShortestRun = 1 << 10;

// A core keeps too few cache lines in flight to saturate memory while it also stores.
constexpr size_t kPrefetchAhead = 2048;

#if defined(__x86_64__)
// SSE2 is part of x86-64, and four stores fill a cache line just as one 512-bit store does.
void stream_line(uint8_t* to, const uint8_t* from) {
  const auto* line = reinterpret_cast<const __m128i*>(from);
  auto* stores = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(line);
  const __m128i b = _mm_loadu_si128(line + 1);
  const __m128i c = _mm_loadu_si128(line + 2);
  const __m128i d = _mm_loadu_si128(line + 3);
  _mm_stream_si128(stores, a);
  _mm_stream_si128(stores + 1, b);
  _mm_stream_si128(stores + 2, c);
  _mm_stream_si128(stores + 3, d);
}
#endif

#if defined(CKPT_FAST_STREAMS)
void prefetch(const uint8_t* line) { __builtin_prefetch(line, 0, 3); }

void copy_streaming(uint8_t* to, const uint8_t* from, size_t nbytes, const uint8_t* next) {
  const size_t head = std::min(nbytes, (0 - reinterpret_cast<uintptr_t>(to)) & size_t{63});
  std::memcpy(to, from, head);
  size_t at = head;
  for (; at + kPrefetchAhead + 64 <= nbytes; at += 64) {
    prefetch(from + at + kPrefetchAhead);
    stream_line(to + at, from + at);
  }
  for (const uint8_t* ahead = next != nullptr ? next : from + nbytes; at + 64 <= nbytes; at += 64) {
    prefetch(ahead);
    ahead += 64;
    stream_line(to + at, from + at);
  }
  std::memcpy(to + at, from + at, nbytes - at);
}
#endif

}  // namespace

bool streaming_pays(int64_t total_nbytes, int64_t run_nbytes) {
  return total_nbytes >= kCachesNbytes && run_nbytes >= kShortestRun;
}

void copy_memory(void* destination, const void* source, size_t nbytes, Store store, const void* next) {
#if defined(CKPT_FAST_STREAMS)
  if (store == Store::kStreaming) {
    copy_streaming(static_cast<uint8_t*>(destination), static_cast<const uint8_t*>(source), nbytes,
                   static_cast<const uint8_t*>(next));
    return;
  }
#else
  static_cast<void>(store);
  static_cast<void>(next);
#endif
  std::memcpy(destination, source, nbytes);
}

void fence_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace ckpt_fast
