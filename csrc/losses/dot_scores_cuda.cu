// CUDA kernels of dot_scores: a group of lanes takes several positions at once; backward, in one
// pass over the vectors, also their sum for the user.
#include "common/position_sum.cuh"
#include "losses/dot_scores_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, FEDPEFT_TWO_OR_THREE)
    forward(DotScoresArgs a, int64_t total) {
  using A = acc_t<T>;
  constexpr int N = kAtOnce<T, V>;
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  const int64_t positions = a.positions, step = int64_t(gridDim.x) * groups * N;
  for (int64_t first = int64_t(blockIdx.x) * groups * N; first < total; first += step) {
    // Positions side by side, of which one division finds the clients; behind the last, that again.
    const int64_t n = first + threadIdx.x / lanes * N;
    int64_t at = n < total ? n : total - 1, client = divide(at, positions);
    int64_t left = (client + 1) * positions - at;
    const T *vector[N], *user[N];
    A product[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      vector[u] = static_cast<const T*>(a.vectors) + at * a.D;
      user[u] = static_cast<const T*>(a.user) + client * a.D;
      product[u] = 0;
      if (at + 1 == total) continue;
      ++at;
      if (--left > 0) continue;
      ++client;
      left = positions;
    }
    for (int64_t column = lane * V; column < a.D; column += lanes * V) {
      Pack<T, V> x[N], y[N];
#pragma unroll
      for (int u = 0; u < N; ++u) x[u] = load_pack<V>(vector[u] + column);
#pragma unroll
      for (int u = 0; u < N; ++u) y[u] = load_pack<V>(user[u] + column);
#pragma unroll
      for (int u = 0; u < N; ++u) {
#pragma unroll
        for (int i = 0; i < V; ++i) product[u] += to_acc(x[u].at[i]) * to_acc(y[u].at[i]);
      }
    }
    group_sums(product, lanes);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (n + u < total && lane == 0) static_cast<T*>(a.out)[n + u] = from_acc<T>(product[u]);
    }
  }
}

// Both gradients: a block a client and a block of its positions, of which a group of lanes takes
// every so many-th, N at once. `parts` of the user's sum go to `partial` where there are several.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, FEDPEFT_TWO_OR_THREE)
    backward(DotScoresArgs a, PositionSum shape, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int N = kAtOnce<T, V>;
  FEDPEFT_SHARED(A, parts, kThreads * V);
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  const int group = int(threadIdx.x) / lanes;
  const int64_t blocks = shape.blocks(), tasks = shape.clients * blocks;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, blocks), block = task - client * blocks;
    const int64_t begin = client * a.positions + block * PositionSum::kBlock;
    const int64_t left = (client + 1) * a.positions - begin;
    const int64_t end = begin + (left < PositionSum::kBlock ? left : PositionSum::kBlock);
    for (int64_t base = 0; base < a.D; base += lanes * V) {
      const int64_t column = base + lane * V;
      Sum<A, V> user, sum;
      user.clear();
      sum.clear();
      if (column < a.D) {
        user.set(static_cast<const T*>(a.user) + client * a.D + column);
        for (int64_t n = begin + group; n < end; n += groups * N) {
          A grad[N];
          Pack<T, V> vector[N];
#pragma unroll
          for (int u = 0; u < N; ++u) {
            const int64_t at = n + u * groups;
            grad[u] = 0;
            vector[u] = zero_pack<V, T>();
            if (at < end) {
              grad[u] = to_acc(static_cast<const T*>(a.grad)[at]);
              vector[u] = load_pack<V>(static_cast<const T*>(a.vectors) + at * a.D + column);
            }
          }
#pragma unroll
          for (int u = 0; u < N; ++u) {
            const int64_t at = n + u * groups;
            if (at >= end) continue;
            Sum<A, V> out;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              sum.at[v] += grad[u] * to_acc(vector[u].at[v]);
              out.at[v] = grad[u] * user.at[v];
            }
            out.store_once(static_cast<T*>(a.grad_vectors) + at * a.D + column);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) parts[(group * lanes + lane) * V + v] = sum.at[v];
      __syncthreads();
      for (int o = int(threadIdx.x); o < lanes * V && base + o < a.D; o += kThreads) {
        A total = 0;
        for (int i = 0; i < groups; ++i) total += parts[i * lanes * V + o];
        if (blocks == 1) {
          static_cast<T*>(a.grad_user)[client * a.D + base + o] = from_acc<T>(total);
        } else {
          partial[task * a.D + base + o] = total;
        }
      }
      __syncthreads();
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
          launch_row_batches<kAtOnce<T, V>>(forward<T, V>, total, a.D / V, stream, a, total);
        },
        a.vectors, a.user);
  });
}

PositionSum dot_scores_shape_user(const DotScoresArgs& a, int64_t clients) {
  return {clients, a.positions, a.D};
}

void dot_scores_backward(const DotScoresArgs& a, DType dtype, const PositionSum& shape,
                         void* partial, Stream stream) {
  if (a.D == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          launch(backward<T, V>, shape.clients * shape.blocks(), kThreads, 0, stream, a, shape,
                 static_cast<acc_t<T>*>(partial));
          if (shape.blocks() > 1)
            launch_join_blocks<T>(shape, OneArray<T>{static_cast<T*>(a.grad_user), a.D}, partial,
                                  stream);
        },
        a.vectors, a.user, a.grad_vectors, a.grad_user, partial);
  });
}

}  // namespace fedpeft::gpu
