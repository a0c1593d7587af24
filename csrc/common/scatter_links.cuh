// Lists of the entries of each row of a client, linked in shared memory (common/scatter.h).
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

// What heads are while lists are linked.
enum class Heads {
  first,  // of a row: its first entry, -1: none
  ends,   // and above its 16 bits the last one
};

// Links `count` entries, first + i * step, in ascending order: next[e] holds the row of entry e (or
// -1) and gets the entry that follows it in its row (or -1); head[row] becomes the first, of
// `rows`. Called by one warp.
template <Heads heads = Heads::first>
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
      int before = -1, last = entry;
      if (row[c] >= 0 && (heads == Heads::ends || !later)) before = head[row[c]];
      if constexpr (heads == Heads::ends) {
        last = before >= 0 ? before >> 16 : base + (kWarp - 1 - __clz(int(same[c]))) * step;
        if (before >= 0) before &= 0xffff;
      }
      __syncwarp();
      if (row[c] >= 0) {
        next[entry] = later ? base + (__ffs(later) - 1) * step : before;
        if (__ffs(same[c]) - 1 == lane)
          head[row[c]] = heads == Heads::ends ? entry | last << 16 : entry;
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

// The same by a block, with heads for each of several ranges of positions, [ranges, stride], which
// different warps link; those of the first become the client's. Of fewer than 2^15 entries. Starts
// after a barrier of the caller, ends without one.
FEDPEFT_DEVICE void link_ranges(int* head, int stride, int ranges, int rows, int* next,
                                int positions, int slots, bool disjoint) {
  const int thread = int(threadIdx.x), warps = int(blockDim.x) / kWarp;
  if (ranges == 1) {
    link_slots(head, rows, next, positions, slots, disjoint, thread / kWarp, warps);
    return;
  }
  const int parts = disjoint ? slots : 1;
  for (int task = thread / kWarp; task < ranges * parts; task += warps) {
    const int range = task / parts, slot = task - range * parts;
    const int begin = range * positions / ranges, end = (range + 1) * positions / ranges;
    int* const own = head + range * stride;
    if (disjoint) {
      link_entries<Heads::ends>(own, rows, next, end - begin, begin * slots + slot, slots);
    } else {
      link_entries<Heads::ends>(own, rows, next, (end - begin) * slots, begin * slots, 1);
    }
  }
  __syncthreads();
  for (int r = thread; r < rows; r += int(blockDim.x)) {
    int following = -1;
    for (int range = ranges - 1; range >= 0; --range) {
      const int ends = head[range * stride + r];
      if (ends < 0) continue;
      next[ends >> 16] = following;
      following = ends & 0xffff;
    }
    head[r] = following;
  }
}

}  // namespace fedpeft::gpu
