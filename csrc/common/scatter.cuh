// Kernels behind common/scatter.h. A Source names an op's entries:
//   int64_t row(int64_t n, int64_t slot): row in the client's table that position n (of all
//   clients) reads, -1: none Sum<acc, V> value<V>(int64_t n, int64_t slot, int64_t column): what
//   the entry adds to V columns of that row
//   const T* values(): where value() is no more than a load, the array [clients, positions, width]
//   that it reads
//   int kRowsAtOnce: rows that a group sums at a time, where value() is more than a load
// and with values(), so that tables can do it:
//   void rows<N>(const int64_t (&n)[N], int64_t slot, int64_t (&row)[N]): N rows, their loads under
//   way together; n is -1 where there is no position
#pragma once

#include "common/device.cuh"
#include "common/scatter.h"

namespace fedpeft::gpu {

// The threads that work on one client: a warp of its own or the whole block.
FEDPEFT_DEVICE void team_sync(int team) {
  if (team == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Links `count` entries, first + i * step, in ascending order: next[e] holds the row of entry e (or
// -1) and gets the entry that follows it in its row (or -1); head[row] becomes the first. Called by
// one warp.
FEDPEFT_DEVICE void link_entries(int* head, int* next, int count, int first, int step) {
  const int lane = int(threadIdx.x) % kWarp;
  for (int chunk = (count - 1) / kWarp * kWarp; chunk >= 0; chunk -= kWarp) {
    const int entry = first + (chunk + lane) * step;
    const int row = chunk + lane < count ? next[entry] : -1;
    const unsigned same = __match_any_sync(kFullMask, row);
    const unsigned later = lane == kWarp - 1 ? 0u : same & (kFullMask << (lane + 1));
    int following = -1;
    if (row >= 0) following = later ? first + (chunk + __ffs(later) - 1) * step : head[row];
    __syncwarp();
    if (row >= 0) {
      next[entry] = following;
      if (__ffs(same) - 1 == lane) head[row] = entry;
    }
    __syncwarp();
  }
}

template <typename Source, typename T, int V>
FEDPEFT_HD constexpr int rows_at_once() {
  if constexpr (requires { Source::kRowsAtOnce; }) {
    return Source::kRowsAtOnce;
  } else {
    return kAtOnce<T, V>;
  }
}

template <typename Source, typename T, int V>
FEDPEFT_DEVICE void scatter_lists_team(const Source& source, T* out, const ScatterPlan& plan,
                                       int64_t task, int thread, int* head) {
  const int64_t client = divide(task, plan.splits);
  const int64_t begin = (task - client * plan.splits) * plan.rows_per_split;
  const int64_t left = plan.rows - begin;
  const int rows = int(left < plan.rows_per_split ? left : plan.rows_per_split);
  const int slots = int(plan.slots), positions = int(plan.positions), entries = positions * slots;
  int* next = head + plan.rows_per_split;

  // The values come while their entries are linked.
  if constexpr (requires { source.values(); }) {
    const int64_t numbers = plan.positions * plan.width;
    if (plan.splits == 1)
      ask_ahead(source.values() + client * numbers, numbers * int64_t(sizeof(T)), thread,
                plan.team);
  }
  for (int r = thread; r < rows; r += plan.team) head[r] = -1;
  for (int e = thread; e < entries; e += plan.team) {
    const int p = e / slots;
    const int64_t row = source.row(client * plan.positions + p, e - p * slots) - begin;
    next[e] = uint64_t(row) < uint64_t(rows) ? int(row) : -1;
  }
  team_sync(plan.team);
  const int warp = thread / kWarp, warps = plan.team / kWarp;
  if (plan.disjoint_slots) {
    for (int slot = warp; slot < slots; slot += warps)
      link_entries(head, next, positions, slot, slots);
  } else if (warp == 0) {
    link_entries(head, next, entries, 0, 1);
  }
  team_sync(plan.team);

  // Several rows at a time, so that their loads are under way together.
  constexpr int N = rows_at_once<Source, T, V>();
  const int lanes = lanes_for(plan.width / V), groups = plan.team / lanes;
  const int lane = thread % lanes;
  for (int r = thread / lanes; r < rows; r += groups * N) {
    T* to = out + (client * plan.rows + begin + r) * plan.width;
    for (int64_t column = lane * V; column < plan.width; column += lanes * V) {
      Sum<acc_t<T>, V> sum[N];
      int entry[N];
      bool more = false;
#pragma unroll
      for (int u = 0; u < N; ++u) {
        sum[u].clear();
        entry[u] = r + u * groups < rows ? head[r + u * groups] : -1;
        more |= entry[u] >= 0;
      }
      while (more) {
        Sum<acc_t<T>, V> value[N];
        more = false;
#pragma unroll
        for (int u = 0; u < N; ++u) {
          value[u].clear();
          if (entry[u] < 0) continue;
          const int p = entry[u] / slots;
          value[u] =
              source.template value<V>(client * plan.positions + p, entry[u] - p * slots, column);
          entry[u] = next[entry[u]];
          more |= entry[u] >= 0;
        }
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u].add(value[u]);
      }
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (r + u * groups >= rows) continue;
        sum[u].scale(acc_t<T>(plan.scale));
        sum[u].store_once(to + u * groups * plan.width + column);
      }
    }
  }
}

// A task is a client and a range of its rows; block `block` of `blocks` takes its share of them.
template <typename T, int V, typename Source>
FEDPEFT_DEVICE void scatter_lists_tasks(const Source& source, T* out, const ScatterPlan& plan,
                                        unsigned char* shared, int64_t block, int64_t blocks) {
  const int teams = int(blockDim.x) / plan.team, team = int(threadIdx.x) / plan.team;
  int* head = reinterpret_cast<int*>(shared + plan.shared_bytes / teams * team);
  const int64_t tasks = plan.clients * plan.splits;
  for (int64_t first = block * teams; first < tasks; first += blocks * teams) {
    if (first + team < tasks) {
      scatter_lists_team<Source, T, V>(source, out, plan, first + team,
                                       int(threadIdx.x) % plan.team, head);
    }
    team_sync(plan.team);
  }
}

// Blocks that a multiprocessor must have registers for.
template <typename Source>
constexpr int kListBlocks =
    requires(const Source& source) { source.values(); } ? FEDPEFT_TWO_OR_THREE : 2;

template <typename Source, typename T, int V>
__global__ void __launch_bounds__(256, kListBlocks<Source>)
    scatter_lists(Source source, T* out, ScatterPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  scatter_lists_tasks<T, V>(source, out, plan, shared, blockIdx.x, gridDim.x);
}

template <typename Source>
__global__ void __launch_bounds__(256, 4)
    scatter_keys(Source source, void* keys, ScatterPlan plan) {
  const int64_t entries = plan.entries(), step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t e = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; e < entries; e += step) {
    const int64_t n = divide(e, plan.slots);
    const int64_t row = source.row(n, e - n * plan.slots);
    const int64_t key = row < 0 ? plan.padding() : divide(n, plan.positions) * plan.rows + row;
    if (plan.wide_keys) {
      static_cast<int64_t*>(keys)[e] = key;
    } else {
      static_cast<int32_t*>(keys)[e] = int32_t(key);
    }
  }
}

// One group of lanes a tile of sorted entries. A row that begins and ends in the tile is written;
// the sum of a row that comes from the tile before goes to partial[tile][0], of one that begins
// here and leaves to partial[tile][1].
template <typename Source, typename T, int V>
__global__ void __launch_bounds__(256, 2)
    scatter_tiles(Source source, T* out, ScatterPlan plan, IndexArray keys, const int64_t* order,
                  acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int kBatch = 4;
  const int lanes = lanes_for(plan.width / V), lane = int(threadIdx.x) % lanes;
  const int64_t groups = int64_t(gridDim.x) * (blockDim.x / lanes), tiles = plan.tiles(),
                entries = plan.entries();
  const int64_t width = plan.width;
  const int64_t padding = plan.padding();
  const A scale = A(plan.scale);
  for (int64_t tile = int64_t(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
       tile < tiles; tile += groups) {
    const int64_t begin = tile * ScatterPlan::kTile;
    const int64_t end = entries - begin < ScatterPlan::kTile ? entries : begin + ScatterPlan::kTile;
    if (keys[begin] == padding) continue;
    const bool from_before = begin > 0 && keys[begin - 1] == keys[begin];
    for (int64_t column = lane * V; column < width; column += lanes * V) {
      Sum<A, V> sum;
      sum.clear();
      int64_t row = keys[begin];
      bool entered = from_before;
      for (int64_t i = begin; i < end && row != padding; i += kBatch) {
        int64_t key[kBatch];
        Sum<A, V> value[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          key[j] = i + j < end ? keys[i + j] : padding;
          value[j].clear();
          if (key[j] != padding) {
            const int64_t e = order[i + j], n = divide(e, plan.slots);
            value[j] = source.template value<V>(n, e - n * plan.slots, column);
          }
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          if (i + j >= end) break;
          if (key[j] != row) {
            if (!entered) sum.scale(scale);
            sum.store_either(entered ? partial + tile * 2 * width + column : nullptr,
                             out + row * width + column);
            sum.clear();
            entered = false;
            row = key[j];
          }
          sum.add(value[j]);
        }
      }
      if (row == padding) continue;
      const bool leaves = end < entries && keys[end] == row;
      A* crossing =
          entered ? partial + tile * 2 * width + column : partial + (tile * 2 + 1) * width + column;
      if (!entered && !leaves) sum.scale(scale);
      sum.store_either(entered || leaves ? crossing : nullptr, out + row * width + column);
    }
  }
}

// The sum of `x` over the threads of the block before this one, and over all in `total`. `sums`:
// one a warp.
FEDPEFT_DEVICE int sum_before(int x, int* sums, int* total) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int before = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, before, step);
    if (lane >= step) before += other;
  }
  if (lane == kWarp - 1) sums[warp] = before;
  __syncthreads();
  before -= x;
  *total = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    if (w < warp) before += sums[w];
    *total += sums[w];
  }
  return before;
}

// The lists of tiles (ScatterTables), a block a tile: a stable counting sort of its entries by row.
// Warps take ranges of positions, a lane a position; those of a warp are in the order of
// kSortRounds * 32 positions, slot, position.
constexpr int kSortRounds = 3;
template <typename Source>
__global__ void __launch_bounds__(256, 4)
    scatter_sort(Source source, uint16_t* lists, ScatterPlan plan) {
  constexpr int N = kSortRounds;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(int, sums, 8);
  const ScatterTables& tables = plan.tables;
  const int rows = tables.rows, slots = int(plan.slots), threads = int(blockDim.x);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int warps = threads / kWarp, rounds = tables.tile / kWarp;
  // Of each warp and row, the entries; then of the warps before.
  uint16_t* const list = reinterpret_cast<uint16_t*>(shared);
  uint16_t* const counts = list + 2 * tables.pairs;
  uint16_t* const first = counts + warps * rows;  // a row's place in the list
  uint16_t* const total = first + rows;
  uint16_t* const entry_row = total + rows;                      // [rounds, slots, 32]
  uint16_t* const entry_rank = entry_row + tables.tile * slots;  // among the warp's of the row
  constexpr uint16_t kNone = 0xffff;
  const int begin = warp * rounds / warps, end = (warp + 1) * rounds / warps;
  uint16_t* const mine = counts + warp * rows;

  for (int64_t tile = blockIdx.x; tile < tables.tiles; tile += gridDim.x) {
    for (int i = int(threadIdx.x); i < warps * rows; i += threads) counts[i] = 0;
    __syncthreads();

    for (int round = begin; round < end; round += N) {
      int64_t n[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        n[j] = tile * tables.tile + (round + j) * kWarp + lane;
        if (round + j >= end || n[j] >= plan.positions) n[j] = -1;
      }
      for (int slot = 0; slot < slots; ++slot) {
        int64_t row[N];
        source.template rows<N>(n, slot, row);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (round + j >= end) break;
          const int copy = ((round + j) * kWarp + lane) & (tables.copies - 1);
          const int at = row[j] < 0 ? -1 : int(row[j]) + copy * int(plan.rows);
          const unsigned same = __match_any_sync(kFullMask, at);
          const int before = at < 0 ? 0 : mine[at];
          __syncwarp();
          if (at >= 0 && __ffs(int(same)) - 1 == lane) mine[at] = uint16_t(before + __popc(same));
          __syncwarp();
          const int place = ((round + j) * slots + slot) * kWarp + lane;
          entry_row[place] = uint16_t(at < 0 ? kNone : at);
          entry_rank[place] = uint16_t(before + __popc(same & ((1u << lane) - 1)));
        }
      }
    }
    __syncthreads();

    // A thread some rows, side by side.
    const int each = (rows + threads - 1) / threads;
    const int first_row = int(threadIdx.x) * each < rows ? int(threadIdx.x) * each : rows;
    const int last_row = first_row + each < rows ? first_row + each : rows;
    int pairs = 0;
    for (int r = first_row; r < last_row; ++r) {
      int sum = 0;
      for (int w = 0; w < warps; ++w) {
        const int count = counts[w * rows + r];
        counts[w * rows + r] = uint16_t(sum);
        sum += count;
      }
      total[r] = uint16_t(sum);
      pairs += sum > 0 ? (sum + 1) / 2 : 1;
    }
    int all, at = sum_before(pairs, sums, &all) + tables.head();
    for (int r = first_row; r < last_row; ++r) {
      const int sum = total[r];
      first[r] = uint16_t(at);
      if (sum == 0) list[2 * at] = list[2 * at + 1] = uint16_t(tables.tile);
      if (sum % 2 == 1) list[2 * at + sum] = uint16_t(tables.tile);
      at += sum > 0 ? (sum + 1) / 2 : 1;
    }
    __syncthreads();

    for (int q = int(threadIdx.x); q < tables.ranges; q += threads) {
      const int next = (q + 1) * tables.range_rows(), to = first[q * tables.range_rows()];
      list[2 * q] = uint16_t(to);
      list[2 * q + 1] = uint16_t((next < rows ? first[next] : tables.head() + all) - to);
    }
    for (int g = int(threadIdx.x); g < tables.ranges * tables.groups; g += threads) {
      const int row = g * tables.each, range_first = row - g % tables.groups * tables.each;
      list[2 * tables.ranges + g] = uint16_t(row < rows ? first[row] - first[range_first] : 0);
    }
    for (int round = begin; round < end; ++round) {
      for (int slot = 0; slot < slots; ++slot) {
        const int place = (round * slots + slot) * kWarp + lane, row = entry_row[place];
        if (row == kNone) continue;
        const int i = mine[row] + entry_rank[place];
        const int more = i % 2 == 0 && i + 2 < total[row] ? ScatterTables::kMore : 0;
        list[2 * first[row] + i] = uint16_t((round * kWarp + lane) | more);
      }
    }
    __syncthreads();
    uint16_t* const to = lists + tile * tables.pairs * 2;
    for (int i = int(threadIdx.x); i < tables.head() + all; i += threads)
      store_pack<2>(to + 2 * i, load_pack<2>(list + 2 * i));
  }
}

template <typename Source>
void launch_scatter_keys(const Source& source, const ScatterPlan& plan, void* keys, Stream stream) {
  if (plan.in_tables) {
    if constexpr (requires { source.values(); }) {
      const ScatterTables& tables = plan.tables;
      launch(scatter_sort<Source>, tables.tiles, unsigned(tables.sort_warps * kWarp),
             tables.sort_bytes, stream, source, static_cast<uint16_t*>(keys), plan);
    }
    return;
  }
  launch(scatter_keys<Source>, (plan.entries() + 255) / 256, 256, 0, stream, source, keys, plan);
}

// Joins the rows that cross tiles (scatter.cu).
template <typename T, int V>
void launch_scatter_join(const ScatterPlan& plan, const SortedEntries& sorted, T* out,
                         Stream stream);

// Sums of the blocks' chunks in tables of their own, and their sum (scatter.cu).
template <typename T, int V>
void launch_scatter_tables(const ScatterPlan& plan, const T* grad, const SortedEntries& entries,
                           T* out, Stream stream);

// Writes every row of `out` [clients, rows, width] (lists, tables), or the rows with entries
// (sorted; the others must be zero already).
template <typename T, int V, typename Source>
void launch_scatter(const Source& source, const ScatterPlan& plan, const SortedEntries& sorted,
                    void* out, Stream stream) {
  if (plan.width == 0) return;
  T* to = static_cast<T*>(out);
  if (plan.in_tables) {
    if constexpr (requires { source.values(); })
      launch_scatter_tables<T, V>(plan, source.values(), sorted, to, stream);
    return;
  }
  if (!plan.sorted) {
    launch(scatter_lists<Source, T, V>, plan.list_blocks(), unsigned(plan.block), plan.shared_bytes,
           stream, source, to, plan);
    return;
  }
  const int groups = 256 / lanes_for(plan.width / V);
  launch(scatter_tiles<Source, T, V>, (plan.tiles() + groups - 1) / groups, 256, 0, stream, source,
         to, plan, sorted.keys, sorted.order, static_cast<acc_t<T>*>(sorted.partial));
  launch_scatter_join<T, V>(plan, sorted, to, stream);
}

}  // namespace fedpeft::gpu
