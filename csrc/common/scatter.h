// Gradients of table rows on the GPU: every row is the sum of its entries in position order,
// without atomics. An entry is (position, slot): the `slot`-th of the rows that a position reads.
// Two ways, chosen by plan_scatter:
//
// lists   one block (or warp) a client and range of rows links the entries of each row in shared
// memory; groups of
//         lanes then sum the rows, each in position order. One launch, each row written once.
// sorted  for entries that shared memory does not hold: their rows are written as keys and sorted
// (stably, by
//         torch); each tile of entries is summed by one group, and rows that cross tiles are joined
//         in order.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/types.h"

namespace fedpeft::gpu {

struct ScatterShape {
  int64_t clients, positions;  // positions of a client
  int64_t slots;               // rows that a position reads
  int64_t rows, width;         // of a client's table
  bool disjoint_slots;         // different slots never read the same row
  double scale = 1;            // every row's sum is multiplied by it
};

struct ScatterPlan : ScatterShape {
  bool sorted;
  // lists
  int64_t splits, rows_per_split;
  int team;  // threads that share the lists of a client: a warp or the block
  int block;
  int64_t shared_bytes;  // of a block
  int64_t list_blocks() const { return (clients * splits * team + block - 1) / block; }
  // sorted
  bool wide_keys;  // int64, else int32
  FEDPEFT_HD int64_t entries() const { return clients * positions * slots; }
  FEDPEFT_HD int64_t tiles() const { return (entries() + kTile - 1) / kTile; }
  FEDPEFT_HD int64_t padding() const { return clients * rows; }  // the key of no row
  static constexpr int64_t kTile = 64;
};

ScatterPlan plan_scatter(const ScatterShape& shape);

// The sorted entries, padding last.
struct SortedEntries {
  IndexArray keys;
  const int64_t* order = nullptr;
  void* partial = nullptr;  // [tiles, 2, width] accumulators: sums of the rows that cross into and
                            // out of a tile
};

}  // namespace fedpeft::gpu
