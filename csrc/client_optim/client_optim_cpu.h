// One optimizer step over stacked per-client parameters [C, ...] on the CPU, in one pass over
// memory. A row is a run of the last dimension: L2 applies to rows whose gradient is not all zero.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

// 16-bit parameters and gradients keep their moments in float32.
struct ClientOptimArgs {
  void* param;            // [C, size]
  const void* grad;       // [C, size]
  void* exp_avg;          // Adam: [C, size] of the accumulator type
  void* exp_avg_sq;       // Adam: [C, size] of the accumulator type
  IndexArray steps;       // Adam: [C], 1-based; below 1 the client is skipped
  void* momentum_buffer;  // SGD: [C, size] of the accumulator type, or null
  int64_t size;           // elements of a client
  int64_t row;            // elements of a row; the last row of a client may be shorter
  int64_t rows;           // rows of a work item
  int64_t blocks;         // work items of a client
  double lr, beta1, beta2, eps, momentum, l2;
};

struct ClientOptimKernels {
  // Work items [begin, end) of C * blocks.
  void (*adam[kDTypes])(const ClientOptimArgs&, int64_t begin, int64_t end);
  void (*sgd[kDTypes])(const ClientOptimArgs&, int64_t begin, int64_t end);
};

FEDPEFT_DECLARE_KERNELS(ClientOptimKernels, client_optim_kernels)

}  // namespace fedpeft
