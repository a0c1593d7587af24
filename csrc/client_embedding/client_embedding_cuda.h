// Batched embedding on the GPU; the arguments are those of the CPU (FirstError slots are not used).
#pragma once

#include "client_embedding/client_embedding_cpu.h"
#include "common/scatter.h"

namespace fedpeft::gpu {

void client_embedding(const ClientEmbeddingArgs& a, DType dtype, int64_t clients, Stream stream);

// Gradient of the weight as a scatter of one slot; `out` has the dtype of grad.
ScatterShape client_embedding_shape(const ClientEmbeddingArgs& a, DType dtype, int64_t clients);
void client_embedding_keys(const ClientEmbeddingArgs& a, const ScatterPlan& plan, void* keys,
                           Stream stream);
void client_embedding_backward(const ClientEmbeddingArgs& a, DType dtype, const ScatterPlan& plan,
                               const SortedEntries& sorted, void* out, Stream stream);

}  // namespace fedpeft::gpu
