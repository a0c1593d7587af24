// Scores of a client's item vectors on the GPU; the arguments are those of the CPU, of which
// `blocks` and `partial` are not used.
#pragma once

#include "common/gpu.h"
#include "common/position_sum.h"
#include "losses/dot_scores_cpu.h"

namespace fedpeft::gpu {

void dot_scores(const DotScoresArgs& a, DType dtype, int64_t clients, Stream stream);
// Gradients of the vectors and of the user, the latter a sum over positions: one launch, and one
// more where there are several blocks of positions.
PositionSum dot_scores_shape_user(const DotScoresArgs& a, int64_t clients);
void dot_scores_backward(const DotScoresArgs& a, DType dtype, const PositionSum& shape,
                         void* partial, Stream stream);

}  // namespace fedpeft::gpu
