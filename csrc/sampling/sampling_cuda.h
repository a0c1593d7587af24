// Counter-based draws on the GPU, the same as the CPU's; the arguments are those of the CPU, of
// which `blocks` and the FirstError slot are not used.
#pragma once

#include "common/gpu.h"
#include "sampling/sampling_cpu.h"

namespace fedpeft::gpu {

// users: the length of indptr less one; nnz: that of indices.
void sample_negatives(const SampleNegativesArgs& a, int64_t clients, int64_t users, int64_t nnz,
                      Stream stream);
void client_dropout(const ClientDropoutArgs& a, DType dtype, int64_t clients, Stream stream);

}  // namespace fedpeft::gpu
