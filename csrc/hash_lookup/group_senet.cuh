// hash_lookup with SENet, a group of lanes a position, tables through L2: for any shape.
// Activations for the gradients go to memory.
#pragma once

#include "common/position_sum.cuh"
#include "hash_lookup/senet.cuh"

namespace fedpeft::gpu {
namespace {

// The SENet of one client, and one position's scratch in shared memory, for a group of lanes.
template <typename T>
struct SENet {
  using A = acc_t<T>;
  const T *w1, *b1, *w2, *b2;
  int64_t H, S;
  int64_t* bucket;  // [H]
  A* squeezed;      // [H]
  A* gate;          // [H]
  A* hidden;        // [S], after ReLU

  // Bytes of scratch of a group.
  static __host__ __device__ int64_t bytes(int64_t H, int64_t S) {
    return (H * 8 + (2 * H + S) * int64_t(sizeof(A)) + 15) / 16 * 16;
  }

  FEDPEFT_DEVICE SENet(const HashLookupArgs& a, unsigned char* scratch) : H(a.H), S(a.S) {
    bucket = reinterpret_cast<int64_t*>(scratch);
    squeezed = reinterpret_cast<A*>(bucket + H);
    gate = squeezed + H;
    hidden = gate + H;
  }

  FEDPEFT_DEVICE void select(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    w1 = static_cast<const T*>(a.w1) + c * S * H;
    b1 = static_cast<const T*>(a.b1) + c * S;
    w2 = static_cast<const T*>(a.w2) + c * H * S;
    b2 = static_cast<const T*>(a.b2) + c * H;
  }

  // Gates of an item; the lanes of a warp call together, those without an item with active = false.
  template <int V>
  FEDPEFT_DEVICE void gates(const HashLookupArgs& a, const Modulus& modulus, const T* table,
                            int64_t item, bool active, int lane, int lanes) {
    for (int64_t h = lane; h < H; h += lanes)
      bucket[h] = active ? bucket_of(a.hashes, modulus, item, h) : 0;
    __syncwarp();
    for (int64_t h = 0; h < H; ++h) {
      A sum = 0;
      if (active) {
        const T* row = table + bucket[h] * a.D;
        for (int64_t column = lane * V; column < a.D; column += lanes * V) {
          Sum<A, V> v;
          v.set(row + column);
#pragma unroll
          for (int i = 0; i < V; ++i) sum += v.at[i];
        }
      }
      sum = group_sum(sum, lanes);
      if (lane == 0) squeezed[h] = sum / A(a.D);
    }
    __syncwarp();
    if (active) {
      for (int64_t s = lane; s < S; s += lanes) {
        A sum = to_acc(b1[s]);
        for (int64_t h = 0; h < H; ++h) sum += to_acc(w1[s * H + h]) * squeezed[h];
        hidden[s] = sum > A(0) ? sum : A(0);
      }
    }
    __syncwarp();
    if (active) {
      for (int64_t h = lane; h < H; h += lanes) {
        A sum = to_acc(b2[h]);
        for (int64_t s = 0; s < S; ++s) sum += to_acc(w2[h * S + s]) * hidden[s];
        gate[h] = sigmoid(sum);
      }
    }
    __syncwarp();
  }
};

template <typename T, int V>
FEDPEFT_DEVICE void look_up_gated(const HashLookupArgs& a, SENet<T>& net, const Modulus& modulus,
                                  const T* table, int64_t n, bool active, int lane, int lanes) {
  using A = acc_t<T>;
  const int64_t item = active ? item_at(a, n) : -1;
  net.template gates<V>(a, modulus, table, item, item >= 0, lane, lanes);
  if (active) {
    T* out = static_cast<T*>(a.out) + n * a.D;
    for (int64_t column = lane * V; column < a.D; column += lanes * V) {
      Sum<A, V> sum;
      sum.clear();
      if (item >= 0) {
        if (a.base) sum.set(static_cast<const T*>(a.base) + item * a.D + column);
#pragma unroll 4
        for (int64_t h = 0; h < a.H; ++h)
          sum.add_scaled(net.gate[h], table + net.bucket[h] * a.D + column);
      }
      sum.store(out + column);
    }
  }
  __syncwarp();
}

// Where the groups' scratch of the SENet is; `memory` only where shared memory does not hold that
// of one warp.
enum class Scratch { shared, memory };

template <Scratch Where>
FEDPEFT_DEVICE unsigned char* scratch_of(unsigned char* shared, unsigned char* memory, int group,
                                         int groups, int64_t bytes) {
  if constexpr (Where == Scratch::memory) {
    return memory + (int64_t(blockIdx.x) * groups + group) * bytes;
  } else {
    return shared + group * bytes;
  }
}

// Calls f(net, the client's table, n, active) for the positions n of all clients; the lanes of a
// warp together, those of a group beyond the last with active = false.
template <typename T, Scratch Where, typename F>
FEDPEFT_DEVICE void for_gated_positions(const HashLookupArgs& a, int64_t total, int lanes,
                                        unsigned char* shared, unsigned char* memory, const F& f) {
  const int groups = int(blockDim.x) / lanes, group = int(threadIdx.x) / lanes;
  const int64_t table = a.per_client ? a.M * a.D : 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < total;
       first += int64_t(gridDim.x) * groups) {
    const int64_t n = first + group;
    const bool active = n < total;
    const int64_t client = active ? divide(n, a.positions) : 0;
    SENet<T> net(a, scratch_of<Where>(shared, memory, group, groups, SENet<T>::bytes(a.H, a.S)));
    net.select(a, client);
    f(net, static_cast<const T*>(a.table) + client * table, n, active);
  }
}

template <typename T, int V, Scratch Where>
__global__ void __launch_bounds__(kThreads, 2)
    forward_groups(HashLookupArgs a, int64_t total, Modulus modulus, int lanes,
                   unsigned char* memory) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % lanes;
  for_gated_positions<T, Where>(
      a, total, lanes, shared, memory, [&](SENet<T>& net, const T* rows, int64_t n, bool active) {
        look_up_gated<T, V>(a, net, modulus, rows, n, active, lane, lanes);
      });
}

// Activations of position n for its gradients: squeezed [H], gradient before the sigmoid [H],
// hidden [S], gradient before the ReLU [S]. The lanes of a warp call together.
template <typename T, int V>
FEDPEFT_DEVICE void activate_position(const HashLookupArgs& a, SENet<T>& net,
                                      const Modulus& modulus, const T* rows, int64_t n, bool active,
                                      int lane, int lanes, acc_t<T>* activations) {
  using A = acc_t<T>;
  const int64_t H = a.H, S = a.S, item = active ? item_at(a, n) : -1;
  net.template gates<V>(a, modulus, rows, item, item >= 0, lane, lanes);
  A* to = activations + n * (2 * H + 2 * S);
  A* coefficients = static_cast<A*>(a.coefficients) + n * 2 * H;
  const T* grad = static_cast<const T*>(a.grad) + n * a.D;
  for (int64_t h = 0; h < H; ++h) {
    A product = 0;
    if (item >= 0) {
      for (int64_t column = lane * V; column < a.D; column += lanes * V) {
        Sum<A, V> row, g;
        row.set(rows + net.bucket[h] * a.D + column);
        g.set(grad + column);
#pragma unroll
        for (int i = 0; i < V; ++i) product += row.at[i] * g.at[i];
      }
    }
    product = group_sum(product, lanes);
    if (item >= 0 && lane == 0) {
      coefficients[2 * h] = net.gate[h];
      to[h] = net.squeezed[h];
      to[H + h] = product * net.gate[h] * (A(1) - net.gate[h]);
    }
  }
  __syncwarp();
  if (item >= 0) {
    for (int64_t s = lane; s < S; s += lanes) {
      A g = 0;
      if (net.hidden[s] > A(0)) {
        for (int64_t h = 0; h < H; ++h) g += to[H + h] * to_acc(net.w2[h * S + s]);
      }
      to[2 * H + s] = net.hidden[s];
      to[2 * H + S + s] = g;
    }
  }
  __syncwarp();
  if (item >= 0) {
    for (int64_t h = lane; h < H; h += lanes) {
      A g = 0;
      for (int64_t s = 0; s < S; ++s) g += to[2 * H + S + s] * to_acc(net.w1[s * H + h]);
      coefficients[2 * h + 1] = g / A(a.D);
    }
  }
  __syncwarp();
}

template <typename T, int V, Scratch Where>
__global__ void __launch_bounds__(kThreads, 2)
    activate_groups(HashLookupArgs a, int64_t total, Modulus modulus, int lanes,
                    unsigned char* memory, acc_t<T>* activations) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int lane = int(threadIdx.x) % lanes;
  for_gated_positions<T, Where>(
      a, total, lanes, shared, memory, [&](SENet<T>& net, const T* rows, int64_t n, bool active) {
        activate_position<T, V>(a, net, modulus, rows, n, active, lane, lanes, activations);
      });
}

// Output i of [w1 (S, H), b1 (S), w2 (H, S), b2 (H)].
template <typename T>
struct SourceSENet {
  HashLookupArgs a;
  const acc_t<T>* activations;

  FEDPEFT_DEVICE bool active(int64_t n) const { return a.items[n] >= 0; }
  template <int V>
  FEDPEFT_DEVICE void add(Sum<acc_t<T>, V>& sum, int64_t, int64_t n, int64_t output) const {
    static_assert(V == 1);
    const int64_t H = a.H, S = a.S;
    const acc_t<T>* squeezed = activations + n * (2 * H + 2 * S);
    const acc_t<T>*grad_gate = squeezed + H, *hidden = grad_gate + H, *grad_hidden = hidden + S;
    int64_t i = output;
    if (i < S * H) {
      const int64_t s = divide(i, H);
      sum.at[0] += grad_hidden[s] * squeezed[i - s * H];
    } else if ((i -= S * H) < S) {
      sum.at[0] += grad_hidden[i];
    } else if ((i -= S) < H * S) {
      const int64_t h = divide(i, S);
      sum.at[0] += grad_gate[h] * hidden[i - h * S];
    } else {
      sum.at[0] += grad_gate[i - H * S];
    }
  }
};

// How the groups of a gated kernel are cut and where their scratch is.
struct GatedPlan {
  Scratch where;
  int lanes, threads;
  int64_t bytes;       // scratch of a group
  int64_t max_blocks;  // memory: blocks that have scratch

  int64_t shared() const { return where == Scratch::shared ? threads / lanes * bytes : 0; }
  int64_t memory() const {
    return where == Scratch::memory ? max_blocks * (threads / lanes) * bytes : 0;
  }
  int64_t grid(int64_t total) const {
    const int64_t groups = threads / lanes, blocks = (total + groups - 1) / groups;
    return blocks < max_blocks ? blocks : max_blocks;
  }
};

template <typename T>
GatedPlan plan_gated(const HashLookupArgs& a, int lanes, const Limits& device) {
  const int64_t bytes = SENet<T>::bytes(a.H, a.S);
  for (int threads = kThreads; threads >= kWarp; threads /= 2) {
    if (threads / lanes * bytes <= device.shared_bytes)
      return {Scratch::shared, lanes, threads, bytes, max_grid()};
  }
  // A whole warp a position needs the least.
  if (bytes <= device.shared_bytes) return {Scratch::shared, kWarp, kWarp, bytes, max_grid()};
  return {Scratch::memory, kWarp, 4 * kWarp, bytes, 2 * device.multiprocessors};
}

}  // namespace
}  // namespace fedpeft::gpu
