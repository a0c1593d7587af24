// CUDA kernels of client_embedding: a group of lanes copies rows, several at once, 16 bytes a lane.
// A row is read about once, so that shared memory would not pay. Backward: a scatter
// (common/scatter.cuh).
#include "client_embedding/client_embedding_cuda.h"
#include "common/scatter.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

FEDPEFT_DEVICE int64_t row_at(const ClientEmbeddingArgs& a, int64_t n) {
  const int64_t row = a.rows[n];
  if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, n, a.num_rows);
  return row;
}

// The same for several positions at once, -1 where there is none or at padding.
template <int N>
FEDPEFT_DEVICE void rows_at(const ClientEmbeddingArgs& a, const int64_t (&at)[N],
                            int64_t (&row)[N]) {
  gather(a.rows, at, row);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (at[u] >= 0 && classify(row[u], a.num_rows) == Position::bad)
      FEDPEFT_BAD_INDEX("rows", row[u], at[u], a.num_rows);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) forward(ClientEmbeddingArgs a, int64_t total) {
  constexpr int N = kAtOnce<T, V>;
  const int64_t table = a.per_client ? a.num_rows * a.D : 0;
  for_row_batches<N>(total, a.D / V, [&](int64_t first, int step, int lane, int lanes) {
    int64_t at[N], row[N];
    const T* from[N];
#pragma unroll
    for (int u = 0; u < N; ++u) at[u] = first + u * step < total ? first + u * step : -1;
    rows_at(a, at, row);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      from[u] = static_cast<const T*>(a.weight);
      if (row[u] >= 0) from[u] += divide(at[u], a.positions) * table + row[u] * a.D;
    }
    for (int64_t column = lane * V; column < a.D; column += lanes * V) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        pack[u] = zero_pack<V, T>();
        if (row[u] >= 0) pack[u] = load_pack<V>(from[u] + column);
      }
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (at[u] >= 0) store_pack_once<V>(static_cast<T*>(a.out) + at[u] * a.D + column, pack[u]);
      }
    }
  });
}

template <typename T>
struct Source {
  ClientEmbeddingArgs a;

  FEDPEFT_HD const T* values() const { return static_cast<const T*>(a.grad); }
  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t) const { return row_at(a, n); }
  template <int N>
  struct At {
    int64_t row[N];
  };
  template <int N>
  FEDPEFT_DEVICE At<N> at(const int64_t (&n)[N]) const {
    At<N> at;
    rows_at(a, n, at.row);
    return at;
  }
  template <int N>
  FEDPEFT_DEVICE void rows(const At<N>& at, int, int (&row)[N]) const {
#pragma unroll
    for (int u = 0; u < N; ++u) row[u] = int(at.row[u]);
  }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.set(values() + n * a.D + column);
    return v;
  }
};

}  // namespace

void client_embedding(const ClientEmbeddingArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          launch_row_batches<kAtOnce<T, V>>(forward<T, V>, total, a.D / V, stream, a, total);
        },
        a.weight, a.out);
  });
}

ScatterShape client_embedding_shape(const ClientEmbeddingArgs& a, DType dtype, int64_t clients) {
  return {clients, a.positions, 1, a.num_rows, a.D, true, 1, element_size(dtype)};
}

void client_embedding_keys(const ClientEmbeddingArgs& a, const ScatterPlan& plan, void* keys,
                           Stream stream) {
  launch_scatter_keys(Source<float>{a}, plan, keys, stream);
}

void client_embedding_backward(const ClientEmbeddingArgs& a, DType dtype, const ScatterPlan& plan,
                               const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          launch_scatter<T, decltype(width)::value>(Source<T>{a}, plan, sorted, out, stream);
        },
        a.grad, out, sorted.partial);
  });
}

}  // namespace fedpeft::gpu
