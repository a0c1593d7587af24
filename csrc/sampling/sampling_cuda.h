// Counter-based draws on the GPU, the same as the CPU's; the arguments are those of the CPU, of
// which `blocks`, `keys` and the FirstError slot are not used.
#pragma once

#include "common/gpu.h"
#include "sampling/sampling_cpu.h"

namespace fedpeft::gpu {

// users: the length of indptr less one; nnz: that of indices.
void sample_negatives(const SampleNegativesArgs& a, int64_t clients, int64_t users, int64_t nnz,
                      Stream stream);
void client_dropout(const ClientDropoutArgs& a, DType dtype, int64_t clients, Stream stream);

// Memory that sample_clients works in.
struct SampleClientsRoom {
  static constexpr int kBins = 2048, kNumbers = 3;
  unsigned* bins;  // [kBins + kNumbers], zero: clients by the first bits of their keys, and numbers
  unsigned* near;  // [n]: places of the clients in the bin where the sample ends
};
// Writes the `count` of n clients (below 2^31) with the smallest keys to `chosen`, in any order.
void sample_clients(const ClientKeysArgs& a, int64_t n, int64_t count,
                    const SampleClientsRoom& room, int64_t* chosen, Stream stream);

// Writes the clients at the first `count` places drawn that differ to `chosen`, in any order.
// room: [1 + n / 32 + 1], zero: how many were found, and a bit a place.
void sample_places(const ClientKeysArgs& a, int64_t n, int64_t count, unsigned* room,
                   int64_t* chosen, Stream stream);

// Writes the clients whose keys are `key_below` the limit to `chosen` [n], in any order, and
// returns how many; `found` is zero before.
int64_t sample_below(const ClientKeysArgs& a, int64_t n, uint64_t limit, unsigned* found,
                     int64_t* chosen, Stream stream);

}  // namespace fedpeft::gpu
