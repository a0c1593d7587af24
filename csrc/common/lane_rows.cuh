// Sums of table rows that the lanes of a group find together: a lane knows one row of one of the
// group's positions, so that indices are loaded or hashed once, and passes its place on by
// shuffles.
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

// Positions that a group takes at once.
template <int V>
constexpr int kLanePositions = V > 4 ? 2 : 4;

// out[n + k] = base[item] + weight * sum of the `slots` rows of position k, for k below
// kLanePositions and n + k below `total`; zeros where the item is -1. Lane k * slots + s has the
// item of position k and the place of its s-th row in `tables` (-1 at padding). The lanes of a warp
// call together.
template <int V, typename T>
FEDPEFT_DEVICE void sum_lane_rows(const T* tables, const T* base, T* out, int64_t n, int64_t total,
                                  int64_t width, int slots, acc_t<T> weight, int64_t item,
                                  int64_t row, int lane, int lanes) {
  using A = acc_t<T>;
  constexpr int N = kLanePositions<V>;
  for (int64_t column = lane * V; column - lane * V < width; column += lanes * V) {
    const bool mine = column < width;
    Sum<A, V> sum[N];
#pragma unroll
    for (int k = 0; k < N; ++k) {
      sum[k].clear();
      if (!base) continue;
      const int64_t from = __shfl_sync(kFullMask, item, k * slots, lanes);
      const bool there = mine && from >= 0;
      sum[k].set(load_global_if<V>(base + (there ? from * width + column : 0), there));
    }
#pragma unroll 1
    for (int s = 0; s < slots; ++s) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const int64_t from = __shfl_sync(kFullMask, row, k * slots + s, lanes);
        const bool there = mine && from >= 0;
        pack[k] = load_global_if<V>(tables + (there ? from + column : 0), there);
      }
#pragma unroll
      for (int k = 0; k < N; ++k) {
#pragma unroll
        for (int i = 0; i < V; ++i) sum[k].at[i] += weight * to_acc(pack[k].at[i]);
      }
    }
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (mine && n + k < total) sum[k].store_once(out + (n + k) * width + column);
    }
  }
}

}  // namespace fedpeft::gpu
