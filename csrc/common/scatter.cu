// Chooses how a scatter runs; the parts of a scatter that are the same for every op.
#include "common/scatter.cuh"
#include "common/scatter_tables.cuh"

namespace fedpeft::gpu {
namespace {

// The slice of columns and the parts with which most cells are under way on a multiprocessor, or,
// of those with enough, the widest slice. False where none fits.
bool plan_tables(const ScatterShape& shape, const Limits& device, ScatterTables* best) {
  constexpr int kMaxThreads = ScatterTables::kMaxThreads - kWarp;
  constexpr int64_t kEnough = 192;      // units, times slots at once: shared memory does no more
  constexpr int64_t kNarrowest = 32;    // bytes of a slice: a sector
  constexpr int64_t kAhead = 32;        // bytes of rows that are read past the last
  constexpr int64_t kTileBytes = 2048;  // of the gradient
  constexpr int64_t kReserved = 1024;   // of a block, by CUDA
  constexpr int kMaxBlocks = 16;        // of a multiprocessor
  if (shape.clients != 1 || shape.bytes == 0 || shape.rows == 0 || shape.width == 0) return false;
  const int64_t bytes = shape.bytes, accumulator = bytes == 8 ? 8 : 4, slots = shape.slots;
  const int64_t wide = shape.width * bytes % 16 == 0 ? 16 / bytes : 1;
  const bool apart = shape.disjoint_slots && shape.rows % slots == 0;
  const int64_t ways[] = {apart && slots % 2 == 0 ? slots / 2 : 1, apart ? slots : 1, 1};
  int64_t most = 0, blocks = 0;
  for (int64_t slices = 1;; slices *= 2) {
    const int64_t slice = ((shape.width + slices - 1) / slices + wide - 1) / wide * wide;
    if (slices > 1 && slice * bytes < kNarrowest) break;
    int bits = 3;
    while (bits < 6 && (slice * bytes << (bits + 1)) <= kTileBytes) ++bits;
    for (const int64_t parts : ways) {
      ScatterTables t{};
      const int64_t units = parts * slice, threads = (units + kWarp - 1) / kWarp * kWarp;
      const int64_t part_rows = shape.rows / parts;
      if (threads > kMaxThreads || part_rows >= ScatterTables::kRowLimit) continue;
      t.table_bytes = ((part_rows + 1) * units * accumulator + 15) / 16 * 16;
      t.stage_bytes = (((slice * bytes << bits) + 15) / 16 * 16) + (slots * 2 << bits);
      t.shared_bytes = t.table_bytes + ScatterTables::kStages * t.stage_bytes + kAhead;
      if (t.shared_bytes > device.shared_bytes) continue;
      int64_t fit = (device.shared_bytes + kReserved) / (t.shared_bytes + kReserved);
      if (fit > kMaxBlocks) fit = kMaxBlocks;
      const int64_t each = units * (slots / parts > 1 ? 2 : 1);
      // A warp with idle lanes takes as long as a whole one.
      const int64_t busy = (fit * each < kEnough ? fit * each : kEnough) * units / threads;
      if (busy <= most) continue;
      most = busy;
      blocks = (4 * kEnough + each - 1) / each;
      if (fit < blocks) blocks = fit;
      t.parts = int(parts);
      t.part_slots = int(slots / parts);
      t.part_rows = int(part_rows);
      t.slice = int(slice);
      t.slices = int((shape.width + slice - 1) / slice);
      t.units = int(units);
      t.threads = int(threads) + kWarp;  // the last warp copies
      t.tile_bits = bits;
      *best = t;
    }
  }
  if (most < kEnough / 2) return false;  // the sort is faster then
  // A block for every place on the device; chunks of as many positions as rows at least, so that
  // tables are written and read no more than the gradient is read.
  ScatterTables& t = *best;
  t.tiles = (shape.positions + t.tile() - 1) >> t.tile_bits;
  const int64_t places = blocks * device.multiprocessors, least = shape.rows >> t.tile_bits;
  const int64_t chunks = places > t.slices ? places / t.slices : 1;
  t.chunk_tiles = (t.tiles + chunks - 1) / chunks;
  if (t.chunk_tiles <= least) t.chunk_tiles = least + 1;
  t.chunks = (t.tiles + t.chunk_tiles - 1) / t.chunk_tiles;
  return t.chunk_tiles < INT32_MAX && shape.positions >= shape.rows;
}

// Joins the rows that cross tiles, from the tile in which a row begins.
template <typename T, int V>
__global__ void __launch_bounds__(256, 2)
    scatter_join(T* out, ScatterPlan plan, IndexArray keys, const acc_t<T>* partial) {
  constexpr int64_t kTile = ScatterPlan::kTile;
  const int lanes = lanes_for(plan.width / V), lane = int(threadIdx.x) % lanes;
  const int64_t groups = int64_t(gridDim.x) * (blockDim.x / lanes), tiles = plan.tiles(),
                width = plan.width;
  for (int64_t tile = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
       tile + 1 < tiles; tile += groups) {
    const int64_t begin = tile * kTile, end = begin + kTile, row = keys[end];
    if (row == plan.padding() || keys[end - 1] != row) continue;
    if (keys[begin] == row && begin > 0 && keys[begin - 1] == row)
      continue;  // begins in an earlier tile
    // The last tile whose first entry is of this row.
    int64_t last = tile + 1, high = tiles - 1;
    while (last < high) {
      const int64_t middle = last + (high - last + 1) / 2;
      if (keys[middle * kTile] == row) {
        last = middle;
      } else {
        high = middle - 1;
      }
    }
    for (int64_t column = lane * V; column < width; column += lanes * V) {
      Sum<acc_t<T>, V> sum;
      sum.set(partial + (tile * 2 + 1) * width + column);
#pragma unroll 2
      for (int64_t t = tile + 1; t <= last; ++t) sum.add(partial + t * 2 * width + column);
      sum.scale(acc_t<T>(plan.scale));
      sum.store(out + row * width + column);
    }
  }
}

}  // namespace

template <typename T, int V>
void launch_scatter_join(const ScatterPlan& plan, const SortedEntries& sorted, T* out,
                         Stream stream) {
  const int groups = 256 / lanes_for(plan.width / V);
  launch(scatter_join<T, V>, (plan.tiles() + groups - 1) / groups, 256, 0, stream, out, plan,
         sorted.keys, static_cast<const acc_t<T>*>(sorted.partial));
}

template <typename T, int V>
void launch_scatter_tables(const ScatterPlan& plan, const T* grad, const SortedEntries& entries,
                           T* out, Stream stream) {
  const ScatterTables& tables = plan.tables;
  acc_t<T>* partial = static_cast<acc_t<T>*>(entries.partial);
  launch(scatter_tables<T, V>, tables.chunks * tables.slices, unsigned(tables.threads),
         tables.shared_bytes, stream, grad, entries.rows, partial, plan);
  launch(scatter_total<T>, (plan.rows * plan.width + 63) / 64, 256, 0, stream,
         static_cast<const acc_t<T>*>(partial), out, plan);
}

#define FEDPEFT_SCATTER(T)                                                                       \
  template void launch_scatter_join<T, 1>(const ScatterPlan&, const SortedEntries&, T*, Stream); \
  template void launch_scatter_join<T, kWide<T>>(const ScatterPlan&, const SortedEntries&, T*,   \
                                                 Stream);                                        \
  template void launch_scatter_tables<T, 1>(const ScatterPlan&, const T*, const SortedEntries&,  \
                                            T*, Stream);                                         \
  template void launch_scatter_tables<T, kWide<T>>(const ScatterPlan&, const T*,                 \
                                                   const SortedEntries&, T*, Stream);
FEDPEFT_SCATTER(float)
FEDPEFT_SCATTER(double)
FEDPEFT_SCATTER(Half)
FEDPEFT_SCATTER(BFloat16)
#undef FEDPEFT_SCATTER

ScatterPlan plan_scatter(const ScatterShape& shape) {
  // Lists of at most this many rows a block leave room for several blocks on a multiprocessor.
  constexpr int64_t kRows = 4096;
  // Every range of rows walks all entries of its client again: many ranges must be short walks.
  constexpr int64_t kWalk = 1 << 14;

  const Limits device = limits();
  ScatterPlan plan{};
  static_cast<ScatterShape&>(plan) = shape;
  const int64_t entries = shape.positions * shape.slots;
  plan.wide_keys = shape.clients * shape.rows >= INT32_MAX;

  plan.rows_per_split = shape.rows < kRows ? (shape.rows > 0 ? shape.rows : 1) : kRows;
  plan.splits = (shape.rows + plan.rows_per_split - 1) / plan.rows_per_split;
  // Few clients: more ranges, to fill the device.
  const int64_t wanted = 2 * device.multiprocessors;
  if (shape.clients > 0 && shape.clients * plan.splits < wanted && shape.rows > 32) {
    const int64_t splits = (wanted + shape.clients - 1) / shape.clients;
    const int64_t rows = (shape.rows + splits - 1) / splits;
    plan.rows_per_split = rows < 32 ? 32 : rows;
    plan.splits = (shape.rows + plan.rows_per_split - 1) / plan.rows_per_split;
  }
  const int64_t team_bytes =
      ((plan.rows_per_split + entries) * int64_t(sizeof(int)) + 15) / 16 * 16;
  plan.sorted = team_bytes > device.shared_bytes ||
                (plan.splits > 1 && entries * plan.splits > kWalk * 16) ||
                (plan.splits > 1 && entries > kWalk / 4);
  plan.in_tables = plan.sorted && plan_tables(shape, device, &plan.tables);
  if (plan.in_tables) plan.sorted = false;

  // Small clients: four a block, a warp each.
  const bool small =
      plan.splits == 1 && plan.rows_per_split * shape.width <= 1024 && entries <= 256;
  plan.team = small ? 32 : plan.rows_per_split * shape.width <= 8192 ? 128 : 256;
  plan.block = small ? 128 : plan.team;
  plan.shared_bytes = team_bytes * (plan.block / plan.team);
  if (plan.shared_bytes > device.shared_bytes) {  // a warp a block
    plan.block = plan.team;
    plan.shared_bytes = team_bytes;
  }
  return plan;
}

}  // namespace fedpeft::gpu
