// The fused engine on the GPU: a block a client, from its first draw to its upload. The arguments
// are those of the CPU, of which the FirstError slots are not used.
#pragma once

#include <vector>

#include "common/gpu.h"
#include "local_train/local_train_cpu.h"

namespace fedpeft::gpu {

// A client of the call and its part of the CSR rows.
struct ClientRange {
  int64_t client, first, last;  // first = last = 0 where the client is no user
};

// Reads the ranges of the call's clients back, into `ranges` [C] on the device and on the host.
std::vector<ClientRange> local_train_ranges(const LocalTrainArgs& a, int64_t clients,
                                            ClientRange* ranges, Stream stream);

struct LocalTrainPlan {
  int64_t blocks;
  int64_t shared_bytes;   // of a block: what fits of a client's parameters and state
  int64_t scratch_bytes;  // of a block, in memory: the rest
};

// For clients of these numbers of items, most first.
LocalTrainPlan plan_local_train(const LocalTrainArgs& a, DType dtype,
                                const std::vector<int64_t>& sizes);

// What a kernel found wrong: the lowest position of each kind, INT64_MAX where there is none.
struct LocalTrainErrors {
  int64_t item, order, code;  // in items, in positives, in codes
};

// Trains the clients in the given order (places in the call) and waits for them. `scratch` has
// plan.blocks * plan.scratch_bytes bytes, `state` as many as a LocalTrainState, `lists` as
// lists_bytes says: widths and pointers of an MLP, which are on the host in `a`.
struct LocalTrainState {
  LocalTrainErrors errors;
  int64_t next;  // client that a free block takes
};
LocalTrainErrors local_train(const LocalTrainArgs& a, DType dtype, int64_t clients,
                             const LocalTrainPlan& plan, const int64_t* order, void* scratch,
                             LocalTrainState* state, void* lists, Stream stream);
inline int64_t lists_bytes(const LocalTrainArgs& a) {
  return a.layers ? 8 * (a.layers + 2 * (2 * a.layers + 1)) : 0;
}

// An element of an index array on the device.
int64_t read_index(const IndexArray& indices, int64_t at, Stream stream);

void copy_to_device(void* to, const void* from, int64_t bytes, Stream stream);

}  // namespace fedpeft::gpu
