// CPU kernels of sample_negatives, client_dropout and sample_clients. Philox blocks are made in
// batches, a block a lane.
#include "sampling/sampling_cpu.h"

#include "common/draws.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

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
    for (int64_t p = first; p < last; p += kDrawBatch) {
      uint64_t random[kDrawBatch], unused[kDrawBatch];
      philox_batch(uint64_t(p), uint32_t(client), a.round, stream, a.seed, random, unused);
      const int64_t count = last - p < kDrawBatch ? last - p : kDrawBatch;
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
    for (int64_t e = first; e < last; e += kElementBatch) {
      uint32_t word[kElementBatch];
      philox_elements(uint64_t(e / 4), client, a.round, stream, a.seed, word);
      const int64_t count = last - e < kElementBatch ? last - e : kElementBatch;
      for (int64_t i = 0; i < count; ++i) {
        const A value = to_acc(x[e + i]) * scale;
        from_acc(word[i] >= a.threshold ? value : A(0), out + e + i);
      }
    }
  }
}

void client_keys(const ClientKeysArgs& a, int64_t begin, int64_t end) {
  const uint32_t stream = philox_stream(Purpose::client_sampling, 0, 0);
  for (int64_t i = begin; i < end; i += kDrawBatch) {
    const int64_t count = end - i < kDrawBatch ? end - i : kDrawBatch;
    uint64_t client[kDrawBatch] = {}, low[kDrawBatch], high[kDrawBatch];
    for (int64_t j = 0; j < count; ++j) client[j] = uint64_t(a.clients[i + j]);
    philox_of_clients(client, a.attempt, a.round, stream, a.seed, low, high);
    for (int64_t j = 0; j < count; ++j) a.keys[i + j] = low[j];
  }
}

// Ids of one vector; of the last, the lanes from `count` on are those of client 0.
template <typename Id>
FEDPEFT_INLINE Lanes load_ids(const Id* ids, int64_t count) {
  Lanes lanes = {};
  if constexpr (sizeof(Id) == 8) {
    if (count >= kPerVector) {
      memcpy(&lanes, ids, sizeof(Lanes));
      return lanes;
    }
  }
  for (int64_t j = 0; j < kPerVector && j < count; ++j) lanes[j] = uint64_t(int64_t(ids[j]));
  return lanes;
}

// Of the last words of the key's block only one is looked at, and lanes differ in one counter word
// alone: half the work of whole keys.
template <typename Id>
int64_t smallest_keys(const ClientKeysArgs& a, int64_t begin, int64_t end, uint32_t bound,
                      int64_t* places, bool* bad_id) {
  constexpr int64_t V = 2;
  const Id* ids = static_cast<const Id*>(a.clients.data);
  const uint32_t stream = philox_stream(Purpose::client_sampling, 0, 0);
  const uint32_t attempt = a.attempt, round = a.round;  // which `places` could alias in `a`
  const uint64_t seed = a.seed;
  const SignedLanes limit = SignedLanes{} + (int64_t(bound) + 1);
  Lanes high_bits = {};
  int64_t found = 0;
  for (int64_t i = begin; i < end; i += V * kPerVector) {
    Lanes c0[V], c1[V], c2[V], c3[V];
    for (int64_t v = 0; v < V; ++v) {
      c0[v] = Lanes{} + attempt;
      c1[v] = load_ids(ids + i + v * kPerVector, end - i - v * kPerVector);
      c2[v] = Lanes{} + round;
      c3[v] = Lanes{} + stream;
      high_bits |= c1[v];
    }
    philox_lanes(c0, c1, c2, c3, seed);
    SignedLanes below[V], any = {};
    for (int64_t v = 0; v < V; ++v) {
      below[v] = SignedLanes(c1[v] & 0xffffffffu) < limit;
      any |= below[v];
    }
    if (any_lane(any)) [[unlikely]] {
      const int64_t count = end - i < V * kPerVector ? end - i : V * kPerVector;
      for (int64_t j = 0; j < count; ++j) {
        places[found] = i + j;
        found -= below[j / kPerVector][j % kPerVector];  // -1 where it is below
      }
    }
  }
  *bad_id = any_lane(SignedLanes(high_bits >> 32));
  return found;
}

int64_t smallest_keys_any(const ClientKeysArgs& a, int64_t begin, int64_t end, uint32_t bound,
                          int64_t* places, bool* bad_id) {
  return a.clients.bytes == 8 ? smallest_keys<int64_t>(a, begin, end, bound, places, bad_id)
                              : smallest_keys<int32_t>(a, begin, end, bound, places, bad_id);
}

void client_places(const ClientKeysArgs& a, int64_t n, int64_t begin, int64_t end,
                   int64_t* places) {
  const uint32_t stream = philox_stream(Purpose::client_sampling, kPlacesLayer, 0);
  for (int64_t i = begin; i < end; i += kDrawBatch) {
    uint64_t random[kDrawBatch], unused[kDrawBatch];
    philox_batch(uint64_t(i), a.attempt, a.round, stream, a.seed, random, unused);
    const int64_t count = end - i < kDrawBatch ? end - i : kDrawBatch;
    for (int64_t j = 0; j < count; ++j)
      places[i - begin + j] = int64_t(multiply_high(random[j], uint64_t(n)));
  }
}

}  // namespace

const SamplingKernels sampling_kernels = {
    negatives_any, {dropout<float>, dropout<double>, dropout<Half>, dropout<BFloat16>},
    client_keys,   smallest_keys_any,
    client_places,
};

}  // namespace fedpeft::FEDPEFT_ISA
