// CUDA kernels of lora_lookup. Forward: a block serves a range of one client's positions with B
// transposed in shared memory where it fits, a group of lanes a position. Backward: A by a scatter,
// B by a sum over positions.
#include "common/position_sum.cuh"
#include "common/scatter.cuh"
#include "lora_lookup/lora_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor

// The row of A that position n reads, -1 at padding.
FEDPEFT_DEVICE int64_t row_at(const LoraLookupArgs& a, int64_t n) {
  const int64_t row = a.rows[n];
  if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, n, a.num_rows);
  return row;
}

// Blocks of one client take `span` positions each.
template <typename T, int V, bool Staged>
__global__ void __launch_bounds__(kThreads, Staged ? 4 : 2)
    forward(LoraLookupArgs a, int64_t clients, int64_t span) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  A* transposed = reinterpret_cast<A*>(shared);  // [rank, D]
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  const int64_t spans = (a.positions + span - 1) / span, tasks = clients * spans;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, spans), begin = (task - client * spans) * span;
    const int64_t end = begin + span < a.positions ? begin + span : a.positions;
    const int64_t c = a.per_client ? client : 0;
    const T* B = static_cast<const T*>(a.B) + c * a.D * a.rank;
    if constexpr (Staged) {
      __syncthreads();  // the readers of the task before
      for (int64_t i = threadIdx.x; i < a.D * a.rank; i += kThreads) {
        const int64_t d = divide(i, a.rank);
        transposed[(i - d * a.rank) * a.D + d] = to_acc(B[i]);
      }
      __syncthreads();
    }
    for (int64_t p = begin + threadIdx.x / lanes; p < end; p += groups) {
      const int64_t n = client * a.positions + p, item = a.items[n];
      if (classify(item, a.num_items) == Position::bad)
        FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
      const int64_t row = a.separate_rows ? row_at(a, n) : item;
      if ((row < 0) != (item < 0)) FEDPEFT_BAD_INDEX("rows", row, n, a.num_rows);
      const T* factors = static_cast<const T*>(a.A) + (c * a.num_rows + row) * a.rank;
      T* out = static_cast<T*>(a.out) + n * a.D;
      for (int64_t column = lane * V; column < a.D; column += lanes * V) {
        Sum<A, V> sum;
        sum.clear();
        if (item >= 0) {
          if (a.base) sum.set(static_cast<const T*>(a.base) + item * a.D + column);
#pragma unroll 4
          for (int64_t j = 0; j < a.rank; ++j) {
            const A factor = to_acc(factors[j]);
            if constexpr (Staged) {
              sum.add_scaled(factor, transposed + j * a.D + column);
            } else {
#pragma unroll
              for (int v = 0; v < V; ++v)
                sum.at[v] += factor * to_acc(B[(column + v) * a.rank + j]);
            }
          }
        }
        sum.store(out + column);
      }
    }
  }
}

// B^T g at the row of A that a position reads; columns are those of the rank.
template <typename T>
struct SourceA {
  LoraLookupArgs a;

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t) const { return row_at(a, n); }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.clear();
    const int64_t client = a.per_client ? divide(n, a.positions) : 0;
    const T* B = static_cast<const T*>(a.B) + client * a.D * a.rank + column;
    const T* grad = static_cast<const T*>(a.grad) + n * a.D;
#pragma unroll 4
    for (int64_t d = 0; d < a.D; ++d) v.add_scaled(to_acc(grad[d]), B + d * a.rank);
    return v;
  }
};

// Output d * rank + j: g[d] a[j].
template <typename T>
struct SourceB {
  LoraLookupArgs a;

  FEDPEFT_DEVICE bool active(int64_t n) const { return row_at(a, n) >= 0; }
  template <int V>
  FEDPEFT_DEVICE void add(Sum<acc_t<T>, V>& sum, int64_t client, int64_t n, int64_t output) const {
    const int64_t d = divide(output, a.rank), j = output - d * a.rank;
    const int64_t row = (a.per_client ? client * a.num_rows : 0) + a.rows[n];
    sum.add_scaled(to_acc(static_cast<const T*>(a.grad)[n * a.D + d]),
                   static_cast<const T*>(a.A) + row * a.rank + j);
  }
};

// Both gradients in one launch: the first `lists` blocks take A's, the others B's.
template <typename T, int V>
__global__ void __launch_bounds__(256, 2)
    backward(LoraLookupArgs a, ScatterPlan plan, PositionSum shape, T* out_A, T* out_B,
             int64_t lists) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  if (blockIdx.x < lists) {
    scatter_lists_tasks<T, V>(SourceA<T>{a}, out_A, plan, shared, blockIdx.x, lists);
  } else {
    sum_positions_tasks<T, V>(SourceB<T>{a}, OneArray<T>{out_B, shape.outputs}, shape,
                              static_cast<acc_t<T>*>(nullptr), blockIdx.x - lists,
                              gridDim.x - lists);
  }
}

}  // namespace

void lora_lookup(const LoraLookupArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions;
  if (total == 0 || a.D == 0) return;
  const Limits device = limits();
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = a.rank * a.D * int64_t(sizeof(acc_t<T>));
    const bool staged = bytes <= kStagedBytes && bytes <= device.shared_bytes;
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          // Long enough to pay for the copy of B, short enough to fill the device.
          const int64_t groups = kThreads / lanes_for(a.D / V);
          const int64_t even =
              (total + 16 * device.multiprocessors - 1) / (16 * device.multiprocessors);
          const int64_t span = even > 4 * groups ? even : 4 * groups;
          const int64_t grid = clients * ((a.positions + span - 1) / span);
          if (staged) {
            launch(forward<T, V, true>, grid, kThreads, bytes, stream, a, clients, span);
          } else {
            launch(forward<T, V, false>, grid, kThreads, 0, stream, a, clients, span);
          }
        },
        a.base, a.out);
  });
}

ScatterShape lora_lookup_shape_A(const LoraLookupArgs& a, int64_t clients) {
  return {clients, a.positions, 1, a.num_rows, a.rank, true};
}

void lora_lookup_keys(const LoraLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream) {
  launch_scatter_keys(SourceA<float>{a}, plan, keys, stream);
}

void lora_lookup_backward_A(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                            const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          launch_scatter<T, decltype(width)::value>(SourceA<T>{a}, plan, sorted, out, stream);
        },
        a.B, out, sorted.partial);
  });
}

void lora_lookup_backward(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const PositionSum& shape, void* out_A, void* out_B, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t lists = grid_half(plan.list_blocks());
          const int64_t sums = grid_half(position_sum_tasks<V>(shape, plan.block));
          launch(backward<T, V>, lists + sums, unsigned(plan.block), plan.shared_bytes, stream, a,
                 plan, shape, static_cast<T*>(out_A), static_cast<T*>(out_B), lists);
        },
        a.A, a.B, out_A, out_B);
  });
}

PositionSum lora_lookup_shape_B(const LoraLookupArgs& a, int64_t clients) {
  return {clients, a.positions, a.D * a.rank};
}

void lora_lookup_backward_B(const LoraLookupArgs& a, DType dtype, const PositionSum& shape,
                            void* partial, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          launch_position_sum<T, decltype(width)::value>(
              SourceB<T>{a}, shape, OneArray<T>{static_cast<T*>(out), shape.outputs}, partial,
              stream);
        },
        a.A, out, partial);
  });
}

}  // namespace fedpeft::gpu
