// Universal hashing (Carter and Wegman, 1979): ((a x + b) mod p) mod M with the Mersenne prime p =
// 2^61 - 1.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace fedpeft {

constexpr uint64_t kHashPrime = (uint64_t{1} << 61) - 1;

// (a x + b) mod p for a and b below p and x of any size. Mod a Mersenne prime is a fold of the high
// bits onto the low ones.
FEDPEFT_HD FEDPEFT_INLINE uint64_t hash_value(uint64_t a, uint64_t b, uint64_t x) {
  uint64_t folded = (x & kHashPrime) + (x >> 61);
  if (folded >= kHashPrime) folded -= kHashPrime;
#if defined(__CUDA_ARCH__)
  const uint64_t high = __umul64hi(a, folded), low = a * folded;
#else
  __extension__ typedef unsigned __int128 uint128;
  const uint128 product = uint128(a) * folded;
  const uint64_t high = uint64_t(product >> 64), low = uint64_t(product);
#endif
  uint64_t sum = (low & kHashPrime) + ((low >> 61) | (high << 3));
  if (sum >= kHashPrime) sum -= kHashPrime;
  sum += b;
  if (sum >= kHashPrime) sum -= kHashPrime;
  return sum;
}

FEDPEFT_HD FEDPEFT_INLINE int64_t hash_bucket(uint64_t a, uint64_t b, uint64_t x,
                                              uint64_t buckets) {
  return int64_t(hash_value(a, b, x) % buckets);
}

}  // namespace fedpeft
