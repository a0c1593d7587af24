// Optimizer steps on the GPU; the arguments are those of the CPU, of which `rows` and `blocks` are
// not used. `row` is the last dimension.
#pragma once

#include "client_optim/client_optim_cpu.h"
#include "common/gpu.h"

namespace fedpeft::gpu {

void client_adam(const ClientOptimArgs& a, DType dtype, int64_t clients, Stream stream);
void client_sgd(const ClientOptimArgs& a, DType dtype, int64_t clients, Stream stream);

}  // namespace fedpeft::gpu
