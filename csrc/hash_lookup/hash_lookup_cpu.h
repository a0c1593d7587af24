// Multi-hash lookup on the CPU: out = base[item] + sum_h weight_h table[bucket_h(item)], the
// weights being 1, 1 / H or those of a squeeze-and-excitation network (Hu et al., CVPR 2018).
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

struct HashLookupArgs {
  IndexArray items;       // [C * P]
  const int64_t* hashes;  // [H, 2]: a, b
  const void* table;      // [(C,) M, D]
  const void* w1;         // [(C,) S, H], null without SENet
  const void* b1;         // [(C,) S]
  const void* w2;         // [(C,) H, S]
  const void* b2;         // [(C,) H]
  const void* base;       // [I, D] or null
  void* out;              // [C * P, D]
  const void* grad;       // backward: [C * P, D]
  void* grad_table;       // backward: [(C,) M, D] of the accumulator type
  void* grad_senet;    // backward: [(C,) S H + S + H S + H]: w1, b1, w2, b2; shared: a row a block
  void* coefficients;  // shared SENet: [P, H, 2]: gate, gradient of the squeezed value over D
  int64_t positions;   // P
  int64_t num_items;   // I, INT64_MAX without a base
  int64_t M, D, H, S;
  bool per_client;
  bool mean;
  FirstError* bad_item;

  FEDPEFT_INLINE int64_t senet_size() const { return 2 * S * H + S + H; }
  // Accumulators and buckets that a kernel needs, in units of 8 bytes.
  FEDPEFT_INLINE int64_t scratch_size() const { return 6 * H + 2 * S; }
};

struct HashLookupKernels {
  void (*forward[kDTypes])(const HashLookupArgs&, int64_t begin, int64_t end,
                           void* scratch);  // positions
  void (*backward[kDTypes])(const HashLookupArgs&, int64_t begin, int64_t end,
                            void* scratch);  // clients
  // Shared SENet, first pass over positions [begin, end): coefficients, and the gradient of the
  // weights into `into`.
  void (*backward_senet[kDTypes])(const HashLookupArgs&, int64_t begin, int64_t end, void* into,
                                  void* scratch);
  // Shared table: adds entries (position * H + h), null standing for 0 .. count - 1. A mean's 1 / H
  // is left to `finish`.
  void (*backward_entries[kDTypes])(const HashLookupArgs&, const int64_t* entries, int64_t count);
  // Shared table: multiplies rows [begin, end) of the summed gradient by the mean's 1 / H.
  void (*finish[kDTypes])(const HashLookupArgs&, int64_t begin, int64_t end);
};

// SENet's short sums are slower in whole AVX-512 registers.
FEDPEFT_DECLARE_KERNELS(HashLookupKernels, hash_lookup_kernels)
FEDPEFT_DECLARE_WIDE_KERNELS(HashLookupKernels, hash_lookup_kernels)

inline const HashLookupKernels& hash_lookup_kernels_for(const HashLookupArgs& a) {
  return a.w1 ? select_hash_lookup_kernels() : select_wide_hash_lookup_kernels();
}

}  // namespace fedpeft
