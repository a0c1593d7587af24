// Residual-quantization lookup on the CPU: out = base[item] + sum_l codebooks[l, codes[item, l]].
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

struct RqLookupArgs {
  IndexArray items;       // [C * P]
  IndexArray codes;       // [I, L]
  const void* codebooks;  // [(C,) L, K, D]
  const void* base;       // [I, D] or null
  void* out;              // [C * P, D]
  const void* grad;       // backward: [C * P, D]
  void* grad_codebooks;   // backward: [(C,) L, K, D] of the accumulator type
  int64_t positions;      // P
  int64_t num_items, L, K, D;
  bool per_client;
  FirstError* bad_item;
  FirstError* bad_code;  // flat index into codes
};

struct RqLookupKernels {
  // Positions [begin, end) of all clients.
  void (*forward[kDTypes])(const RqLookupArgs&, int64_t begin, int64_t end);
  // Clients [begin, end): zeroes and fills their gradient.
  void (*backward[kDTypes])(const RqLookupArgs&, int64_t begin, int64_t end);
  // Adds entries (position * L + level) to a shared gradient.
  void (*backward_entries[kDTypes])(const RqLookupArgs&, const int64_t* entries, int64_t count);
};

FEDPEFT_DECLARE_WIDE_KERNELS(RqLookupKernels, rq_lookup_kernels)

}  // namespace fedpeft
