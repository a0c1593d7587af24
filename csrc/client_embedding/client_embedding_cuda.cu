// CUDA kernels of client_embedding: a group of lanes copies a row, 16 bytes a lane. A row is read
// about once, so that shared memory would not pay. Backward: a scatter (common/scatter.cuh).
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

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) forward(ClientEmbeddingArgs a, int64_t total) {
  const int64_t table = a.per_client ? a.num_rows * a.D : 0;
  for_rows(total, a.D / V, [&](int64_t n, int lane, int lanes) {
    const int64_t row = row_at(a, n);
    const T* from = static_cast<const T*>(a.weight) + divide(n, a.positions) * table + row * a.D;
    T* to = static_cast<T*>(a.out) + n * a.D;
    for (int64_t column = lane * V; column < a.D; column += lanes * V) {
      if (row >= 0) {
        store_pack<V>(to + column, load_pack<V>(from + column));
      } else {
        store_zeros<V>(to + column);
      }
    }
  });
}

template <typename T>
struct Source {
  ClientEmbeddingArgs a;

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t) const { return row_at(a, n); }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.set(static_cast<const T*>(a.grad) + n * a.D + column);
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
          launch_rows(forward<T, V>, total, a.D / V, stream, a, total);
        },
        a.weight, a.out);
  });
}

ScatterShape client_embedding_shape(const ClientEmbeddingArgs& a, int64_t clients) {
  return {clients, a.positions, 1, a.num_rows, a.D, true};
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
