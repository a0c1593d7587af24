// Sums of rows of a client's table in shared memory: a block takes a client and a slice of columns,
// copies its part of the table, and meanwhile finds which rows the positions add up, and asks for
// their base vectors.
#pragma once

#include "common/lane_rows.cuh"
#include "common/streaming.cuh"

namespace fedpeft::gpu {

// Byte offsets of arrays that lie one behind the other.
struct Carve {
  int64_t used = 0;
  template <typename X>
  int64_t take(int64_t count) {
    const int64_t at = used;
    used += (count * int64_t(sizeof(X)) + 15) / 16 * 16;
    return at;
  }
};

// out[n] = base[items[n]] + the sum of `slots` rows of the client's table, a row D wide; zeros at
// padding.
struct RowSums {
  const void *tables, *base;
  void* out;
  IndexArray items;
  int64_t num_items, positions, D;
  int rows, slots;
};

// `width` columns of the table at a time, and a chunk of positions.
struct StagedPlan {
  static constexpr int64_t kBytes = 72 * 1024;  // so that three blocks share a multiprocessor
  unsigned threads;
  int slices, width, chunk;
  int64_t blocks, list, bytes;

  // Copying a table pays where each row is read about twice; else caches do as well.
  static bool pays(int64_t positions, int64_t slots, int64_t rows, int64_t D) {
    return D > 0 && rows > 0 && positions * slots >= 2 * rows && rows * D < INT32_MAX;
  }
  static int64_t chunk_of(int64_t positions, int64_t slots) {
    while (positions > 1 && positions * slots > 2048) positions = (positions + 1) / 2;
    return positions;
  }
  // False where it does not pay, or shared memory does not hold slices of at least `least` bytes a
  // row.
  template <typename T, int V>
  bool make(int64_t clients, int64_t positions, int64_t rows, int64_t slots, int64_t D,
            int64_t least) {
    if (!pays(positions, slots, rows, D)) return false;
    const int64_t device = limits().shared_bytes, most = device < kBytes ? device : kBytes;
    chunk = int(chunk_of(positions, slots));
    for (int64_t some = 1;; some *= 2) {
      const int64_t columns = ((D + some - 1) / some + V - 1) / V * V;
      if (some > 1 && columns * int64_t(sizeof(T)) < least) return false;
      Carve carve;
      carve.take<T>(rows * columns);
      list = carve.take<int>(chunk * slots);
      if (carve.used > most) continue;
      bytes = carve.used;
      slices = int((D + columns - 1) / columns);
      blocks = clients * slices;
      width = int(columns);
      // About 32 warps a multiprocessor, however many blocks fit.
      threads = bytes > 48 * 1024 ? 320 : 256;
      return true;
    }
  }
  // They are better at single elements, and where few blocks would be staged (lane_rows.cuh).
  template <int V>
  bool beats_lanes() const {
    return V > 1 && blocks >= 8 * limits().multiprocessors;
  }
};

// Blocks of sum_staged_rows take at most so many threads.
constexpr int kStagedThreads = 320;

// source.start(client) while the table comes, source.find(n, count, list) to leave the rows of
// `count` positions from n on, -1 at padding, source.ready(rows, list, count, first chunk) when
// they and the table are there, with a barrier behind whatever it writes, and source.scale(entry).
// kTogether positions of a group are under way at a time.
template <int V, int kTogether, typename T, typename Source>
FEDPEFT_DEVICE void sum_staged_rows(const RowSums& a, const StagedPlan& plan, Source& source,
                                    unsigned char* shared) {
  using A = acc_t<T>;
  T* rows = reinterpret_cast<T*>(shared);
  int* list = reinterpret_cast<int*>(shared + plan.list);
  const int width = plan.width, slots = a.slots;
  const int lanes = lanes_for(width / V), groups = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  for (int64_t task = blockIdx.x; task < plan.blocks; task += gridDim.x) {
    const int64_t client = divide(task, plan.slices);
    const int64_t begin = (task - client * plan.slices) * width;
    const int here = int(a.D - begin < width ? a.D - begin : width);
    const T* const from = static_cast<const T*>(a.tables) + client * a.rows * a.D + begin;
    const T* const base = a.base ? static_cast<const T*>(a.base) + begin : nullptr;
    copy_rows<V>(rows, width, from, a.D, a.rows, here, lane * V, lanes, group, groups);
    source.start(client);
    for (int64_t first = 0; first < a.positions; first += plan.chunk) {
      const int64_t left = a.positions - first, n = client * a.positions + first;
      const int count = int(left < plan.chunk ? left : plan.chunk);
      if (base) {
        for (int p = int(threadIdx.x); p < count; p += int(blockDim.x)) {
          const int64_t item = a.items[n + p];
          if (classify(item, a.num_items) == Position::item)
            ask_ahead(base + item * a.D, here * int64_t(sizeof(T)), 0, 1);
        }
      }
      source.find(n, count, list);
      if (first == 0) copies_done();
      __syncthreads();
      source.ready(rows, list, count, first == 0);
      for (int p = group; p < count; p += kTogether * groups) {
        int64_t place[kTogether], item[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          const int at = p + u * groups;
          place[u] = at < count && list[at * slots] >= 0 ? n + at : -1;
          item[u] = place[u];
        }
        if (base) gather(a.items, place, item);
        for (int column = lane * V; column < here; column += lanes * V) {
          // At padding something else that lies in memory: loads under a condition wait for each
          // other.
          Pack<T, V> under[kTogether];
#pragma unroll
          for (int u = 0; u < kTogether; ++u) {
            under[u] = zero_pack<V, T>();
            if (base) under[u] = load_pack<V>(item[u] >= 0 ? base + item[u] * a.D + column : from);
          }
#pragma unroll
          for (int u = 0; u < kTogether; ++u) {
            const int at = p + u * groups;
            if (at >= count) continue;
            Sum<A, V> sum;
            sum.clear();
            if (item[u] >= 0) {
              sum.add(under[u]);
#pragma unroll 4
              for (int s = 0; s < slots; ++s) {
                const int e = at * slots + s;
                sum.add_scaled(source.scale(e), rows + list[e] * width + column);
              }
            }
            sum.store_once(static_cast<T*>(a.out) + (n + at) * a.D + begin + column);
          }
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace fedpeft::gpu
