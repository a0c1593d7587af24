// Gradients of table rows on the GPU: every row is the sum of its entries in position order,
// without atomics. An entry is (position, slot): the `slot`-th of the rows that a position reads.
// Three ways, chosen by plan_scatter:
//
// lists   one block (or warp) a client and range of rows links the entries of each row in shared
// memory; groups of
//         lanes then sum the rows, each in position order. One launch, each row written once.
// sorted  for entries that shared memory does not hold: their rows are written as keys and sorted
// (stably, by
//         torch); each tile of entries is summed by one group, and rows that cross tiles are joined
//         in order.
// tables  the same where a table, or some of its columns, fits in shared memory: each block adds a
//         chunk of the positions to a table of its own, and the blocks' tables are added in order.
//         What decides the bits is the number of chunks: that of blocks that the device has room
//         for.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/types.h"

namespace fedpeft::gpu {

struct ScatterShape {
  int64_t clients, positions;  // positions of a client
  int64_t slots;               // rows that a position reads
  int64_t rows, width;         // of a client's table
  bool disjoint_slots;         // slot s reads rows s * rows / slots on, rows / slots of them
  double scale = 1;            // every row's sum is multiplied by it
  int bytes = 0;  // of an element of the gradient, where entries add their position's row of it
};

// A thread owns one column of the rows that some slots read (a part), and so one bank of shared
// memory, and alone adds to them.
struct ScatterTables {
  static constexpr int kMaxThreads = 288;
  static constexpr int kStages = 4;         // tiles of positions in shared memory at a time
  static constexpr int kBatch = 8;          // positions whose rows a thread has under way
  static constexpr int kRowLimit = 0x4000;  // rows of a part; the bits above are marks
  static constexpr int kMostLost = 2;       // rows of a batch that are added one by one
  int parts, part_slots, part_rows;
  int slice, slices;   // columns of a block
  int units, threads;  // parts * slice; the threads of a block
  int tile_bits;       // log2 of the positions of a tile
  int64_t tiles, chunk_tiles, chunks;
  int64_t table_bytes, stage_bytes, shared_bytes;

  FEDPEFT_HD int tile() const { return 1 << tile_bits; }
};

struct ScatterPlan : ScatterShape {
  bool sorted;
  bool in_tables;  // neither: lists
  ScatterTables tables;
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

// What the launches before leave for the sums: the sorted entries, padding last; or, for tables,
// the rows that positions read.
struct SortedEntries {
  IndexArray keys;
  const int64_t* order = nullptr;
  const uint16_t* rows = nullptr;  // [tiles, parts, batches, slots, kBatch], within a part's rows
  void* partial = nullptr;  // accumulators. Sorted: [tiles, 2, width], sums of the rows that cross
                            // into and out of a tile; tables: [chunks, rows, width]
};

}  // namespace fedpeft::gpu
