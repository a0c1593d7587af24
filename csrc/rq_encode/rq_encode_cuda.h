// Greedy residual quantization on the GPU; the arguments are those of the CPU, of which `packed`
// and the FirstError slots are not used.
#pragma once

#include "common/gpu.h"
#include "rq_encode/rq_encode_cpu.h"

namespace fedpeft::gpu {

void rq_encode(const RqEncodeArgs& a, DType dtype, Stream stream);

}  // namespace fedpeft::gpu
