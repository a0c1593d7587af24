// Per-client ranking losses over padded scores on the CPU.
//   bpr: mean of softplus(negative - positive), that is -log sigmoid(positive - negative)
//   bce: mean of softplus(-positive) and softplus(negative) over the pair
// A client's sum is taken in double: positions into kLossLanes lanes by p mod kLossLanes, blocks of
// positions in order; padding adds nothing, so that the result does not depend on it.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kLossBlock = 4096;  // positions of a work item
constexpr int64_t kLossLanes = 8;

struct LossArgs {
  const void* positive;  // [C, P]
  const void* negative;  // [C, P]
  IndexArray items;      // [C, P]
  int64_t positions;     // P
  int64_t blocks;        // work items of a client
  double* sums;          // forward: [C * blocks]
  int64_t* counts;       // forward: [C * blocks] positions with an item
  const double* scale;   // backward: [C] gradient of each term of the sum
  void* grad_positive;   // backward: [C, P]
  void* grad_negative;   // backward: [C, P]
};

struct LossKernels {
  // Work items [begin, end) of C * blocks.
  void (*bpr[kDTypes])(const LossArgs&, int64_t begin, int64_t end);
  void (*bce[kDTypes])(const LossArgs&, int64_t begin, int64_t end);
  void (*bpr_backward[kDTypes])(const LossArgs&, int64_t begin, int64_t end);
  void (*bce_backward[kDTypes])(const LossArgs&, int64_t begin, int64_t end);
  void (*count)(const LossArgs&, int64_t begin, int64_t end);
};

FEDPEFT_DECLARE_WIDE_KERNELS(LossKernels, loss_kernels)

}  // namespace fedpeft
