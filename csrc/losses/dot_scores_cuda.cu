// CUDA kernels of dot_scores: a group of lanes a position, and a sum over positions for the user.
#include "common/position_sum.cuh"
#include "losses/dot_scores_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 3) forward(DotScoresArgs a, int64_t total) {
  using A = acc_t<T>;
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < total;
       first += int64_t(gridDim.x) * groups) {
    const int64_t n = first + threadIdx.x / lanes;
    A product = 0;
    if (n < total) {
      const T* vector = static_cast<const T*>(a.vectors) + n * a.D;
      const T* user = static_cast<const T*>(a.user) + divide(n, a.positions) * a.D;
      for (int64_t column = lane * V; column < a.D; column += lanes * V) {
        Sum<A, V> x, y;
        x.set(vector + column);
        y.set(user + column);
#pragma unroll
        for (int i = 0; i < V; ++i) product += x.at[i] * y.at[i];
      }
    }
    product = group_sum(product, lanes);
    if (n < total && lane == 0) static_cast<T*>(a.out)[n] = from_acc<T>(product);
  }
}

template <typename T>
struct Source {
  DotScoresArgs a;

  FEDPEFT_DEVICE bool active(int64_t) const { return true; }
  template <int V>
  FEDPEFT_DEVICE void add(Sum<acc_t<T>, V>& sum, int64_t, int64_t n, int64_t output) const {
    sum.add_scaled(to_acc(static_cast<const T*>(a.grad)[n]),
                   static_cast<const T*>(a.vectors) + n * a.D + output);
  }
};

// Gradient of the vectors by the first `rows` blocks, a group of lanes a position; of the user by
// the others.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    backward(DotScoresArgs a, int64_t total, PositionSum shape, acc_t<T>* partial, int64_t rows) {
  using A = acc_t<T>;
  if (blockIdx.x >= rows) {
    sum_positions_tasks<T, V>(Source<T>{a}, OneArray<T>{static_cast<T*>(a.grad_user), a.D}, shape,
                              partial, blockIdx.x - rows, gridDim.x - rows);
    return;
  }
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  for (int64_t n = int64_t(blockIdx.x) * groups + threadIdx.x / lanes; n < total;
       n += rows * groups) {
    const A grad = to_acc(static_cast<const T*>(a.grad)[n]);
    const T* user = static_cast<const T*>(a.user) + divide(n, a.positions) * a.D;
    T* out = static_cast<T*>(a.grad_vectors) + n * a.D;
    for (int64_t column = lane * V; column < a.D; column += lanes * V) {
      Sum<A, V> v;
      v.set(user + column);
#pragma unroll
      for (int i = 0; i < V; ++i) v.at[i] *= grad;
      v.store(out + column);
    }
  }
}

}  // namespace

void dot_scores(const DotScoresArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          launch_rows(forward<T, V>, total, a.D / V, stream, a, total);
        },
        a.vectors, a.user);
  });
}

PositionSum dot_scores_shape_user(const DotScoresArgs& a, int64_t clients) {
  return {clients, a.positions, a.D};
}

void dot_scores_backward(const DotScoresArgs& a, DType dtype, const PositionSum& shape,
                         void* partial, Stream stream) {
  const int64_t total = shape.clients * shape.positions;
  if (a.D == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t groups = kThreads / lanes_for(a.D / V);
          const int64_t rows = grid_half((total + groups - 1) / groups);
          const int64_t sums = grid_half(position_sum_tasks<V>(shape, kThreads));
          launch(backward<T, V>, rows + sums, kThreads, 0, stream, a, total, shape,
                 static_cast<acc_t<T>*>(partial), rows);
          if (shape.blocks() > 1)
            launch_join_blocks<T>(shape, OneArray<T>{static_cast<T*>(a.grad_user), a.D}, partial,
                                  stream);
        },
        a.vectors, a.user, a.grad_vectors, a.grad_user, partial);
  });
}

}  // namespace fedpeft::gpu
