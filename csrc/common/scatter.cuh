// Kernels behind common/scatter.h. A Source names an op's entries:
//   int64_t row(int64_t n, int64_t slot): row in the client's table that position n (of all
//   clients) reads, -1: none
//   Sum<acc, V> value<V>(int64_t n, int64_t slot, int64_t column): what the entry adds to V columns
//   of that row
//   const T* values(): where value() is no more than a load, the array [clients, positions, width]
//   that it reads
//   int kRowsAtOnce: rows that a group sums at a time, where value() is more than a load
// and with values(), so that tables can do it, loads for several positions and slots together:
//   At<N> at<N>(const int64_t (&n)[N]): what N positions read by; n is -1 where there is none
//   void rows(const At<N>& at, int slot, int (&row)[N]): the rows that they read, -1: none
#pragma once

#include "common/block.cuh"
#include "common/device.cuh"
#include "common/scatter.h"
#include "common/scatter_links.cuh"
#include "common/scatter_staged.cuh"

namespace fedpeft::gpu {

// The threads that work on one client: a warp of its own or the whole block.
FEDPEFT_DEVICE void team_sync(int team) {
  if (team == kWarp) {
    __syncwarp();
  } else {
    __syncthreads();
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
    const int p = int(plan.position_of(uint32_t(e)));
    const int64_t row = source.row(client * plan.positions + p, e - p * slots) - begin;
    next[e] = uint64_t(row) < uint64_t(rows) ? int(row) : -1;
  }
  team_sync(plan.team);
  link_slots(head, rows, next, positions, slots, plan.disjoint_slots, thread / kWarp,
             plan.team / kWarp);
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
          const int p = int(plan.position_of(uint32_t(entry[u])));
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

// Two 16-bit numbers side by side, the first in the lower bits.
FEDPEFT_DEVICE uint32_t load_two(const uint16_t* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const uint32_t*>(p);
#else
  uint32_t two;
  std::memcpy(&two, p, sizeof(two));
  return two;
#endif
}
FEDPEFT_DEVICE void store_two(uint16_t* p, uint32_t two) {
#if defined(__CUDACC__)
  *reinterpret_cast<uint32_t*>(p) = two;
#else
  std::memcpy(p, &two, sizeof(two));
#endif
}

// The lists of tiles (ScatterTables), a block a tile: a stable counting sort of its entries by row.
// Warps take ranges of positions, a lane a position; the entries of a warp are in the order of
// N * 32 positions, slot, position.
template <typename Source>
__global__ void __launch_bounds__(ScatterTables::kSortWarps* kWarp, 4)
    scatter_sort(Source source, uint16_t* lists, ScatterPlan plan) {
  constexpr int N = 3;
  constexpr uint32_t kNone = 0xffff;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(int, sums, ScatterTables::kSortWarps);
  const ScatterTables& tables = plan.tables;
  const int rows = tables.rows, slots = int(plan.slots), threads = int(blockDim.x);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int warps = threads / kWarp, rounds = tables.tile / kWarp;
  const int begin = warp * rounds / warps, end = (warp + 1) * rounds / warps;
  const int stride = tables.sort_stride();
  uint16_t* const counts = reinterpret_cast<uint16_t*>(shared);  // of a warp's entries of a row
  uint16_t* const mine = counts + warp * stride;
  uint16_t* const list = counts + warps * stride;
  // Of rows: the place in the list, and above it the number of entries.
  uint32_t* const places = reinterpret_cast<uint32_t*>(list + 2 * tables.pairs);
  // [rounds, slots, 32]: a row, and above it the number of its entries before in the warp.
  uint32_t* const entries = places + rows;

  for (int64_t tile = blockIdx.x; tile < tables.tiles; tile += gridDim.x) {
    for (int i = int(threadIdx.x) * 8; i < warps * stride; i += threads * 8)
      store_pack<8>(counts + i, Pack<uint16_t, 8>{});
    __syncthreads();

    for (int round = begin; round < end; round += N) {
      int64_t n[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        n[j] = tile * tables.tile + (round + j) * kWarp + lane;
        if (round + j >= end || n[j] >= plan.positions) n[j] = -1;
      }
      const auto at = source.at(n);
      for (int slot = 0; slot < slots; ++slot) {
        int row[N], key[N];
        source.rows(at, slot, row);
        unsigned equal[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          key[j] = row[j] < 0 ? -1 : row[j] - slot * tables.slot_rows;
          if (tables.copies > 1) {
            const int copy = ((round + j) * kWarp + lane) & (tables.copies - 1);
            if (row[j] >= 0) key[j] = row[j] += copy * int(plan.rows);
          }
        }
        lanes_alike(key, tables.key_bits, equal);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (round + j >= end) break;
          const unsigned same = equal[j], lower = same & ((1u << lane) - 1);
          const int before = row[j] < 0 ? 0 : mine[row[j]];
          __syncwarp();
          if (row[j] >= 0 && lower == 0) mine[row[j]] = uint16_t(before + __popc(same));
          __syncwarp();
          entries[((round + j) * slots + slot) * kWarp + lane] =
              (uint32_t(row[j]) & kNone) | uint32_t(before + __popc(lower)) << 16;
        }
      }
    }
    __syncthreads();

    // Each warp's numbers become those of the warps before. A thread takes some rows, side by side,
    // two at a time.
    const int each = (stride / 2 + threads - 1) / threads * 2;
    const int first_row = int(threadIdx.x) * each < rows ? int(threadIdx.x) * each : rows;
    const int last_row = first_row + each < rows ? first_row + each : rows;
    int pairs = 0;
    for (int r = first_row; r < last_row; r += 2) {
      uint32_t of_warp[ScatterTables::kSortWarps], two = 0;
#pragma unroll
      for (int w = 0; w < ScatterTables::kSortWarps; ++w)
        of_warp[w] = w < warps ? load_two(counts + w * stride + r) : 0;
#pragma unroll
      for (int w = 0; w < ScatterTables::kSortWarps; ++w) {
        if (w < warps) store_two(counts + w * stride + r, two);
        two += of_warp[w];
      }
      places[r] = two << 16;
      pairs += ScatterTables::pairs_of(int(two & 0xffff));
      if (r + 1 < last_row) {
        places[r + 1] = two & 0xffff0000u;
        pairs += ScatterTables::pairs_of(int(two >> 16));
      }
    }
    int all, at = block_sum_before(pairs, sums, &all) + tables.head();
    for (int r = first_row; r < last_row; ++r) {
      const int number = int(places[r] >> 16), needed = ScatterTables::pairs_of(number);
      places[r] |= uint32_t(at);
      if (number < 2 * needed) list[2 * at + 2 * needed - 1] = uint16_t(tables.tile);
      if (number == 0) list[2 * at] = uint16_t(tables.tile);
      at += needed;
    }
    __syncthreads();

    const auto place_of = [&](int row) { return int(places[row] & 0xffff); };
    for (int q = int(threadIdx.x); q < tables.ranges; q += threads) {
      const int next = (q + 1) * tables.range_rows(), to = place_of(q * tables.range_rows());
      list[2 * q] = uint16_t(to);
      list[2 * q + 1] = uint16_t((next < rows ? place_of(next) : tables.head() + all) - to);
    }
    for (int g = int(threadIdx.x); g < tables.ranges * tables.groups; g += threads) {
      const int row = g * tables.each, range_first = row - g % tables.groups * tables.each;
      list[2 * tables.ranges + g] =
          uint16_t(row < rows ? place_of(row) - place_of(range_first) : 0);
    }
    for (int round = begin, i = begin * slots * kWarp + lane; round < end; ++round) {
      const int position = round * kWarp + lane;
#pragma unroll 4
      for (int slot = 0; slot < slots; ++slot, i += kWarp) {
        const uint32_t entry = entries[i];
        const int row = int(entry & kNone);
        if (row == int(kNone)) continue;
        const uint32_t place = places[row];
        const int number = mine[row] + int(entry >> 16);
        const bool more = number % 2 == 0 && number + 2 < int(place >> 16);
        const int bits = position | (more ? ScatterTables::kMore : 0);
        list[2 * (place & 0xffff) + number] = uint16_t(bits);
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
  if (plan.way == ScatterWay::tables) {
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

// Writes every row of `out` [clients, rows, width], or the rows with entries (sorted; the others
// must be zero already).
template <typename T, int V, typename Source>
void launch_scatter(const Source& source, const ScatterPlan& plan, const SortedEntries& sorted,
                    void* out, Stream stream) {
  if (plan.width == 0) return;
  T* to = static_cast<T*>(out);
  if (plan.way == ScatterWay::tables) {
    if constexpr (requires { source.values(); })
      launch_scatter_tables<T, V>(plan, source.values(), sorted, to, stream);
    return;
  }
  if (plan.way == ScatterWay::staged) {
    if constexpr (requires { source.values(); })
      launch_scatter_staged<T, V>(source, plan, to, stream);
    return;
  }
  if (plan.way == ScatterWay::lists) {
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
