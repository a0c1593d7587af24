// Ranking losses on the GPU. Sums are in double and in a fixed order: positions into threads by p
// mod 256, threads by a tree, blocks of positions in order; padding adds nothing.
#pragma once

#include "common/gpu.h"
#include "losses/losses_cpu.h"

namespace fedpeft::gpu {

// a.sums and a.counts [C, blocks] are scratch; `out` is [C] of the dtype.
void ranking_loss(const LossArgs& a, DType dtype, bool bpr, int64_t clients, void* out,
                  Stream stream);
// a.counts is scratch; `grad` is [C] of the dtype.
void ranking_loss_backward(const LossArgs& a, DType dtype, bool bpr, int64_t clients,
                           const void* grad, Stream stream);

}  // namespace fedpeft::gpu
