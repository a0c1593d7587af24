// What the ways of hash_lookup with SENet share: where its weights' gradients go, and how a block
// makes all gradients of a client.
#pragma once

#include "common/logistic.cuh"
#include "common/scatter_links.cuh"
#include "hash_lookup/hash.cuh"

namespace fedpeft::gpu {
namespace {

// Where output i of [w1 (S, H), b1 (S), w2 (H, S), b2 (H)] is stored.
template <typename T>
struct SENetOutputs {
  T *w1, *b1, *w2, *b2;
  int64_t S, H;

  SENetOutputs(const HashLookupArgs& a, const SENetGradients& out)
      : w1(static_cast<T*>(out.w1)),
        b1(static_cast<T*>(out.b1)),
        w2(static_cast<T*>(out.w2)),
        b2(static_cast<T*>(out.b2)),
        S(a.S),
        H(a.H) {}
  FEDPEFT_DEVICE T* operator()(int64_t client, int64_t output) const {
    int64_t i = output;
    if (i < S * H) return w1 + client * S * H + i;
    if ((i -= S * H) < S) return b1 + client * S + i;
    if ((i -= S) < H * S) return w2 + client * H * S + i;
    return b2 + client * H + (i - H * S);
  }
};

// How a block makes all gradients of a client: places in shared memory, the client's gradient
// there too where `staged`; positions of the SENet go in chunks; sums over positions are cut into
// `strips`.
struct WholePlan {
  unsigned threads;
  int lanes, chunk, strips;
  bool staged;
  int64_t grad, coefficients, squeezed, product, net, hidden, grad_hidden, partial, head, next,
      bucket, work, bytes;
};

// What an entry adds to its row: gate times the gradient of its position, and shift.
template <typename A>
struct alignas(2 * sizeof(A)) Coefficients {
  A gate, shift;
};

// The sum of each row of a client, by a whole block; its entries in order. `values` are the
// gradients of its positions. Of entries and of H there are fewer than 2^16. A group takes N rows
// at a time, whose chains of loads are then under way together: more than one pays where values
// come from memory.
template <int V, int N = 2, typename T, typename Entry>
FEDPEFT_DEVICE void sum_rows(T* out, const T* values, const HashLookupArgs& a, const int* head,
                             const int* next, int lanes, const Entry& entry) {
  using A = acc_t<T>;
  const int M = int(a.M), D = int(a.D), groups = int(blockDim.x) / lanes;
  const uint32_t reciprocal = 0xffffffffu / uint32_t(a.H);
  for (int column = int(threadIdx.x) % lanes * V; column < D; column += lanes * V) {
    int r = int(threadIdx.x) / lanes;
    const T* const from = values + column;
    T* to = out + (uint32_t(r) * uint32_t(D) + uint32_t(column));
    const int64_t step = int64_t(groups) * D;
#pragma unroll 1
    for (; r < M; r += N * groups, to += N * step) {
      Sum<A, V> sum[N];
      A shift[N] = {};
      int at[N];
      int all = -1;  // negative where there is no entry left
#pragma unroll
      for (int u = 0; u < N; ++u) {
        sum[u].clear();
        at[u] = r + u * groups < M ? head[r + u * groups] : -1;
        all &= at[u];
      }
#pragma unroll 1
      while (all >= 0) {
        Pack<T, V> value[N];
        Coefficients<A> c[N];
        all = -1;
#pragma unroll
        for (int u = 0; u < N; ++u) {
          value[u] = zero_pack<V, T>();
          c[u] = {A(0), A(0)};
          const int e = at[u];
          if (N > 1 && e < 0) continue;
          const uint32_t p = quotient(uint32_t(e), reciprocal);
          c[u] = entry(e);
          at[u] = next[e];
          all &= at[u];
          value[u] = load_pack<V>(from + p * uint32_t(D));
        }
#pragma unroll
        for (int u = 0; u < N; ++u) {
          shift[u] += c[u].shift;
#pragma unroll
          for (int i = 0; i < V; ++i) sum[u].at[i] += c[u].gate * to_acc(value[u].at[i]);
        }
      }
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (r + u * groups >= M) continue;
#pragma unroll
        for (int i = 0; i < V; ++i) sum[u].at[i] += shift[u];
        sum[u].store_once(to + u * step);
      }
    }
  }
}

// Takes room for the gradient too where two blocks still share a multiprocessor.
template <typename T>
void stage_gradient(const HashLookupArgs& a, Carve* carve, WholePlan* plan) {
  const int64_t without = carve->used;
  plan->grad = carve->take<T>(a.positions * a.D);
  plan->staged = carve->used <= shared_of_each(limits(), 2);
  if (!plan->staged) carve->used = without;
  plan->bytes = carve->used;
}

}  // namespace
}  // namespace fedpeft::gpu
