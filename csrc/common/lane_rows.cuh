// Sums of table rows that the lanes of a group find together: a lane knows one row of one of the
// group's positions, so that indices are loaded or hashed once, and passes its place on by
// shuffles.
#pragma once

#include "common/device.cuh"
#include "common/launch.h"

namespace fedpeft::gpu {

// Positions that a group takes at once, at most.
template <int V>
constexpr int kLanePositions = V > 4 ? 2 : 4;

// Rows of a group that are under way together.
template <int V>
constexpr int kLaneRows = 2 * kLanePositions<V>;

// Of kernels that call sum_lane_rows: a thread has many registers for what is under way, and small
// blocks leave few of a multiprocessor's unused.
constexpr int kLaneThreads = 128;

// Calls f with the number of positions (a constant) of which a group of lanes may find the `slots`
// rows each, in tables of so many elements, and returns true; or false.
template <int V, typename F>
bool with_lane_positions(int64_t slots, int64_t elements, int lanes, const F& f) {
  if (slots <= 0 || slots > lanes || elements <= 0 || elements / V > INT32_MAX) return false;
  if (kLanePositions<V> * slots <= lanes) {
    f(std::integral_constant<int, kLanePositions<V>>{});
  } else if (2 * slots <= lanes) {
    f(std::integral_constant<int, 2>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
  return true;
}

// Which positions a block takes: several turns, of which the indices of the next are loaded with
// the rows of this one, while blocks are many. Neighbours stand side by side in each turn, so that
// blocks at work read the tables of few clients, which L2 holds.
struct LaneTurns {
  static constexpr int kNeighbours = 8;
  int64_t total, tasks;
  int turn, turns;  // positions of a turn; turns of a block

  LaneTurns(int64_t total_, int64_t turn_) : total(total_), turn(int(turn_)) {
    const int64_t many = total / (turn_ * 32 * limits().multiprocessors);
    turns = int(many < 1 ? 1 : many > 4 ? 4 : many);
    const int64_t together = turn_ * turns * kNeighbours;
    tasks = (total + together - 1) / together * kNeighbours;
  }
  FEDPEFT_DEVICE int64_t first(int64_t task) const {
    const int64_t chunk = task / kNeighbours;
    return (chunk * turns * kNeighbours + task % kNeighbours) * turn;
  }
  FEDPEFT_DEVICE int64_t end(int64_t first) const {
    const int64_t behind = first + int64_t(turns) * step();
    return behind < total ? behind : total;
  }
  FEDPEFT_DEVICE int step() const { return kNeighbours * turn; }
};

// out[n + k] = base[item] + weight * sum of the `slots` rows of position k, for k below N and n + k
// below `total`; zeros where the item is -1. Lane k * slots + s has the item of position k and the
// place of its s-th row in `tables`, in packs of V: 0 at padding, a row that is read for nothing,
// since loads under a condition wait for each other. The lanes of a warp call together.
template <int V, int N, typename T>
FEDPEFT_DEVICE void sum_lane_rows(const T* tables, const T* base, T* out, int64_t n, int64_t total,
                                  int64_t width, int slots, acc_t<T> weight, int64_t item, int row,
                                  int lane, int lanes) {
  using A = acc_t<T>;
  constexpr int kSlots = kLaneRows<V> / N;  // at a time
  // Bit k * slots: whether position k has an item.
  const unsigned items = __ballot_sync(kFullMask, item >= 0) >> (int(threadIdx.x) % kWarp - lane);
  for (int64_t column = lane * V; column - lane * V < width; column += lanes * V) {
    const bool mine = column < width;
    const T* const from = tables + (mine ? column : 0);
    Pack<T, V> under[N], rows[kSlots][N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const int64_t of = __shfl_sync(kFullMask, item, k * slots, lanes);
      under[k] = zero_pack<V, T>();
      if (base) under[k] = load_pack<V>(of >= 0 && mine ? base + of * width + column : tables);
    }
    Sum<A, V> sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) sum[k].set(under[k]);
#pragma unroll 1
    for (int first = 0; first < slots; first += kSlots) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const int slot = first + s < slots ? first + s : first;  // once more, for nothing
#pragma unroll
        for (int k = 0; k < N; ++k)
          rows[s][k] = load_pack<V>(
              from + int64_t(V) * __shfl_sync(kFullMask, row, k * slots + slot, lanes));
      }
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (first + s >= slots) break;
#pragma unroll
        for (int k = 0; k < N; ++k) {
#pragma unroll
          for (int i = 0; i < V; ++i) sum[k].at[i] += weight * to_acc(rows[s][k].at[i]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (!(items >> (k * slots) & 1)) sum[k].clear();
      if (mine && n + k < total) sum[k].store_once(out + (n + k) * width + column);
    }
  }
}

}  // namespace fedpeft::gpu
