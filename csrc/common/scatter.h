// Gradients of table rows on the GPU: every row is the sum of its entries in position order,
// without atomics. An entry is (position, slot): the `slot`-th of the rows that a position reads.
// Four ways, chosen by plan_scatter:
//
// lists   one block (or warp) a client and range of rows links the entries of each row in shared
//         memory; groups of lanes then sum the rows, each in position order. One launch, each row
//         written once.
// staged  the same, where the values lie in memory: a block takes a client and a slice of columns,
//         whose values it copies into shared memory while it links. The bits of lists.
// sorted  for entries that shared memory does not hold: their rows are written as keys and sorted
//         (stably, by torch); each tile of entries is summed by one group, and rows that cross
//         tiles are joined in order.
// tables  the same where all positions share a table and the values lie in memory: tiles of
//         positions sort their entries by row; then each block adds a chunk of the tiles to a table
//         of its own, in registers, and the blocks' tables are added in order. What decides the
//         bits is the sizes of tiles and chunks: what shared memory holds, and the number of
//         multiprocessors.
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

// A block takes a chunk of tiles, a slice of columns and a range of rows. A group of lanes owns
// some of the rows, a lane 16 bytes' worth of their columns, and keeps the sums in registers.
//
// A tile's list is of pairs of 16-bit numbers: where each range's pairs begin, and how many they
// are; from there on, where each group's begin; then the pairs of row after row. A row has one at
// least: positions of two of its entries, with kMore at the first where another pair follows, and
// `tile` for no entry.
struct ScatterTables {
  static constexpr int kThreads = 1024;
  static constexpr int kStages = 2;  // tiles in shared memory at a time
  static constexpr int kMore = 0x8000;
  static constexpr int kSortWarps = 8;
  int copies;         // of a table in a block, where it has few rows; positions take turns
  int rows;           // of the copies together, fewer than 0xffff
  int lanes, groups;  // of a group; of a block
  int slice, slices;  // columns of a block
  int ranges;         // of rows
  int each;           // rows of a group, groups * each of a range
  int tile;           // positions, a multiple of a warp
  int pairs;          // of a tile's list at most
  int stride;         // bytes of a position in shared memory
  int sort_warps;     // that sort a tile, at most kSortWarps
  int slot_rows;      // of a slot, where slots have rows of their own; else 0
  int key_bits;       // that tell the rows of a slot apart
  int64_t tiles, chunk_tiles, chunks;
  int64_t stage_bytes, shared_bytes, sort_bytes;

  // That a group may have: 32 registers of sums.
  static constexpr int group_rows(int bytes) { return bytes == 2 ? 4 : 8; }
  FEDPEFT_HD static int pairs_of(int entries) { return entries > 0 ? (entries + 1) / 2 : 1; }
  FEDPEFT_HD int sort_stride() const { return (rows + 7) / 8 * 8; }  // of a warp's counts
  FEDPEFT_HD int range_rows() const { return groups * each; }
  FEDPEFT_HD int list_place() const { return (tile + 1) * stride; }     // in a stage
  FEDPEFT_HD int head() const { return ranges + ranges * groups / 2; }  // pairs before the first
};

// Shared memory of a block: the values of `slice` columns, [positions + 1, slice], the last of them
// zeros; heads of lists, [ranges, head_stride], for as many ranges of positions as are linked side
// by side; and links, those of an entry more, whose position is the zeros.
struct ScatterStage {
  static constexpr int kThreads = 256;
  int slice, slices, ranges, head_stride;
  int64_t head, next, shared_bytes;  // bytes
};

// n / d without a division, from 0xffffffff / d, while (n + 1) d is below 2^32: (n + 1) / d, less
// a little.
FEDPEFT_HD inline uint32_t quotient(uint32_t n, uint32_t reciprocal) {
  return uint32_t((uint64_t(n) * reciprocal + reciprocal) >> 32);
}

enum class ScatterWay { lists, staged, sorted, tables };

struct ScatterPlan : ScatterShape {
  ScatterWay way;
  uint32_t reciprocal;  // of the slots, for position_of
  ScatterTables tables;
  ScatterStage stage;
  // Of an entry that lists hold.
  FEDPEFT_HD uint32_t position_of(uint32_t entry) const { return quotient(entry, reciprocal); }
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
// the tiles' lists.
struct SortedEntries {
  IndexArray keys;
  const int64_t* order = nullptr;
  const uint16_t* lists = nullptr;  // [tiles, pairs, 2]
  void* partial = nullptr;  // accumulators. Sorted: [tiles, 2, width], sums of the rows that cross
                            // into and out of a tile; tables: [chunks, copies, rows, width]
};

}  // namespace fedpeft::gpu
