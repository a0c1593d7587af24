// Greedy residual quantization on the GPU; the arguments are those of the CPU, of which `packed`
// and the FirstError slots are not used.
#pragma once

#include "common/gpu.h"
#include "rq_encode/rq_encode_cpu.h"

namespace fedpeft::gpu {

// Bytes of memory for the residuals: 0 where shared memory holds a row, as for every usual D.
int64_t rq_encode_scratch(const RqEncodeArgs& a, DType dtype);
void rq_encode(const RqEncodeArgs& a, DType dtype, void* scratch, Stream stream);

}  // namespace fedpeft::gpu
