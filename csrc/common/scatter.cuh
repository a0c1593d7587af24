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

// A bit for each of those rows that are there (at least 0) and come again: later in `row`, or, with
// `also`, anywhere in `others`.
template <int N>
FEDPEFT_DEVICE unsigned rows_again(const int (&row)[N], const int (&others)[N], bool also) {
  unsigned lost = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    bool again = false;
#pragma unroll
    for (int j = i + 1; j < N; ++j) again |= row[i] == row[j];
#pragma unroll
    for (int j = 0; j < N; ++j) again |= also && row[i] == others[j];
    if (again && row[i] >= 0) lost |= 1u << i;
  }
  return lost;
}

// Rows of the entries for tables, within their part; that of padding, and past the last position,
// is one past a part's rows. A thread takes a batch of positions in one slot or, where slots share
// rows, in two that are added together. Of rows that come again among these, all but the last are
// lost: each even row's upper bits tell whether it and the next are. All eight are marked where
// more than kMostLost are lost.
template <typename Source, int Slots>
__global__ void __launch_bounds__(256, 2)
    scatter_rows(Source source, uint16_t* rows, ScatterPlan plan) {
  constexpr int N = ScatterTables::kBatch;
  const ScatterTables& tables = plan.tables;
  const int slots = int(plan.slots), tile = tables.tile();
  const int64_t each = (slots + Slots - 1) / Slots;
  const int64_t tasks = (tables.tiles << tables.tile_bits) / N * each;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t task = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; task < tasks; task += step) {
    const int64_t batch = divide(task, each), first = batch * N;
    const int first_slot = int(task - batch * each) * Slots;
    int64_t n[N];
#pragma unroll
    for (int j = 0; j < N; ++j) n[j] = first + j < plan.positions ? first + j : -1;
    int local[Slots][N];
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      const int slot = first_slot + s < slots ? first_slot + s : first_slot;
      const int part_first = slot / tables.part_slots * tables.part_rows;
      int64_t row[N];
      source.template rows<N>(n, slot, row);
#pragma unroll
      for (int j = 0; j < N; ++j) local[s][j] = row[j] < 0 ? -1 : int(row[j]) - part_first;
    }
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      if (first_slot + s >= slots) break;
      unsigned lost =
          rows_again(local[s], local[Slots - 1], s + 1 < Slots && first_slot + 1 < slots);
      if (__popc(lost) > ScatterTables::kMostLost) lost = (1u << N) - 1;
      Pack<uint16_t, N> pack;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int row = local[s][j] < 0 ? tables.part_rows : local[s][j];
        const unsigned bits = j % 2 == 0 ? lost >> j & 3u : 0u;
        pack.at[j] = uint16_t(unsigned(row) | bits * unsigned(ScatterTables::kRowLimit));
      }
      const int part = (first_slot + s) / tables.part_slots;
      const int64_t of_part = (first >> tables.tile_bits) * tables.parts + part;
      const int64_t to = (of_part * tile + (first & (tile - 1))) * tables.part_slots;
      store_pack<N>(rows + to + (first_slot + s - part * tables.part_slots) * N, pack);
    }
  }
}

template <typename Source>
void launch_scatter_keys(const Source& source, const ScatterPlan& plan, void* keys, Stream stream) {
  if (plan.in_tables) {
    if constexpr (requires { source.values(); }) {
      const bool joint = !plan.disjoint_slots && plan.slots > 1;
      const int64_t batches = (plan.tables.tiles << plan.tables.tile_bits) / ScatterTables::kBatch;
      const int64_t tasks = batches * (joint ? (plan.slots + 1) / 2 : plan.slots);
      launch(joint ? scatter_rows<Source, 2> : scatter_rows<Source, 1>, (tasks + 255) / 256, 256, 0,
             stream, source, static_cast<uint16_t*>(keys), plan);
    }
    return;
  }
  launch(scatter_keys<Source>, (plan.entries() + 255) / 256, 256, 0, stream, source, keys, plan);
}

// Joins the rows that cross tiles (scatter.cu).
template <typename T, int V>
void launch_scatter_join(const ScatterPlan& plan, const SortedEntries& sorted, T* out,
                         Stream stream);

// Sums of the blocks' chunks into tables of their own, and their sum (scatter.cu).
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
