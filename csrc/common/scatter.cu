// Chooses how a scatter runs; the parts of a scatter that are the same for every op.
#include "common/scatter.cuh"
#include "common/scatter_tables.cuh"
#include "common/staged_rows.cuh"

namespace fedpeft::gpu {
namespace {

// False where the sort is faster, or shared memory is too small.
bool plan_tables(const ScatterShape& shape, const Limits& device, ScatterTables* tables) {
  constexpr int64_t kThreads = ScatterTables::kThreads;
  constexpr int64_t kSortBytes = 256;  // of the gradient, read while an entry is sorted otherwise
  constexpr int64_t kEntries = 8192;   // of a tile
  constexpr int64_t kNumbers = 0xffff;
  constexpr int64_t kOwn = 64;  // bytes of the kernels' own arrays
  if (shape.clients != 1 || shape.bytes == 0 || shape.rows == 0 || shape.width == 0) return false;
  if (shape.positions < shape.rows || shape.rows >= kNumbers || shape.slots > kEntries / kWarp)
    return false;
  ScatterTables& t = *tables;
  const int64_t wide = 16 / shape.bytes, vectors = (shape.width + wide - 1) / wide;
  const int64_t group_rows = ScatterTables::group_rows(shape.bytes);
  // Slices of 128 bytes, or of 64 where all rows are then the block's.
  int64_t slices, ranges;
  for (const int64_t most : {8, 4}) {
    slices = (vectors + most - 1) / most;
    const int64_t slice = (vectors + slices - 1) / slices;
    t.slice = int(slice * wide);
    t.stride = int(slice * 16);
    t.lanes = lanes_for(slice);
    t.groups = int(kThreads) / t.lanes;
    ranges = (shape.rows + t.groups * group_rows - 1) / (t.groups * group_rows);
    if (ranges == 1) break;
  }
  // Each range reads the gradient again.
  const int64_t bytes = shape.width * shape.bytes;
  if (ranges * bytes > shape.slots * (bytes + kSortBytes)) return false;
  t.slices = int((vectors * wide + t.slice - 1) / t.slice);
  t.ranges = int(ranges);
  t.copies = 1;
  while (shape.rows * t.copies * 2 <= t.groups) t.copies *= 2;
  t.rows = int(shape.rows) * t.copies;
  t.slot_rows = shape.disjoint_slots && t.copies == 1 ? int(shape.rows / shape.slots) : 0;
  t.key_bits = bits_of(t.slot_rows > 0 ? t.slot_rows : t.rows);
  t.each = int((t.rows + t.groups * ranges - 1) / (t.groups * ranges));

  // A block a multiprocessor, or four in turn where that leaves too many idle; chunks of as many
  // positions as rows at least, so that tables are written and read no more than the gradient is.
  const int64_t parts = t.slices * ranges, places = device.multiprocessors;
  int64_t chunks = (8 * parts <= places ? places : 4 * places) / parts;
  const int64_t most_chunks = shape.positions / t.rows;
  if (chunks > most_chunks) chunks = most_chunks;
  if (chunks < 1) chunks = 1;
  const int64_t chunk = (shape.positions + chunks - 1) / chunks;

  // Tiles as large as shared memory holds, and the sort's; a chunk's of equal size.
  const auto pairs = [&](int64_t tile, int64_t rows) { return rows + tile * shape.slots / 2; };
  const auto stage_bytes = [&](int64_t tile) {
    const int64_t list = t.groups / 2 + pairs(tile, t.range_rows()) + 2;
    return ((tile + 1) * t.stride + list * 4 + 15) / 16 * 16;
  };
  const auto sort_bytes = [&](int64_t tile, int64_t warps) {
    return warps * t.sort_stride() * 2 +
           (t.head() + pairs(tile, t.rows) + t.rows + tile * shape.slots) * 4;
  };
  const auto fits = [&](int64_t tile) {
    return ScatterTables::kStages * stage_bytes(tile) + kOwn <= device.shared_bytes &&
           sort_bytes(tile, 1) + kOwn <= device.shared_bytes && tile * shape.slots <= kEntries &&
           t.head() + pairs(tile, t.rows) <= kNumbers;
  };
  constexpr int64_t kEven = ScatterTables::kSortWarps * kWarp;
  int64_t tile = 0;
  while (tile < chunk && fits(tile + kEven)) tile += kEven;
  const int64_t step = tile > kEven ? kEven : kWarp;
  while (step == kWarp && tile < chunk && fits(tile + step)) tile += step;
  if (tile == 0) return false;
  t.chunk_tiles = (chunk + tile - 1) / tile;
  tile = ((chunk + t.chunk_tiles - 1) / t.chunk_tiles + step - 1) / step * step;
  t.tile = int(tile);
  t.pairs = int(t.head() + pairs(tile, t.rows));
  t.stage_bytes = stage_bytes(tile);
  t.shared_bytes = ScatterTables::kStages * t.stage_bytes;
  // As many warps on a multiprocessor as can be.
  int64_t most_warps = 0;
  for (int warps = ScatterTables::kSortWarps; warps > 0; warps /= 2) {
    const int64_t needed = sort_bytes(tile, warps) + kOwn;
    if (needed > device.shared_bytes) continue;
    const int64_t fit = (device.shared_bytes + kReservedShared) / (needed + kReservedShared);
    if (warps * (fit < 4 ? fit : 4) <= most_warps) continue;
    most_warps = warps * (fit < 4 ? fit : 4);
    t.sort_warps = warps;
    t.sort_bytes = sort_bytes(tile, warps);
  }
  t.tiles = (shape.positions + tile - 1) / tile;
  t.chunks = (t.tiles + t.chunk_tiles - 1) / t.chunk_tiles;
  return t.chunk_tiles * tile < INT32_MAX;
}

// False where other ways are faster, or shared memory is too small.
bool plan_stage(const ScatterShape& shape, const Limits& device, ScatterStage* stage) {
  constexpr int64_t kLeast = 32;         // bytes of a slice, a sector of memory
  constexpr int64_t kEntries = 1 << 15;  // of ranges: a word holds two such numbers
  if (shape.bytes == 0 || shape.width == 0 || shape.rows == 0) return false;
  const int64_t wide = 16 / shape.bytes, vectors = (shape.width + wide - 1) / wide;
  const int64_t entries = shape.positions * shape.slots;
  // Of two blocks on a multiprocessor one may copy.
  const auto most = [&](int64_t blocks) { return shared_of_each(device, blocks); };
  if (shape.rows > most(2) || entries > most(2)) return false;
  stage->head_stride = int((shape.rows + 3) / 4 * 4);
  const auto lay_out = [&](int64_t slice, int ranges) {
    Carve carve;
    carve.take<unsigned char>((shape.positions + 1) * slice * shape.bytes);
    stage->head = carve.take<int>(ranges * stage->head_stride);
    stage->next = carve.take<int>(entries + 1);
    stage->slice = int(slice);
    stage->slices = int((shape.width + slice - 1) / slice);
    stage->ranges = ranges;
    stage->shared_bytes = carve.used;
    return carve.used;
  };
  for (int64_t cut = 1;; cut *= 2) {
    const int64_t slice = (vectors + cut - 1) / cut * wide, row_bytes = slice * shape.bytes;
    if (cut > 1 && row_bytes < kLeast) return false;
    const int64_t needed = lay_out(slice, 1), blocks = shape.clients * stage->slices;
    // Slices also make blocks for all of the device, as far as they pay for linking once more.
    if (needed > most(2) || (blocks < 2 * device.multiprocessors && row_bytes > 64)) continue;
    if (blocks < device.multiprocessors) return false;
    // As many ranges as leave no warp idle, and each several chunks of entries, in what memory is
    // left.
    constexpr int kWarps = ScatterStage::kThreads / kWarp, kChunks = 4;
    const int64_t parts = shape.disjoint_slots ? shape.slots : 1;
    int ranges = 1;
    while (2 * ranges * parts <= kWarps && entries < kEntries &&
           entries / parts >= 2 * ranges * kChunks * kWarp &&
           lay_out(slice, 2 * ranges) <= most(needed <= most(3) ? 3 : 2))
      ranges *= 2;
    lay_out(slice, ranges);
    return true;
  }
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
  launch(scatter_tables<T, V>, tables.chunks * tables.slices * tables.ranges,
         ScatterTables::kThreads, tables.shared_bytes, stream, grad, entries.lists, partial, plan);
  launch(scatter_total<T>, (plan.rows * plan.width + 31) / 32, 256, 0, stream,
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
  // Small clients: four a block, a warp each.
  const bool small =
      plan.splits == 1 && plan.rows_per_split * shape.width <= 1024 && entries <= 256;
  const bool sorted = team_bytes > device.shared_bytes ||
                      (plan.splits > 1 && entries * plan.splits > kWalk * 16) ||
                      (plan.splits > 1 && entries > kWalk / 4);
  plan.way = !small && plan_stage(shape, device, &plan.stage) ? ScatterWay::staged
             : !sorted                                        ? ScatterWay::lists
             : plan_tables(shape, device, &plan.tables)       ? ScatterWay::tables
                                                              : ScatterWay::sorted;
  plan.reciprocal = shape.slots > 0 ? uint32_t(0xffffffff / shape.slots) : 0;

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
