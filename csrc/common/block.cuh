// What the threads of a whole block do together. All of them call, and get the same answer; sums
// are in an order that depends on the block's size alone.
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

// Sum over the threads. `shared` has a value a warp.
template <typename X>
FEDPEFT_DEVICE X block_sum(X x, X* shared) {
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  X sum = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) sum += shared[w];
  __syncthreads();
  return sum;
}

// Whether any thread says so. `shared` has a value a warp.
FEDPEFT_DEVICE bool block_any(bool mine, int* shared) {
  const unsigned votes = __ballot_sync(kFullMask, mine);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = votes != 0;
  __syncthreads();
  bool any = false;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) any |= shared[w] != 0;
  __syncthreads();
  return any;
}

// How many threads before the calling one say so, and in `all` how many altogether. `shared` has a
// value a warp.
FEDPEFT_DEVICE int block_rank(bool mine, int* shared, int* all) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const unsigned votes = __ballot_sync(kFullMask, mine);
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), sum = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    if (w < warp) before += shared[w];
    sum += shared[w];
  }
  __syncthreads();
  *all = sum;
  return before;
}

// The sum over the threads before the calling one, and in `all` over all. `shared` has a value a
// warp. Ends without a barrier.
FEDPEFT_DEVICE int block_sum_before(int x, int* shared, int* all) {
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  int before = x;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, before, step);
    if (lane >= step) before += other;
  }
  if (lane == kWarp - 1) shared[warp] = before;
  __syncthreads();
  before -= x;
  *all = 0;
  for (int w = 0; w < int(blockDim.x) / kWarp; ++w) {
    if (w < warp) before += shared[w];
    *all += shared[w];
  }
  return before;
}

// Sorts by (key, place) ascending: a bitonic sorter whose comparators all point the same way, so
// that what lies past the end needs no place. Starts after a barrier of the caller, ends with one.
template <typename Key>
FEDPEFT_DEVICE void block_sort(Key* keys, int* places, int n) {
  for (int64_t run = 2; run < 2 * int64_t(n); run *= 2) {
    for (int64_t gap = run / 2; gap > 0; gap /= 2) {
      const int64_t rest = n & (2 * gap - 1), end = n + (rest < gap ? rest : gap);
      for (int64_t pair = threadIdx.x; 2 * pair < end; pair += blockDim.x) {
        const int64_t i = 2 * pair - (pair & (gap - 1));
        // The first pass of a run compares mirrored places.
        const int64_t other = gap == run / 2 ? (i ^ (run - 1)) : (i ^ gap);
        if (other >= n) continue;
        const Key x = keys[i], y = keys[other];
        const int from_x = places[i], from_y = places[other];
        if (x < y || (x == y && from_x < from_y)) continue;
        keys[i] = y;
        keys[other] = x;
        places[i] = from_y;
        places[other] = from_x;
      }
      __syncthreads();
    }
  }
}

// A number, or a vector of them.
template <typename A>
FEDPEFT_DEVICE void add_to(A& sum, const A& x) {
  sum += x;
}
template <typename A, int V>
FEDPEFT_DEVICE void add_to(Pack<A, V>& sum, const Pack<A, V>& x) {
#pragma unroll
  for (int v = 0; v < V; ++v) sum.at[v] += x.at[v];
}
template <typename A>
FEDPEFT_DEVICE void store_to(A* p, const A& x) {
  *p = x;
}
template <typename A, int V>
FEDPEFT_DEVICE void store_to(A* p, const Pack<A, V>& x) {
  store_pack<V>(p, x);
}

// store(column, sum over i in [0, count) of term(i, column)) for each column in [0, width), a
// thread a column. Terms are numbers, or vectors of some columns from `column` on. A group of lanes
// takes every so many-th i, N of whose terms are under way together, and the groups' sums, in
// `partial` (column_sums_scratch values, for terms of `vector` columns), are added in order. Starts
// after a barrier of the caller, ends with one.
__host__ __device__ inline int64_t column_sums_scratch(int64_t width, int threads, int vector = 1) {
  return width * (threads / lanes_for(width / vector));
}
template <int N = 4, typename A, typename Term, typename Store>
FEDPEFT_DEVICE void column_sums(int width, int count, A* partial, const Term& term,
                                const Store& store) {
  using Value = decltype(term(0, 0));
  constexpr int V = int(sizeof(Value) / sizeof(A));
  const int lanes = lanes_for(width / V), groups = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  for (int column = lane * V; column < width; column += lanes * V) {
    Value sum{};
    int i = group;
    if constexpr (N > 1) {
#pragma unroll 1
      for (; i + (N - 1) * groups < count; i += N * groups) {
        Value terms[N];
#pragma unroll
        for (int u = 0; u < N; ++u) terms[u] = term(i + u * groups, column);
#pragma unroll
        for (int u = 0; u < N; ++u) add_to(sum, terms[u]);
      }
    }
#pragma unroll 1
    for (; i < count; i += groups) add_to(sum, term(i, column));
    store_to(partial + group * width + column, sum);
  }
  __syncthreads();
  const int used = count < groups ? count : groups;
  for (int column = int(threadIdx.x); column < width; column += int(blockDim.x)) {
    A sum = 0;
#pragma unroll 4
    for (int g = 0; g < used; ++g) sum += partial[g * width + column];
    store(column, sum);
  }
  __syncthreads();
}

}  // namespace fedpeft::gpu
