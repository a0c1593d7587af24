// Batched embedding on the CPU: out = weight[client, row].
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

struct ClientEmbeddingArgs {
  IndexArray rows;      // [C * P]
  const void* weight;   // [(C,) R, D]
  void* out;            // [C * P, D]
  const void* grad;     // backward: [C * P, D]
  void* grad_weight;    // backward: [(C,) R, D] of the accumulator type
  int64_t positions;    // P
  int64_t num_rows, D;  // R, D
  bool per_client;
  FirstError* bad_row;
};

struct ClientEmbeddingKernels {
  void (*forward[kDTypes])(const ClientEmbeddingArgs&, int64_t begin, int64_t end);   // positions
  void (*backward[kDTypes])(const ClientEmbeddingArgs&, int64_t begin, int64_t end);  // clients
  void (*backward_entries[kDTypes])(const ClientEmbeddingArgs&, const int64_t* positions,
                                    int64_t count);
};

FEDPEFT_DECLARE_KERNELS(ClientEmbeddingKernels, client_embedding_kernels)

}  // namespace fedpeft
