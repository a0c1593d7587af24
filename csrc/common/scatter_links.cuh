// Lists of the entries of each row of a client, linked in shared memory (common/scatter.h).
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

// Links `count` entries, first + i * step, in ascending order: next[e] holds the row of entry e (or
// -1) and gets the entry that follows it in its row (or -1); head[row] becomes the first, of
// `rows`. Called by one warp.
FEDPEFT_DEVICE void link_entries(int* head, int rows, int* next, int count, int first, int step) {
  constexpr int kChunks = 2;  // whose rows are compared at once
  const int lane = int(threadIdx.x) % kWarp, bits = bits_of(rows);
#pragma unroll 1
  for (int chunk = (count - 1) / kWarp * kWarp; chunk >= 0; chunk -= kChunks * kWarp) {
    int row[kChunks], key[kChunks];
    unsigned same[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int at = chunk - c * kWarp + lane;
      row[c] = at >= 0 && at < count ? next[first + at * step] : -1;
      key[c] = row[c];
    }
    lanes_alike(key, bits, same);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int base = first + (chunk - c * kWarp) * step, entry = base + lane * step;
      const unsigned later = lane == kWarp - 1 ? 0u : same[c] & (kFullMask << (lane + 1));
      int following = -1;
      if (row[c] >= 0) following = later ? base + (__ffs(later) - 1) * step : head[row[c]];
      __syncwarp();
      if (row[c] >= 0) {
        next[entry] = following;
        if (__ffs(same[c]) - 1 == lane) head[row[c]] = entry;
      }
      __syncwarp();
    }
  }
}

// The same of all entries of positions, position * slots + slot, by the `warps` warps of which the
// calling one is `warp`: those of each slot by a warp, where slots have rows of their own.
FEDPEFT_DEVICE void link_slots(int* head, int rows, int* next, int positions, int slots,
                               bool disjoint, int warp, int warps) {
  if (disjoint) {
    for (int slot = warp; slot < slots; slot += warps)
      link_entries(head, rows, next, positions, slot, slots);
  } else if (warp == 0) {
    link_entries(head, rows, next, positions * slots, 0, 1);
  }
}

}  // namespace fedpeft::gpu
