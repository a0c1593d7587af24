// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four
// random words as a function of a 64-bit key and a 128-bit counter. Torch-free, for host and
// device; fedpeft_ext/ops/philox.py is the same word for word.
#pragma once

#include <cstdint>

#include "common/types.h"

#if defined(__CUDACC__)
#define FEDPEFT_HD __host__ __device__
#else
#define FEDPEFT_HD
#endif

namespace fedpeft {

// What a draw is for; each purpose is a stream of its own.
enum class Purpose : uint32_t {
  negatives = 1,
  dropout = 2,
  initialisation = 3,
  noise = 4,
  client_sampling = 5,
  evaluation_candidates = 6,
  batch_order = 7,
};

// Last counter word. layer < 2^8, epoch < 2^16.
FEDPEFT_HD FEDPEFT_INLINE uint32_t philox_stream(Purpose purpose, uint32_t layer, uint32_t epoch) {
  return uint32_t(purpose) << 24 | layer << 16 | epoch;
}

struct PhiloxBlock {
  uint32_t word[4];

  // Words 1 (high) and 0 (low) as one number.
  FEDPEFT_HD FEDPEFT_INLINE uint64_t low64() const { return uint64_t(word[1]) << 32 | word[0]; }
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments

struct PhiloxProduct {
  uint32_t low, high;
};
FEDPEFT_HD FEDPEFT_INLINE PhiloxProduct philox_product(uint32_t multiplier, uint32_t c) {
#if defined(__CUDA_ARCH__)
  // Of 64-bit integers, compilers would add the high halves, which are zero, to the product.
  PhiloxProduct product;
  asm("{\n\t.reg .u64 wide;\n\tmul.wide.u32 wide, %2, %3;\n\tmov.b64 {%0, %1}, wide;\n\t}"
      : "=r"(product.low), "=r"(product.high)
      : "r"(c), "r"(multiplier));
  return product;
#else
  const uint64_t product = uint64_t{multiplier} * c;
  return {uint32_t(product), uint32_t(product >> 32)};
#endif
}

// Block of counter (index, client, round, stream) under key `seed`. `index` is a position, or a
// block of four elements.
FEDPEFT_HD FEDPEFT_INLINE PhiloxBlock philox(uint32_t index, uint32_t client, uint32_t round,
                                             uint32_t stream, uint64_t seed) {
  uint32_t c0 = index, c1 = client, c2 = round, c3 = stream;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const PhiloxProduct product0 = philox_product(kPhiloxM0, c0);
    const PhiloxProduct product1 = philox_product(kPhiloxM1, c2);
    c0 = product1.high ^ c1 ^ k0;
    c1 = product1.low;
    c2 = product0.high ^ c3 ^ k1;
    c3 = product0.low;
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

// floor(a * b / 2^64): maps a uniform 64-bit `a` to [0, b).
FEDPEFT_HD FEDPEFT_INLINE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  __extension__ using uint128 = unsigned __int128;
  return uint64_t(uint128(a) * b >> 64);
#endif
}

}  // namespace fedpeft
