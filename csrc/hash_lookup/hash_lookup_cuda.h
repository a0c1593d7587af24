// Multi-hash lookup on the GPU; the arguments are those of the CPU (the FirstError slot and
// gradient buffers are not used).
#pragma once

#include "common/position_sum.h"
#include "common/scatter.h"
#include "hash_lookup/hash_lookup_cpu.h"

namespace fedpeft::gpu {

void hash_buckets(const IndexArray& items, const int64_t* hashes, int64_t* out, int64_t count,
                  int64_t H, int64_t table_size, Stream stream);
// Bytes of memory that a lookup with SENet needs: 0 where shared memory holds a position's
// activations, as for every usual H and S.
int64_t hash_lookup_scratch(const HashLookupArgs& a, DType dtype);
void hash_lookup(const HashLookupArgs& a, DType dtype, int64_t clients, void* scratch,
                 Stream stream);

// With SENet, before the two gradients: a.coefficients [C * P, H, 2] and `activations` [C * P, 2 H
// + 2 S] of every position, both of the accumulator type.
inline int64_t hash_activations(const HashLookupArgs& a) { return 2 * a.H + 2 * a.S; }
void hash_lookup_activations(const HashLookupArgs& a, DType dtype, int64_t clients, void* scratch,
                             void* activations, Stream stream);

// Where the gradients of the SENet go, of the dtype of the table.
struct SENetGradients {
  void *w1, *b1, *w2, *b2;
};

// With SENet, everything in one launch, a block a client, for tables of clients' own (or a shared
// one as that of one client) whose lists are short. False where that does not fit: nothing was
// launched.
bool hash_lookup_backward_whole(const HashLookupArgs& a, DType dtype, int64_t clients, void* out,
                                const SENetGradients& weights, Stream stream);

// Gradient of the table: a scatter of H slots. Gradient of the SENet: a sum over positions. Outputs
// have the dtype of the table.
ScatterShape hash_lookup_shape(const HashLookupArgs& a, DType dtype, int64_t clients);
void hash_lookup_keys(const HashLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream);
void hash_lookup_backward(const HashLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const SortedEntries& sorted, void* out, Stream stream);
PositionSum hash_lookup_shape_senet(const HashLookupArgs& a, int64_t clients);
void hash_lookup_backward_senet(const HashLookupArgs& a, DType dtype, const PositionSum& shape,
                                const void* activations, void* partial, const SENetGradients& out,
                                Stream stream);

}  // namespace fedpeft::gpu
