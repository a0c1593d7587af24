// CPU kernels of sample_negatives and client_dropout. Philox blocks are made in batches, a block a
// lane.
#include "sampling/sampling_cpu.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/philox.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

typedef uint64_t Lanes __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
constexpr int64_t kPerVector = FEDPEFT_VEC_BYTES / 8;
constexpr int64_t kVectors = 4;  // enough independent chains to hide the multiplier's latency
constexpr int64_t kBatch = kVectors * kPerVector;

// Products of the low halves of the lanes.
FEDPEFT_INLINE Lanes multiply_low(Lanes a, Lanes b) {
#if defined(__AVX512F__)
  return (Lanes)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Lanes)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Lanes)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Blocks `first` to first + kBatch - 1: words 0 and 1 of each into low, 2 and 3 into high (the even
// word is the low half). Only the low halves of the lanes have a meaning on the way.
FEDPEFT_INLINE void philox_batch(uint64_t first, uint32_t client, uint32_t round, uint32_t stream,
                                 uint64_t seed, uint64_t* low, uint64_t* high) {
  Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];
  Lanes lane = {};
  for (int64_t i = 0; i < kPerVector; ++i) lane[i] = uint64_t(i);
  for (int64_t v = 0; v < kVectors; ++v) {
    c0[v] = lane + (first + uint64_t(v * kPerVector));
    c1[v] = Lanes{} + client;
    c2[v] = Lanes{} + round;
    c3[v] = Lanes{} + stream;
  }
  const Lanes m0 = Lanes{} + kPhiloxM0, m1 = Lanes{} + kPhiloxM1;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round_ = 0; round_ < kPhiloxRounds; ++round_) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const Lanes product0 = multiply_low(m0, c0[v]), product1 = multiply_low(m1, c2[v]);
      c0[v] = (product1 >> 32) ^ c1[v] ^ k0;
      c1[v] = product1;
      c2[v] = (product0 >> 32) ^ c3[v] ^ k1;
      c3[v] = product0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  for (int64_t v = 0; v < kVectors; ++v) {
    const Lanes words01 = (c0[v] & 0xffffffffu) | c1[v] << 32,
                words23 = (c2[v] & 0xffffffffu) | c3[v] << 32;
    memcpy(low + v * kPerVector, &words01, sizeof(Lanes));
    memcpy(high + v * kPerVector, &words23, sizeof(Lanes));
  }
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

template <typename Item, typename Index>
void negatives(const SampleNegativesArgs& a, int64_t begin, int64_t end) {
  const Item* items = static_cast<const Item*>(a.items.data);
  Item* all = static_cast<Item*>(a.out);
  for (int64_t work = begin; work < end; ++work) {
    const int64_t block = work % a.blocks, draw = work / a.blocks;  // draw: client and epoch
    const int64_t c = draw / a.epochs;
    const int64_t client = a.clients[c];
    const int64_t start = a.indptr[client], n = a.indptr[client + 1] - start;
    const Index* positives = static_cast<const Index*>(a.indices.data) + start;
    const uint64_t choices = uint64_t(a.num_items - n);
    const uint32_t stream = philox_stream(Purpose::negatives, 0, uint32_t(draw % a.epochs));
    const Item* in = items + c * a.positions;
    Item* out = all + draw * a.positions;
    const int64_t first = block * kNegativesBlock;
    const int64_t last =
        first + kNegativesBlock < a.positions ? first + kNegativesBlock : a.positions;
    for (int64_t p = first; p < last; p += kBatch) {
      uint64_t random[kBatch], unused[kBatch];
      philox_batch(uint64_t(p), uint32_t(client), a.round, stream, a.seed, random, unused);
      const int64_t count = last - p < kBatch ? last - p : kBatch;
      for (int64_t i = 0; i < count; ++i) {
        const Position kind = classify(int64_t(in[p + i]), a.num_items);
        if (kind != Position::item) {
          if (kind == Position::bad) a.bad_item->report(c * a.positions + p + i);
          out[p + i] = -1;
          continue;
        }
        const uint64_t k = multiply_high(random[i], choices);
        out[p + i] = Item(kth_negative(positives, n, int64_t(k)));
      }
    }
  }
}

void negatives_any(const SampleNegativesArgs& a, int64_t begin, int64_t end) {
  if (a.items.bytes == 8) {
    a.indices.bytes == 8 ? negatives<int64_t, int64_t>(a, begin, end)
                         : negatives<int64_t, int32_t>(a, begin, end);
  } else {
    a.indices.bytes == 8 ? negatives<int32_t, int64_t>(a, begin, end)
                         : negatives<int32_t, int32_t>(a, begin, end);
  }
}

template <typename T>
void dropout(const ClientDropoutArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A scale = A(a.scale);
  const uint32_t stream = philox_stream(Purpose::dropout, a.layer, a.epoch);
  for (int64_t work = begin; work < end; ++work) {
    const int64_t c = work / a.blocks;
    const uint32_t client = uint32_t(a.clients[c]);
    const int64_t first = (work % a.blocks) * kDropoutBlock;
    const int64_t last = first + kDropoutBlock < a.size ? first + kDropoutBlock : a.size;
    const T* x = static_cast<const T*>(a.x) + c * a.size;
    T* out = static_cast<T*>(a.out) + c * a.size;
    for (int64_t e = first; e < last; e += 4 * kBatch) {
      uint64_t low[kBatch], high[kBatch];
      uint32_t word[4 * kBatch];
      philox_batch(uint64_t(e / 4), client, a.round, stream, a.seed, low, high);
      for (int64_t i = 0; i < kBatch; ++i) {
        word[4 * i] = uint32_t(low[i]);
        word[4 * i + 1] = uint32_t(low[i] >> 32);
        word[4 * i + 2] = uint32_t(high[i]);
        word[4 * i + 3] = uint32_t(high[i] >> 32);
      }
      const int64_t count = last - e < 4 * kBatch ? last - e : 4 * kBatch;
      for (int64_t i = 0; i < count; ++i) {
        const A value = to_acc(x[e + i]) * scale;
        from_acc(word[i] >= a.threshold ? value : A(0), out + e + i);
      }
    }
  }
}

}  // namespace

const SamplingKernels sampling_kernels = {
    negatives_any,
    {dropout<float>, dropout<double>, dropout<Half>, dropout<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
