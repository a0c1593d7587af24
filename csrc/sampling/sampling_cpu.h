// Counter-based draws on the CPU: every one is a function of (seed, round, client, position) alone.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kNegativesBlock = 1024;  // positions of a work item
constexpr int64_t kDropoutBlock = 4096;    // elements of a work item; a multiple of 4
constexpr int64_t kKeysBlock = 2048;       // clients of a call of smallest_keys

struct SampleNegativesArgs {
  IndexArray items;    // [C, P]
  void* out;           // [C, epochs, P] of the type of items
  IndexArray clients;  // [C], in [0, U)
  IndexArray indptr;   // [U + 1]
  IndexArray indices;  // [nnz]: each user's positives, ascending
  int64_t positions;   // P
  int64_t epochs, num_items;
  int64_t blocks;  // work items of a client and an epoch
  uint64_t seed;
  uint32_t round;
  FirstError* bad_item;  // flat index into items
};

struct ClientDropoutArgs {
  const void* x;       // [C, size]
  void* out;           // [C, size]
  IndexArray clients;  // [C], in [0, 2^32)
  int64_t size;        // elements of a client
  int64_t blocks;      // work items of a client
  uint32_t threshold;  // floor(p * 2^32): an element with a word below it is dropped
  double scale;        // 1 / (1 - p)
  uint64_t seed;
  uint32_t round, epoch, layer;
};

// Whether so few of n clients are sampled that places are drawn until `count` differ, instead of a
// key for every client.
constexpr bool sampled_by_places(int64_t count, int64_t n) { return count <= n / 16; }
constexpr uint32_t kPlacesLayer = 1;  // of the stream of those draws

// A key as a number in [0, 1) has so many bits, the first; `limit` is in units of the last of them.
constexpr int kKeyBits = 53;
FEDPEFT_HD FEDPEFT_INLINE bool key_below(uint64_t key, uint64_t limit) {
  return key >> (64 - kKeyBits) < limit;
}

struct ClientKeysArgs {
  IndexArray clients;  // [n], in [0, 2^32)
  uint64_t* keys;      // [n]
  uint64_t seed;
  uint32_t round, attempt;
};

struct SamplingKernels {
  // Work items [begin, end) of C * epochs * blocks.
  void (*negatives)(const SampleNegativesArgs&, int64_t begin, int64_t end);
  // Work items [begin, end) of C * blocks.
  void (*dropout[kDTypes])(const ClientDropoutArgs&, int64_t begin, int64_t end);
  // Clients [begin, end).
  void (*client_keys)(const ClientKeysArgs&, int64_t begin, int64_t end);
  // Of clients [begin, end) the places, ascending, of those whose keys have high halves of at most
  // `bound`, and their number; *bad_id: whether an id is not in [0, 2^32). `places` has room for
  // all.
  int64_t (*smallest_keys)(const ClientKeysArgs&, int64_t begin, int64_t end, uint32_t bound,
                           int64_t* places, bool* bad_id);
  // Draws [begin, end) of places among n clients.
  void (*client_places)(const ClientKeysArgs&, int64_t n, int64_t begin, int64_t end,
                        int64_t* places);
};

FEDPEFT_DECLARE_WIDE_KERNELS(SamplingKernels, sampling_kernels)

}  // namespace fedpeft
