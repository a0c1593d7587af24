// Scores of a client's item vectors against its user vector on the CPU.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kScoreBlock = 4096;  // positions of a work item

struct DotScoresArgs {
  const void* vectors;   // [C, P, D]
  const void* user;      // [C, D]
  void* out;             // forward: [C, P]
  const void* grad;      // backward: [C, P]
  void* grad_vectors;    // backward: [C, P, D]
  void* partial;         // backward: [C * blocks, D] of the accumulator type
  void* grad_user;       // backward: [C, D]
  int64_t positions, D;  // P, D
  int64_t blocks;        // work items of a client
};

struct DotScoresKernels {
  // Work items [begin, end) of C * blocks.
  void (*forward[kDTypes])(const DotScoresArgs&, int64_t begin, int64_t end);
  // Work items [begin, end) of C * blocks: grad_vectors, and each block's sum for grad_user.
  void (*backward[kDTypes])(const DotScoresArgs&, int64_t begin, int64_t end);
  // Clients [begin, end): adds their blocks in order.
  void (*backward_user[kDTypes])(const DotScoresArgs&, int64_t begin, int64_t end);
};

FEDPEFT_DECLARE_KERNELS(DotScoresKernels, dot_scores_kernels)

}  // namespace fedpeft
