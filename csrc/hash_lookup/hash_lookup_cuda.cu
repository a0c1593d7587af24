// CUDA kernels of hash_lookup. A group of lanes a position: its lanes hash in parallel, pass the
// buckets around by shuffles and sum 16 bytes of columns each. Tables are read through L2, or from
// shared memory where a block serves one client with positions enough to pay for the copy.
// Backward: a scatter of the table, and, with SENet, the activations of every position first and a
// sum over positions for the weights.
#include "common/hash.h"
#include "common/logistic.cuh"
#include "common/position_sum.cuh"
#include "common/scatter.cuh"
#include "hash_lookup/hash_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor

// sum % M, by one multiplication with floor((2^64 - 1) / M).
struct Modulus {
  uint64_t M, reciprocal;
  explicit Modulus(int64_t m) : M(uint64_t(m)), reciprocal(~uint64_t{0} / uint64_t(m)) {}
  FEDPEFT_DEVICE int64_t operator()(uint64_t x) const {
#if defined(__CUDA_ARCH__)
    const uint64_t quotient = __umul64hi(x, reciprocal);
#else
    __extension__ using uint128 = unsigned __int128;
    const uint64_t quotient = uint64_t(uint128(x) * reciprocal >> 64);
#endif
    uint64_t rest = x - quotient * M;  // the quotient is at most two too small
    if (rest >= M) rest -= M;
    if (rest >= M) rest -= M;
    return int64_t(rest);
  }
};

// The bucket of an item of at least 0 under hash h.
FEDPEFT_DEVICE int64_t bucket_of(const int64_t* hashes, const Modulus& modulus, int64_t item,
                                 int64_t h) {
  const int64_t a = hashes[2 * h], b = hashes[2 * h + 1];
  if (uint64_t(a) >= kHashPrime || uint64_t(b) >= kHashPrime)
    FEDPEFT_BAD_VALUE("hashes: expected values from 0 to 2^61 - 2");
  return modulus(hash_value(uint64_t(a), uint64_t(b), uint64_t(item)));
}

// The item at position n, -1 at padding.
FEDPEFT_DEVICE int64_t item_at(const HashLookupArgs& a, int64_t n) {
  const int64_t item = a.items[n];
  if (classify(item, a.num_items) == Position::bad)
    FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
  return item;
}

__global__ void __launch_bounds__(256, 4)
    buckets(IndexArray items, const int64_t* hashes, int64_t* out, int64_t count, int64_t H,
            Modulus modulus) {
  const int64_t total = count * H;
  for (int64_t e = int64_t(blockIdx.x) * 256 + threadIdx.x; e < total;
       e += int64_t(gridDim.x) * 256) {
    const int64_t n = divide(e, H), item = items[n];
    if (item < -1) FEDPEFT_BAD_INDEX("items", item, n, INT64_MAX);
    out[e] = item < 0 ? -1 : bucket_of(hashes, modulus, item, e - n * H);
  }
}

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

template <typename A>
FEDPEFT_DEVICE A plain_weight(const HashLookupArgs& a) {
  return a.mean ? A(1) / A(a.H) : A(1);
}

// One position without SENet; the lanes of a warp call together.
template <typename T, int V>
FEDPEFT_DEVICE void look_up(const HashLookupArgs& a, const Modulus& modulus, const T* table,
                            int64_t n, bool active, int lane, int lanes) {
  using A = acc_t<T>;
  const int64_t item = active ? item_at(a, n) : -1;
  const A weight = plain_weight<A>(a);
  T* out = static_cast<T*>(a.out) + n * a.D;
  // Lanes past the last column help with the hashing.
  for (int64_t first = 0; first < a.D; first += lanes * V) {
    const int64_t column = first + lane * V;
    const bool writes = active && column < a.D;
    Sum<A, V> sum;
    sum.clear();
    if (writes && item >= 0 && a.base) sum.set(static_cast<const T*>(a.base) + item * a.D + column);
    for (int64_t h = 0; h < a.H; h += lanes) {
      const int64_t mine =
          item >= 0 && h + lane < a.H ? bucket_of(a.hashes, modulus, item, h + lane) : 0;
      const int count = int(a.H - h < lanes ? a.H - h : lanes);
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        const int64_t bucket = __shfl_sync(kFullMask, mine, j, lanes);
        if (writes && item >= 0) sum.add_scaled(weight, table + bucket * a.D + column);
      }
    }
    if (writes) sum.store(out + column);
  }
}

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
enum class Scratch { none, shared, memory };

template <Scratch Where>
FEDPEFT_DEVICE unsigned char* scratch_of(unsigned char* shared, unsigned char* memory, int group,
                                         int groups, int64_t bytes) {
  if constexpr (Where == Scratch::memory) {
    return memory + (int64_t(blockIdx.x) * groups + group) * bytes;
  } else {
    return shared + group * bytes;
  }
}

// Positions of all clients, tables through L2.
template <typename T, int V, Scratch Where>
__global__ void __launch_bounds__(kThreads, Where == Scratch::none ? 4 : 2)
    forward(HashLookupArgs a, int64_t total, Modulus modulus, int lanes, unsigned char* memory) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int groups = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int64_t table = a.per_client ? a.M * a.D : 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < total;
       first += int64_t(gridDim.x) * groups) {
    const int64_t n = first + group;
    const bool active = n < total;
    const int64_t client = active ? divide(n, a.positions) : 0;
    const T* rows = static_cast<const T*>(a.table) + client * table;
    if constexpr (Where != Scratch::none) {
      SENet<T> net(a, scratch_of<Where>(shared, memory, group, groups, SENet<T>::bytes(a.H, a.S)));
      net.select(a, client);
      look_up_gated<T, V>(a, net, modulus, rows, n, active, lane, lanes);
    } else {
      look_up<T, V>(a, modulus, rows, n, active, lane, lanes);
    }
  }
}

// One block a client, its table in shared memory, before the scratch.
template <typename T, int V, bool Gated>
__global__ void __launch_bounds__(kThreads, Gated ? 2 : 4)
    forward_staged(HashLookupArgs a, int64_t clients, Modulus modulus) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* rows = reinterpret_cast<T*>(shared);
  const int lanes = lanes_for(a.D / V), groups = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int64_t table = a.M * a.D, table_bytes = (table * int64_t(sizeof(T)) + 15) / 16 * 16;
  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* from = static_cast<const T*>(a.table) + client * table;
    for (int64_t i = int64_t(threadIdx.x) * V; i < table; i += int64_t(blockDim.x) * V)
      store_pack<V>(rows + i, load_pack<V>(from + i));
    __syncthreads();
    for (int64_t first = 0; first < a.positions; first += groups) {
      const int64_t n = client * a.positions + first + group;
      const bool active = first + group < a.positions;
      if constexpr (Gated) {
        SENet<T> net(a, shared + table_bytes + group * SENet<T>::bytes(a.H, a.S));
        net.select(a, client);
        look_up_gated<T, V>(a, net, modulus, rows, n, active, lane, lanes);
      } else {
        look_up<T, V>(a, modulus, rows, n, active, lane, lanes);
      }
    }
    __syncthreads();
  }
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
    activate(HashLookupArgs a, int64_t total, Modulus modulus, int lanes, unsigned char* memory,
             acc_t<T>* activations) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int groups = int(blockDim.x) / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int64_t table = a.per_client ? a.M * a.D : 0;
  for (int64_t first = int64_t(blockIdx.x) * groups; first < total;
       first += int64_t(gridDim.x) * groups) {
    const int64_t n = first + group, client = n < total ? divide(n, a.positions) : 0;
    SENet<T> net(a, scratch_of<Where>(shared, memory, group, groups, SENet<T>::bytes(a.H, a.S)));
    net.select(a, client);
    activate_position<T, V>(a, net, modulus, static_cast<const T*>(a.table) + client * table, n,
                            n < total, lane, lanes, activations);
  }
}

template <typename T, bool Gated>
struct Source {
  HashLookupArgs a;
  Modulus modulus;

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t slot) const {
    const int64_t item = item_at(a, n);
    return item < 0 ? -1 : bucket_of(a.hashes, modulus, item, slot);
  }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t slot, int64_t column) const {
    using A = acc_t<T>;
    Sum<A, V> v;
    v.set(static_cast<const T*>(a.grad) + n * a.D + column);
    if constexpr (Gated) {
      const A* coefficients = static_cast<const A*>(a.coefficients) + (n * a.H + slot) * 2;
      const A scale = coefficients[0], shift = coefficients[1];
#pragma unroll
      for (int i = 0; i < V; ++i) v.at[i] = scale * v.at[i] + shift;
    }
    return v;
  }
};

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

// All gradients of a client by one block: its positions' activations, then the table's rows and the
// weights of the SENet.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 2)
    backward_gated(HashLookupArgs a, int64_t clients, Modulus modulus, int lanes,
                   acc_t<T>* activations, ScatterPlan plan, T* out, PositionSum shape,
                   SENetOutputs<T> weights) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int groups = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    SENet<T> net(a, shared + group * SENet<T>::bytes(a.H, a.S));
    net.select(a, client);
    const T* rows = static_cast<const T*>(a.table) + client * a.M * a.D;
    for (int64_t first = 0; first < a.positions; first += groups) {
      activate_position<T, V>(a, net, modulus, rows, client * a.positions + first + group,
                              first + group < a.positions, lane, lanes, activations);
    }
    __syncthreads();
    scatter_lists_team<Source<T, true>, T, V>(Source<T, true>{a, modulus}, out, plan, client,
                                              int(threadIdx.x), reinterpret_cast<int*>(shared));
    for (int64_t chunk = 0; chunk < position_sum_chunks<1>(shape, kThreads); ++chunk) {
      sum_positions_task<T, 1>(SourceSENet<T>{a, activations}, weights, shape,
                               static_cast<acc_t<T>*>(nullptr), client, 0, chunk);
    }
    __syncthreads();
  }
}

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

// `before`: bytes of shared memory that something else takes.
template <typename T>
GatedPlan plan_gated(const HashLookupArgs& a, int lanes, const Limits& device, int64_t before = 0) {
  const int64_t bytes = SENet<T>::bytes(a.H, a.S);
  for (int threads = kThreads; threads >= kWarp; threads /= 2) {
    if (before + threads / lanes * bytes <= device.shared_bytes)
      return {Scratch::shared, lanes, threads, bytes, kMaxGrid};
  }
  // A whole warp a position needs the least.
  if (before + bytes <= device.shared_bytes)
    return {Scratch::shared, kWarp, kWarp, bytes, kMaxGrid};
  return {Scratch::memory, kWarp, 4 * kWarp, bytes, 2 * device.multiprocessors};
}

template <typename T, int V>
void launch_plain(const HashLookupArgs& a, int64_t clients, Stream stream) {
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes;
  const int64_t total = clients * a.positions;
  const int64_t table_bytes = (a.M * a.D * int64_t(sizeof(T)) + 15) / 16 * 16;
  if (a.per_client && a.positions * a.H >= 2 * a.M && table_bytes <= kStagedBytes &&
      table_bytes <= limits().shared_bytes) {
    launch(forward_staged<T, V, false>, clients, kThreads, table_bytes, stream, a, clients,
           Modulus(a.M));
  } else {
    launch(forward<T, V, Scratch::none>, (total + groups - 1) / groups, kThreads, 0, stream, a,
           total, Modulus(a.M), lanes, nullptr);
  }
}

template <typename T, int V>
void launch_gated(const HashLookupArgs& a, int64_t clients, void* memory, Stream stream) {
  const Limits device = limits();
  const int lanes = lanes_for(a.D / V);
  const int64_t total = clients * a.positions;
  const int64_t table_bytes = (a.M * a.D * int64_t(sizeof(T)) + 15) / 16 * 16;
  if (a.per_client && a.positions * a.H >= 2 * a.M && table_bytes <= kStagedBytes) {
    const GatedPlan plan = plan_gated<T>(a, lanes, device, table_bytes);
    if (plan.where == Scratch::shared && plan.lanes == lanes) {
      launch(forward_staged<T, V, true>, clients, unsigned(plan.threads),
             table_bytes + plan.shared(), stream, a, clients, Modulus(a.M));
      return;
    }
  }
  const GatedPlan plan = plan_gated<T>(a, lanes, device);
  const auto kernel = plan.where == Scratch::shared ? forward<T, V, Scratch::shared>
                                                    : forward<T, V, Scratch::memory>;
  launch(kernel, plan.grid(total), unsigned(plan.threads), plan.shared(), stream, a, total,
         Modulus(a.M), plan.lanes, static_cast<unsigned char*>(memory));
}

}  // namespace

void hash_buckets(const IndexArray& items, const int64_t* hashes, int64_t* out, int64_t count,
                  int64_t H, int64_t table_size, Stream stream) {
  launch(buckets, (count * H + 255) / 256, 256, 0, stream, items, hashes, out, count, H,
         Modulus(table_size));
}

int64_t hash_lookup_scratch(const HashLookupArgs& a, DType dtype) {
  int64_t bytes = 0;
  if (a.w1) {
    // Scratch is in memory only where a warp takes a position, whatever the width of an access.
    with_dtype(dtype,
               [&](auto zero) { bytes = plan_gated<decltype(zero)>(a, kWarp, limits()).memory(); });
  }
  return bytes;
}

void hash_lookup(const HashLookupArgs& a, DType dtype, int64_t clients, void* scratch,
                 Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if (a.w1) {
            launch_gated<T, V>(a, clients, scratch, stream);
          } else {
            launch_plain<T, V>(a, clients, stream);
          }
        },
        a.table, a.base, a.out);
  });
}

void hash_lookup_activations(const HashLookupArgs& a, DType dtype, int64_t clients, void* scratch,
                             void* activations, Stream stream) {
  const int64_t total = clients * a.positions;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const GatedPlan plan = plan_gated<T>(a, lanes_for(a.D / V), limits());
          const auto kernel = plan.where == Scratch::shared ? activate<T, V, Scratch::shared>
                                                            : activate<T, V, Scratch::memory>;
          launch(kernel, plan.grid(total), unsigned(plan.threads), plan.shared(), stream, a, total,
                 Modulus(a.M), plan.lanes, static_cast<unsigned char*>(scratch),
                 static_cast<acc_t<T>*>(activations));
        },
        a.table, a.grad);
  });
}

ScatterShape hash_lookup_shape(const HashLookupArgs& a, int64_t clients) {
  // Without SENet an entry is the gradient itself, and the mean's 1 / H is left to the row.
  return {clients, a.positions, a.H, a.M, a.D, false, a.mean && !a.w1 ? 1.0 / double(a.H) : 1.0};
}

void hash_lookup_keys(const HashLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream) {
  launch_scatter_keys(Source<float, false>{a, Modulus(a.M)}, plan, keys, stream);
}

void hash_lookup_backward(const HashLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if (a.w1) {
            launch_scatter<T, V>(Source<T, true>{a, Modulus(a.M)}, plan, sorted, out, stream);
          } else {
            launch_scatter<T, V>(Source<T, false>{a, Modulus(a.M)}, plan, sorted, out, stream);
          }
        },
        a.grad, out, sorted.partial);
  });
}

PositionSum hash_lookup_shape_senet(const HashLookupArgs& a, int64_t clients) {
  return {clients, a.positions, a.senet_size()};
}

void hash_lookup_backward_senet(const HashLookupArgs& a, DType dtype, const PositionSum& shape,
                                const void* activations, void* partial, const SENetGradients& out,
                                Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_position_sum<T, 1>(SourceSENet<T>{a, static_cast<const acc_t<T>*>(activations)}, shape,
                              SENetOutputs<T>(a, out), partial, stream);
  });
}

bool hash_lookup_backward_whole(const HashLookupArgs& a, DType dtype, const PositionSum& shape,
                                void* activations, void* out, const SENetGradients& weights,
                                Stream stream) {
  // More rows and entries than these are done faster by several blocks, and sooner where few
  // clients leave most of the device idle.
  const int64_t most = shape.clients < limits().multiprocessors ? 512 : 4096;
  if (shape.blocks() > 1 || a.positions * a.H > most || a.M > most) return false;
  // One range of rows, which the whole block takes.
  ScatterPlan plan{};
  static_cast<ScatterShape&>(plan) = hash_lookup_shape(a, shape.clients);
  plan.rows_per_split = a.M;
  plan.splits = 1;
  plan.team = plan.block = kThreads;
  bool done = false;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int lanes = lanes_for(a.D / V);
          const int64_t scratch = kThreads / lanes * SENet<T>::bytes(a.H, a.S);
          const int64_t lists = (a.M + a.positions * a.H) * int64_t(sizeof(int));
          plan.shared_bytes = scratch > lists ? scratch : lists;
          if (plan.shared_bytes > limits().shared_bytes) return;
          launch(backward_gated<T, V>, shape.clients, kThreads, plan.shared_bytes, stream, a,
                 shape.clients, Modulus(a.M), lanes, static_cast<acc_t<T>*>(activations), plan,
                 static_cast<T*>(out), shape, SENetOutputs<T>(a, weights));
          done = true;
        },
        a.table, a.grad, out);
  });
  return done;
}

}  // namespace fedpeft::gpu
