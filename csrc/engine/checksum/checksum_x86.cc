// SPDX-License-Identifier: Apache-2.0
// CRC-32 by folding with carry-less multiplication: lanes of 128 bits are moved forward over the message
// and XORed into the bytes found there, until one lane is left, which the byte tables finish.
#if defined(__x86_64__)

#include <immintrin.h>

#include "engine/checksum/checksum_kernels.h"
#include "engine/checksum/crc32_math.h"
#include "engine/checksum/features_x86.h"

#define TARGET_PCLMUL __attribute__((target("sse4.1,pclmul")))
#define TARGET_AVX512 __attribute__((target("sse4.1,pclmul,avx512f,vpclmulqdq")))

namespace ckpt_fast::crc {

namespace {

enum class Copy { kNone, kCached, kStreaming };

// A core keeps too few cache lines in flight to saturate memory while it also stores; prefetching this far
// ahead makes copies a fifth faster.
constexpr size_t kPrefetchAhead = 2048;

template <Copy copy>
inline void prefetch(const uint8_t* source) {
  if constexpr (copy != Copy::kNone) {
    _mm_prefetch(reinterpret_cast<const char*>(source + kPrefetchAhead), _MM_HINT_T0);
  }
}

constexpr FoldConstants kBy128 = fold_constants(128);
constexpr FoldConstants kBy512 = fold_constants(512);
constexpr FoldConstants kBy2048 = fold_constants(2048);

TARGET_PCLMUL inline __m128i multiplier(FoldConstants k) {
  return _mm_set_epi64x(static_cast<int64_t>(k.high), static_cast<int64_t>(k.low));
}

TARGET_PCLMUL inline __m128i fold(__m128i lane, __m128i k, __m128i next) {
  const __m128i low = _mm_clmulepi64_si128(lane, k, 0x00);
  const __m128i high = _mm_clmulepi64_si128(lane, k, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

template <Copy copy>
TARGET_PCLMUL inline __m128i load(uint8_t* destination, const uint8_t* source) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
  if constexpr (copy == Copy::kCached) _mm_storeu_si128(reinterpret_cast<__m128i*>(destination), bytes);
  if constexpr (copy == Copy::kStreaming) _mm_stream_si128(reinterpret_cast<__m128i*>(destination), bytes);
  return bytes;
}

TARGET_PCLMUL inline uint32_t reduce(__m128i lane) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), lane);
  return update_bytes(bytes, sizeof(bytes), 0);
}

template <Copy copy>
TARGET_PCLMUL uint32_t fold_pclmul(uint8_t* destination, const uint8_t* source, size_t nbytes,
                                   uint32_t state) {
  __m128i lanes[4];
  for (int i = 0; i < 4; ++i) lanes[i] = load<copy>(destination + 16 * i, source + 16 * i);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(state)));
  const __m128i by512 = multiplier(kBy512);
  for (size_t at = 64; at < nbytes; at += 64) {
    prefetch<copy>(source + at);
    for (size_t i = 0; i < 4; ++i) {
      lanes[i] = fold(lanes[i], by512, load<copy>(destination + at + 16 * i, source + at + 16 * i));
    }
  }
  const __m128i by128 = multiplier(kBy128);
  for (int i = 0; i < 3; ++i) lanes[i + 1] = fold(lanes[i], by128, lanes[i + 1]);
  if constexpr (copy == Copy::kStreaming) _mm_sfence();
  return reduce(lanes[3]);
}

TARGET_AVX512 inline __m512i multiplier512(FoldConstants k) {
  const auto low = static_cast<int64_t>(k.low);
  const auto high = static_cast<int64_t>(k.high);
  return _mm512_set_epi64(high, low, high, low, high, low, high, low);
}

TARGET_AVX512 inline __m512i fold(__m512i lanes, __m512i k, __m512i next) {
  const __m512i low = _mm512_clmulepi64_epi128(lanes, k, 0x00);
  const __m512i high = _mm512_clmulepi64_epi128(lanes, k, 0x11);
  return _mm512_ternarylogic_epi64(low, high, next, 0x96);  // three-way XOR
}

template <Copy copy>
TARGET_AVX512 inline __m512i load512(uint8_t* destination, const uint8_t* source) {
  prefetch<copy>(source);
  const __m512i bytes = _mm512_loadu_si512(source);
  if constexpr (copy == Copy::kCached) _mm512_storeu_si512(destination, bytes);
  if constexpr (copy == Copy::kStreaming) _mm512_stream_si512(reinterpret_cast<__m512i*>(destination), bytes);
  return bytes;
}

template <Copy copy>
TARGET_AVX512 uint32_t fold_avx512(uint8_t* destination, const uint8_t* source, size_t nbytes,
                                   uint32_t state) {
  const __m512i by512 = multiplier512(kBy512);
  __m512i first = _mm512_xor_si512(load512<copy>(destination, source),
                                   _mm512_zextsi128_si512(_mm_cvtsi32_si128(static_cast<int>(state))));
  size_t at = 64;
  if (nbytes >= 256) {
    __m512i lanes[4] = {first};
    for (size_t i = 1; i < 4; ++i) lanes[i] = load512<copy>(destination + 64 * i, source + 64 * i);
    const __m512i by2048 = multiplier512(kBy2048);
    for (at = 256; at + 256 <= nbytes; at += 256) {
      for (size_t i = 0; i < 4; ++i) {
        lanes[i] = fold(lanes[i], by2048, load512<copy>(destination + at + 64 * i, source + at + 64 * i));
      }
    }
    for (int i = 0; i < 3; ++i) lanes[i + 1] = fold(lanes[i], by512, lanes[i + 1]);
    first = lanes[3];
  }
  for (; at < nbytes; at += 64) first = fold(first, by512, load512<copy>(destination + at, source + at));
  if constexpr (copy == Copy::kStreaming) _mm_sfence();
  alignas(64) __m128i lanes[4];
  _mm512_store_si512(lanes, first);
  const __m128i by128 = multiplier(kBy128);
  for (int i = 0; i < 3; ++i) lanes[i + 1] = fold(lanes[i], by128, lanes[i + 1]);
  return reduce(lanes[3]);
}

uint32_t update_pclmul(const uint8_t* source, size_t nbytes, uint32_t state) {
  return fold_pclmul<Copy::kNone>(nullptr, source, nbytes, state);
}

uint32_t update_avx512(const uint8_t* source, size_t nbytes, uint32_t state) {
  return fold_avx512<Copy::kNone>(nullptr, source, nbytes, state);
}

}  // namespace

std::vector<Kernels> x86_kernels() {
  std::vector<Kernels> kernels;
  const X86Features features = x86_features();
  if (!features.pclmul) return kernels;
  if (features.vpclmulqdq) {
    kernels.push_back({update_avx512,
                       fold_avx512<Copy::kCached>,
                       fold_avx512<Copy::kStreaming>,
                       {"pclmul", "vpclmulqdq", "avx512"}});
  }
  kernels.push_back({update_pclmul, fold_pclmul<Copy::kCached>, fold_pclmul<Copy::kStreaming>, {"pclmul"}});
  return kernels;
}

}  // namespace ckpt_fast::crc

#endif
