// Residual-quantization lookup on the GPU; the arguments are those of the CPU (FirstError slots are
// not used).
#pragma once

#include "common/scatter.h"
#include "rq_lookup/rq_lookup_cpu.h"

namespace fedpeft::gpu {

void rq_lookup(const RqLookupArgs& a, DType dtype, int64_t clients, Stream stream);

// Gradient of the codebooks as a scatter of L slots into tables of L * K rows; `out` has the dtype
// of grad.
ScatterShape rq_lookup_shape(const RqLookupArgs& a, DType dtype, int64_t clients);
void rq_lookup_keys(const RqLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream);
void rq_lookup_backward(const RqLookupArgs& a, DType dtype, const ScatterPlan& plan,
                        const SortedEntries& sorted, void* out, Stream stream);

}  // namespace fedpeft::gpu
