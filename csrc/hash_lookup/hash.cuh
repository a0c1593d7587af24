// Items and their buckets on the GPU, and what all kernels of hash_lookup share.
#pragma once

#include "common/hash.h"
#include "common/staged_rows.cuh"
#include "hash_lookup/hash_lookup_cuda.h"

namespace fedpeft::gpu {
// Unnamed, as in the headers of SENet, which one source file includes: of what no other can call
// nvcc makes up to a tenth less code.
namespace {

constexpr int kThreads = 256;

// sum % M, by one multiplication with floor((2^64 - 1) / M).
struct Modulus {
  uint64_t M, reciprocal;
  explicit Modulus(int64_t m) : M(uint64_t(m)), reciprocal(~uint64_t{0} / uint64_t(m)) {}
  FEDPEFT_DEVICE int64_t operator()(uint64_t x) const {
#if defined(__CUDA_ARCH__)
    const uint64_t quotient = __umul64hi(x, reciprocal);
#else
    __extension__ using uint128 = unsigned __int128;
    const uint64_t quotient = uint64_t(uint128(x) * reciprocal >> 64);
#endif
    // The quotient is at most two too small, and the rest so below 3 M.
    if (M >> 30 == 0) {
      const uint32_t m = uint32_t(M);
      uint32_t rest = uint32_t(x) - uint32_t(quotient) * m;
      if (rest >= m) rest -= m;
      if (rest >= m) rest -= m;
      return int64_t(rest);
    }
    uint64_t rest = x - quotient * M;
    if (rest >= M) rest -= M;
    if (rest >= M) rest -= M;
    return int64_t(rest);
  }
};

// hash_value, with half of the multiplications where x has 32 bits.
FEDPEFT_DEVICE uint64_t hash_of(uint64_t a, uint64_t b, uint64_t x) {
  if (x >> 32 != 0) return hash_value(a, b, x);
  const uint64_t low = (a & 0xffffffffu) * x, high = (a >> 32) * x + (low >> 32);
  // a x = high 2^32 + (low's lower half), below 2^93; its bits from 61 on are those of high
  // from 29.
  uint64_t sum = ((high & 0x1fffffffu) << 32 | (low & 0xffffffffu)) + (high >> 29);
  if (sum >= kHashPrime) sum -= kHashPrime;
  sum += b;
  if (sum >= kHashPrime) sum -= kHashPrime;
  return sum;
}

struct Hash {
  uint64_t a, b;
  FEDPEFT_DEVICE Hash(const int64_t* hashes, int64_t h)
      : a(uint64_t(hashes[2 * h])), b(uint64_t(hashes[2 * h + 1])) {
    if (a >= kHashPrime || b >= kHashPrime)
      FEDPEFT_BAD_VALUE("hashes: expected values from 0 to 2^61 - 2");
  }
};

// The bucket of an item of at least 0 under hash h.
FEDPEFT_DEVICE int64_t bucket_of(const int64_t* hashes, const Modulus& modulus, int64_t item,
                                 int64_t h) {
  const Hash hash(hashes, h);
  return modulus(hash_of(hash.a, hash.b, uint64_t(item)));
}

FEDPEFT_DEVICE void check_item(const HashLookupArgs& a, int64_t item, int64_t n) {
  if (classify(item, a.num_items) == Position::bad)
    FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
}

// Columns of an item's base vector, if there is one; at padding something else that lies in memory,
// since loads under a condition wait for each other.
template <int V, typename T>
FEDPEFT_DEVICE Pack<T, V> base_at(const HashLookupArgs& a, int64_t item, int64_t column) {
  if (!a.base) return zero_pack<V, T>();
  return load_pack<V>(item >= 0 ? static_cast<const T*>(a.base) + item * a.D + column
                                : static_cast<const T*>(a.table));
}

// The item at position n, -1 at padding.
FEDPEFT_DEVICE int64_t item_at(const HashLookupArgs& a, int64_t n) {
  const int64_t item = a.items[n];
  check_item(a, item, n);
  return item;
}

// Buckets of the `count` entries (position, hash) from position `first` of all clients on, -1 at
// padding; a thread has kBatch items under way at a time.
template <int kBatch>
FEDPEFT_DEVICE void hash_entries(const HashLookupArgs& a, const Modulus& modulus, int64_t first,
                                 int count, int* bucket, int* copy) {
  const int H = int(a.H), threads = int(blockDim.x);
  for (int start = int(threadIdx.x); start < count; start += kBatch * threads) {
    int64_t place[kBatch], item[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int e = start + k * threads;
      place[k] = e < count ? first + int(unsigned(e) / unsigned(H)) : -1;
    }
    gather(a.items, place, item);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int e = start + k * threads;
      if (e >= count) break;
      const int p = int(unsigned(e) / unsigned(H));
      check_item(a, item[k], first + p);
      const int to = item[k] < 0 ? -1 : int(bucket_of(a.hashes, modulus, item[k], e - p * H));
      bucket[e] = to;
      if (copy) copy[e] = to;
    }
  }
}

FEDPEFT_HD RowSums row_sums(const HashLookupArgs& a) {
  return {a.table, a.base, a.out, a.items, a.num_items, a.positions, a.D, int(a.M), int(a.H)};
}

}  // namespace
}  // namespace fedpeft::gpu
