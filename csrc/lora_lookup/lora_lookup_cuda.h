// Low-rank lookup on the GPU; the arguments are those of the CPU (FirstError slots and gradient
// buffers are not used).
#pragma once

#include "common/position_sum.h"
#include "common/scatter.h"
#include "lora_lookup/lora_lookup_cpu.h"

namespace fedpeft::gpu {

void lora_lookup(const LoraLookupArgs& a, DType dtype, int64_t clients, Stream stream);

// Gradient of A: a scatter of one slot. Gradient of B: a sum over positions. Both outputs have the
// dtype of A. A block a client, which reads the gradient once: whether it suits, and did it.
bool lora_lookup_backward_clients(const LoraLookupArgs& a, DType dtype, int64_t clients,
                                  void* out_A, void* out_B, Stream stream);
// Else in one launch for lists and one block of positions.
void lora_lookup_backward(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const PositionSum& shape, void* out_A, void* out_B, Stream stream);
ScatterShape lora_lookup_shape_A(const LoraLookupArgs& a, int64_t clients);
void lora_lookup_keys(const LoraLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream);
void lora_lookup_backward_A(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                            const SortedEntries& sorted, void* out, Stream stream);
PositionSum lora_lookup_shape_B(const LoraLookupArgs& a, int64_t clients);
void lora_lookup_backward_B(const LoraLookupArgs& a, DType dtype, const PositionSum& shape,
                            void* partial, void* out, Stream stream);

}  // namespace fedpeft::gpu
