// Random draws in vectors: batches of Philox blocks, and the negative item that a draw stands for.
// Included by *_cpu.cpp files only.
#pragma once

#include "common/philox.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

typedef uint64_t Lanes __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
typedef int64_t SignedLanes __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
constexpr int64_t kPerVector = FEDPEFT_VEC_BYTES / 8;
constexpr int64_t kVectors = 4;  // enough independent chains to hide the multiplier's latency
constexpr int64_t kDrawBatch = kVectors * kPerVector;

// Products of the low halves of the lanes.
FEDPEFT_INLINE Lanes multiply_low(Lanes a, Lanes b) {
#if FEDPEFT_VEC_BYTES == 64
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif FEDPEFT_VEC_BYTES == 32
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__aarch64__)
  return (Lanes)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The blocks of V vectors of counters (c0, c1, c2, c3), in place. Only the low halves of the lanes
// have a meaning. Two vectors fit in the registers of any set. Unrolled, so that the compiler
// leaves out words that are not used, and what lanes have in common in the first rounds.
template <int64_t V>
FEDPEFT_INLINE void philox_lanes(Lanes (&c0)[V], Lanes (&c1)[V], Lanes (&c2)[V], Lanes (&c3)[V],
                                 uint64_t seed) {
  const Lanes m0 = Lanes{} + kPhiloxM0, m1 = Lanes{} + kPhiloxM1;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int64_t v = 0; v < V; ++v) {
      const Lanes product0 = multiply_low(m0, c0[v]), product1 = multiply_low(m1, c2[v]);
      c0[v] = (product1 >> 32) ^ c1[v] ^ k0;
      c1[v] = product1;
      c2[v] = (product0 >> 32) ^ c3[v] ^ k1;
      c3[v] = product0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The blocks of kDrawBatch counters (c0, c1, round, stream): words 0 and 1 of each into low, 2 and
// 3 into high (the even word is the low half).
FEDPEFT_INLINE void philox_words(Lanes (&c0)[kVectors], Lanes (&c1)[kVectors], uint32_t round,
                                 uint32_t stream, uint64_t seed, uint64_t* low, uint64_t* high) {
  Lanes c2[kVectors], c3[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    c2[v] = Lanes{} + round;
    c3[v] = Lanes{} + stream;
  }
  philox_lanes(c0, c1, c2, c3, seed);
  for (int64_t v = 0; v < kVectors; ++v) {
    const Lanes words01 = (c0[v] & 0xffffffffu) | c1[v] << 32,
                words23 = (c2[v] & 0xffffffffu) | c3[v] << 32;
    memcpy(low + v * kPerVector, &words01, sizeof(Lanes));
    memcpy(high + v * kPerVector, &words23, sizeof(Lanes));
  }
}

// Whether any bit is set.
FEDPEFT_INLINE bool any_lane(SignedLanes lanes) {
#if FEDPEFT_VEC_BYTES == 64
  return _mm512_test_epi64_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif FEDPEFT_VEC_BYTES == 32
  return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
  return (lanes[0] | lanes[1]) != 0;
#endif
}

// Blocks `first` to first + kDrawBatch - 1 of a client.
FEDPEFT_INLINE void philox_batch(uint64_t first, uint32_t client, uint32_t round, uint32_t stream,
                                 uint64_t seed, uint64_t* low, uint64_t* high) {
  Lanes c0[kVectors], c1[kVectors];
  Lanes lane = {};
  for (int64_t i = 0; i < kPerVector; ++i) lane[i] = uint64_t(i);
  for (int64_t v = 0; v < kVectors; ++v) {
    c0[v] = lane + (first + uint64_t(v * kPerVector));
    c1[v] = Lanes{} + client;
  }
  philox_words(c0, c1, round, stream, seed, low, high);
}

// The words of kElementBatch / 4 blocks of a client from `first` on, in order.
constexpr int64_t kElementVectors = 2;  // fit in the registers of any set
constexpr int64_t kElementBatch = 4 * kElementVectors * kPerVector;
FEDPEFT_INLINE void philox_elements(uint64_t first, uint32_t client, uint32_t round,
                                    uint32_t stream, uint64_t seed, uint32_t* words) {
  Lanes c0[kElementVectors], c1[kElementVectors], c2[kElementVectors], c3[kElementVectors];
  Lanes lane = {};
  for (int64_t i = 0; i < kPerVector; ++i) lane[i] = uint64_t(i);
  for (int64_t v = 0; v < kElementVectors; ++v) {
    c0[v] = lane + (first + uint64_t(v * kPerVector));
    c1[v] = Lanes{} + client;
    c2[v] = Lanes{} + round;
    c3[v] = Lanes{} + stream;
  }
  philox_lanes(c0, c1, c2, c3, seed);
  for (int64_t v = 0; v < kElementVectors; ++v, words += 4 * kPerVector) {
    const Lanes a = (c0[v] & 0xffffffffu) | c1[v] << 32, b = (c2[v] & 0xffffffffu) | c3[v] << 32;
#if FEDPEFT_VEC_BYTES == 64
    const Lanes front = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11),
                back = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#elif FEDPEFT_VEC_BYTES == 32
    const Lanes front = __builtin_shufflevector(a, b, 0, 4, 1, 5),
                back = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#else
    const Lanes front = __builtin_shufflevector(a, b, 0, 2),
                back = __builtin_shufflevector(a, b, 1, 3);
#endif
    memcpy(words, &front, sizeof(front));
    memcpy(words + 2 * kPerVector, &back, sizeof(back));
  }
}

// One block of each of kDrawBatch clients.
FEDPEFT_INLINE void philox_of_clients(const uint64_t* clients, uint32_t index, uint32_t round,
                                      uint32_t stream, uint64_t seed, uint64_t* low,
                                      uint64_t* high) {
  Lanes c0[kVectors], c1[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) {
    c0[v] = Lanes{} + index;
    memcpy(&c1[v], clients + v * kPerVector, sizeof(Lanes));
  }
  philox_words(c0, c1, round, stream, seed, low, high);
}

// The k-th (from 0) of the items that are not among the n ascending `positives`: k + j for the
// number j of positives with positives[j] - j <= k. The search has no branch on data: draws are
// random, so that half of its branches would be mispredicted.
template <typename Index>
FEDPEFT_INLINE int64_t kth_negative(const Index* positives, int64_t n, int64_t k) {
  int64_t j = 0;
  while (n > 1) {
    const int64_t half = n / 2, last = j + half - 1;
    j += half & -int64_t(int64_t(positives[last]) - last <= k);
    n -= half;
  }
  if (n == 1) j += int64_t(positives[j]) - j <= k;
  return k + j;
}

// The same for each of `ranks` [kDrawBatch], in step, so that their chains of loads overlap.
template <typename Index, typename Item>
FEDPEFT_INLINE void kth_negatives(const Index* positives, int64_t n, const int64_t* ranks,
                                  Item* items) {
  int64_t j[kDrawBatch] = {};
  while (n > 1) {
    const int64_t half = n / 2;
    for (int64_t i = 0; i < kDrawBatch; ++i) {
      const int64_t last = j[i] + half - 1;
      j[i] += half & -int64_t(int64_t(positives[last]) - last <= ranks[i]);
    }
    n -= half;
  }
  for (int64_t i = 0; i < kDrawBatch; ++i) {
    if (n == 1) j[i] += int64_t(positives[j[i]]) - j[i] <= ranks[i];
    items[i] = Item(ranks[i] + j[i]);
  }
}

}  // namespace fedpeft::FEDPEFT_ISA
