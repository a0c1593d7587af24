// Sums of a scatter from values in shared memory (common/scatter.h, `staged`).
#pragma once

#include "common/device.cuh"
#include "common/scatter.h"
#include "common/scatter_links.cuh"
#include "common/streaming.cuh"

namespace fedpeft::gpu {

// A block a client and slice of columns. A group of lanes sums two neighbouring rows at a time; a
// list that has ended goes on at the entry behind all others, which adds zeros.
template <typename Source, typename T, int V>
__global__ void __launch_bounds__(ScatterStage::kThreads, 3)
    scatter_staged(Source source, T* out, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int N = 2, kThreads = ScatterStage::kThreads;
  FEDPEFT_DYNAMIC_SHARED(shared);
  const ScatterStage& stage = plan.stage;
  T* const values = reinterpret_cast<T*>(shared);
  int* const head = reinterpret_cast<int*>(shared + stage.head);
  int* const next = reinterpret_cast<int*>(shared + stage.next);
  const int slots = int(plan.slots), positions = int(plan.positions), entries = positions * slots;
  const int rows = int(plan.rows), slice = stage.slice;
  const int lanes = lanes_for(slice / V), groups = kThreads / lanes;
  const int64_t tasks = plan.clients * stage.slices;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, stage.slices);
    const int64_t first_column = (task - client * stage.slices) * slice;
    const int64_t right = plan.width - first_column;
    const int columns = right < slice ? int(right) : slice;
    const int thread = opaque_thread(), group = thread / lanes;
    const int first_of_lane = (thread - group * lanes) * V;

    copy_rows<V>(values, slice, source.values() + client * positions * plan.width + first_column,
                 plan.width, positions, columns, first_of_lane, lanes, group, groups);
    commit_copies();
#pragma unroll 1
    for (int i = thread; i < slice; i += kThreads)
      values[positions * slice + i] = from_acc<T>(A(0));
#pragma unroll 1
    for (int r = thread; r < stage.ranges * stage.head_stride; r += kThreads) head[r] = -1;
    if (thread == 0) next[entries] = -1;
    for (int p = thread; p < positions; p += N * kThreads) {
      int64_t n[N];
#pragma unroll
      for (int j = 0; j < N; ++j)
        n[j] = p + j * kThreads < positions ? client * positions + p + j * kThreads : -1;
      const auto at = source.at(n);
      for (int slot = 0; slot < slots; ++slot) {
        int row[N];
        source.rows(at, slot, row);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (n[j] >= 0) next[(p + j * kThreads) * slots + slot] = row[j];
        }
      }
    }
    __syncthreads();
    link_ranges(head, stage.head_stride, stage.ranges, rows, next, positions, slots,
                plan.disjoint_slots);
    wait_for_copies<0>();
    __syncthreads();

    const A scale = A(plan.scale);
    for (int column = first_of_lane; column < columns; column += lanes * V) {
      const T* const from = values + column;
      T* to = out + (client * rows + N * group) * plan.width + first_column + column;
#pragma unroll 1
      for (int r = N * group; r < rows; r += N * groups) {
        Pack<int, N> at = load_pack<N>(head + r);
        Sum<A, V> sum[N];
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u].clear();
#pragma unroll 1
        while ((at.at[0] & at.at[1]) >= 0) {
#pragma unroll
          for (int u = 0; u < N; ++u) {
            const uint32_t all = uint32_t(entries), one = uint32_t(at.at[u]);
            const uint32_t entry = one < all ? one : all;
            at.at[u] = next[entry];
            sum[u].add(load_pack<V>(from + plan.position_of(entry) * slice));
          }
        }
#pragma unroll
        for (int u = 0; u < N; ++u) {
          sum[u].scale(scale);
          if (r + u < rows) sum[u].store_once(to + u * plan.width);
        }
        to += N * groups * plan.width;
      }
    }
    if (task + gridDim.x < tasks) __syncthreads();
  }
}

template <typename T, int V, typename Source>
void launch_scatter_staged(const Source& source, const ScatterPlan& plan, T* out, Stream stream) {
  launch(scatter_staged<Source, T, V>, plan.clients * plan.stage.slices, ScatterStage::kThreads,
         plan.stage.shared_bytes, stream, source, out, plan);
}

}  // namespace fedpeft::gpu
