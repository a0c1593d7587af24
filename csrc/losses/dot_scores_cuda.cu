// CUDA kernels of dot_scores: a group of lanes a position.
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

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) backward(DotScoresArgs a, int64_t total) {
  using A = acc_t<T>;
  for_rows(total, a.D / V, [&](int64_t n, int lane, int lanes) {
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
  });
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

void dot_scores_backward_vectors(const DotScoresArgs& a, DType dtype, int64_t clients,
                                 Stream stream) {
  const int64_t total = clients * a.positions;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          launch_rows(backward<T, V>, total, a.D / V, stream, a, total);
        },
        a.user, a.grad_vectors);
  });
}

PositionSum dot_scores_shape_user(const DotScoresArgs& a, int64_t clients) {
  return {clients, a.positions, a.D};
}

void dot_scores_backward_user(const DotScoresArgs& a, DType dtype, const PositionSum& shape,
                              void* partial, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          launch_position_sum<T, decltype(width)::value>(
              Source<T>{a}, shape, static_cast<T*>(a.grad_user), partial, stream);
        },
        a.vectors, a.grad_user, partial);
  });
}

}  // namespace fedpeft::gpu
