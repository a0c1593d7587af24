// Low-rank lookup on the CPU: out = base[item] + B a[row].
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

struct LoraLookupArgs {
  IndexArray items;   // [C * P], reads base
  IndexArray rows;    // [C * P], reads A
  const void* A;      // [(C,) R, r]
  const void* B;      // [(C,) D, r]
  const void* base;   // [I, D] or null
  void* out;          // [C * P, D]
  const void* grad;   // backward: [C * P, D]
  void* grad_A;       // backward: [(C,) R, r] of the accumulator type
  void* grad_B;       // backward: [(C,) D, r] of the accumulator type; shared: [blocks, D, r]
  int64_t positions;  // P
  int64_t num_items;  // I, the bound of items
  int64_t num_rows, rank, D;  // R, r, D
  bool per_client;
  bool separate_rows;  // rows is not items
  FirstError* bad_item;
  FirstError* bad_row;
};

struct LoraLookupKernels {
  // Positions [begin, end); scratch holds rank * D accumulators.
  void (*forward[kDTypes])(const LoraLookupArgs&, int64_t begin, int64_t end, void* scratch);
  // Clients [begin, end): zeroes and fills both gradients; scratch holds 2 * rank * D accumulators.
  void (*backward[kDTypes])(const LoraLookupArgs&, int64_t begin, int64_t end, void* scratch);
  // Shared A: adds the given positions, null standing for 0 .. count - 1; scratch holds rank * D
  // accumulators.
  void (*backward_entries[kDTypes])(const LoraLookupArgs&, const int64_t* positions, int64_t count,
                                    void* scratch);
  // Shared B: the gradient of positions [begin, end) alone, into `into` [D, r]; scratch as
  // backward.
  void (*backward_B[kDTypes])(const LoraLookupArgs&, int64_t begin, int64_t end, void* into,
                              void* scratch);
};

FEDPEFT_DECLARE_KERNELS(LoraLookupKernels, lora_lookup_kernels)

}  // namespace fedpeft
