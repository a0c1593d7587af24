// Chooses how a scatter runs; the part of a sorted scatter that is the same for every op.
#include "common/scatter.cuh"

namespace fedpeft::gpu {
namespace {

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

#define FEDPEFT_JOIN(T)                                                                          \
  template void launch_scatter_join<T, 1>(const ScatterPlan&, const SortedEntries&, T*, Stream); \
  template void launch_scatter_join<T, kWide<T>>(const ScatterPlan&, const SortedEntries&, T*,   \
                                                 Stream);
FEDPEFT_JOIN(float)
FEDPEFT_JOIN(double)
FEDPEFT_JOIN(Half)
FEDPEFT_JOIN(BFloat16)
#undef FEDPEFT_JOIN

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
