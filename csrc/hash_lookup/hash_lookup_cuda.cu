// CUDA kernels of hash_lookup. Plain lookups: a group of lanes takes several positions at a time,
// its lanes hash in parallel and pass the rows' addresses around by shuffles; or a block copies a
// client's table, or some of its columns, to shared memory while it hashes. With SENet a group
// keeps the rows of two positions in registers; where they don't fit, a block takes a client
// through phases that all of its threads share, or a group a position. Backward without SENet is a
// scatter.
#include "common/hash.h"
#include "common/lane_rows.cuh"
#include "common/logistic.cuh"
#include "common/position_sum.cuh"
#include "common/scatter.cuh"
#include "common/staged_rows.cuh"
#include "hash_lookup/hash_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

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
    // The quotient is at most two too small, and the rest so below 3 M.
    if (M >> 30 == 0) {
      const uint32_t m = uint32_t(M);
      uint32_t rest = uint32_t(x) - uint32_t(quotient) * m;
      if (rest >= m) rest -= m;
      if (rest >= m) rest -= m;
      return int64_t(rest);
    }
    uint64_t rest = x - quotient * M;
    if (rest >= M) rest -= M;
    if (rest >= M) rest -= M;
    return int64_t(rest);
  }
};

// hash_value, with half of the multiplications where x has 32 bits.
FEDPEFT_DEVICE uint64_t hash_of(uint64_t a, uint64_t b, uint64_t x) {
  if (x >> 32 != 0) return hash_value(a, b, x);
  const uint64_t low = (a & 0xffffffffu) * x, high = (a >> 32) * x + (low >> 32);
  // a x = high 2^32 + (low's lower half), below 2^93; its bits from 61 on are those of high
  // from 29.
  uint64_t sum = ((high & 0x1fffffffu) << 32 | (low & 0xffffffffu)) + (high >> 29);
  if (sum >= kHashPrime) sum -= kHashPrime;
  sum += b;
  if (sum >= kHashPrime) sum -= kHashPrime;
  return sum;
}

struct Hash {
  uint64_t a, b;
  FEDPEFT_DEVICE Hash(const int64_t* hashes, int64_t h)
      : a(uint64_t(hashes[2 * h])), b(uint64_t(hashes[2 * h + 1])) {
    if (a >= kHashPrime || b >= kHashPrime)
      FEDPEFT_BAD_VALUE("hashes: expected values from 0 to 2^61 - 2");
  }
};

// The bucket of an item of at least 0 under hash h.
FEDPEFT_DEVICE int64_t bucket_of(const int64_t* hashes, const Modulus& modulus, int64_t item,
                                 int64_t h) {
  const Hash hash(hashes, h);
  return modulus(hash_of(hash.a, hash.b, uint64_t(item)));
}

FEDPEFT_DEVICE void check_item(const HashLookupArgs& a, int64_t item, int64_t n) {
  if (classify(item, a.num_items) == Position::bad)
    FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
}
// Columns of an item's base vector, if there is one; at padding something else that lies in memory,
// since loads under a condition wait for each other.
template <int V, typename T>
FEDPEFT_DEVICE Pack<T, V> base_at(const HashLookupArgs& a, int64_t item, int64_t column) {
  if (!a.base) return zero_pack<V, T>();
  return load_pack<V>(item >= 0 ? static_cast<const T*>(a.base) + item * a.D + column
                                : static_cast<const T*>(a.table));
}
// The item at position n, -1 at padding.
FEDPEFT_DEVICE int64_t item_at(const HashLookupArgs& a, int64_t n) {
  const int64_t item = a.items[n];
  check_item(a, item, n);
  return item;
}

// A thread keeps one hash and takes every so many-th item, several at a time.
__global__ void __launch_bounds__(256, 4)
    buckets(IndexArray items, const int64_t* hashes, int64_t* out, int64_t count, int64_t H,
            Modulus modulus) {
  constexpr int kBatch = 4;
  const int64_t thread = int64_t(blockIdx.x) * 256 + threadIdx.x;
  const int64_t step = divide(int64_t(gridDim.x) * 256, H);  // at least one
  const int64_t start = divide(thread, H), h = thread - start * H;
  if (start >= step) return;
  const Hash hash(hashes, h);
  Late come[kBatch];
  const auto load = [&](int64_t first) {
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t n = first + k * step;
      come[k].load(items, n, n < count);
    }
  };
  load(start);
  for (int64_t first = start; first < count; first += kBatch * step) {
    int64_t item[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) item[k] = come[k].come(items.bytes);
    load(first + kBatch * step);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t n = first + k * step;
      if (n >= count) break;
      if (item[k] < -1) FEDPEFT_BAD_INDEX("items", item[k], n, INT64_MAX);
      out[n * H + h] = item[k] < 0 ? -1 : modulus(hash_of(hash.a, hash.b, uint64_t(item[k])));
    }
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

// Positions of all clients without SENet, tables through L2. A group takes N positions at a time
// where its lanes hash for them all at once, so that rows of all are under way together, and items
// a turn ahead; one where N is 0.
template <typename T, int V, int N>
__global__ void __launch_bounds__(kLaneThreads, FEDPEFT_TWO_OR_THREE + 2)
    forward_plain(HashLookupArgs a, LaneTurns turns, Modulus modulus, int lanes) {
  const int groups = kLaneThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int64_t table = a.per_client ? a.M * a.D : 0;
  const T* tables = static_cast<const T*>(a.table);
  const int64_t total = turns.total;
  if constexpr (N == 0) {
    for (int64_t first = int64_t(blockIdx.x) * groups; first < total;
         first += int64_t(gridDim.x) * groups) {
      const int64_t n = first + group;
      const bool active = n < total;
      const int64_t client = active ? divide(n, a.positions) : 0;
      look_up<T, V>(a, modulus, tables + client * table, n, active, lane, lanes);
    }
  } else {
    const acc_t<T> weight = plain_weight<acc_t<T>>(a);
    const int H = int(a.H), k_mine = lane / H, h_mine = lane - k_mine * H;
    const T* base = static_cast<const T*>(a.base);
    const Hash hash(a.hashes, h_mine);
    for (int64_t task = blockIdx.x; task < turns.tasks; task += gridDim.x) {
      const int64_t begin = turns.first(task), end = turns.end(begin);
      Late come;  // the item of the lane's own position and hash
      const auto load_item = [&](int64_t n) {
        come.load(a.items, n + k_mine, k_mine < N && n + k_mine < end);
      };
      load_item(begin + group * N);
      // All lanes of a warp take as many turns, since they exchange rows.
      for (int64_t first = begin; first < end; first += turns.step()) {
        const int64_t n = first + group * N, item = come.come(a.items.bytes);
        load_item(n + turns.step());
        check_item(a, item, n + k_mine);
        int row = 0;
        if (item >= 0) {
          const int64_t client = table == 0 ? 0 : divide(n + k_mine, a.positions);
          const int64_t bucket = modulus(hash_of(hash.a, hash.b, uint64_t(item)));
          row = int(uint64_t(client * table + bucket * a.D) / V);
        }
        sum_lane_rows<V, N>(tables, base, static_cast<T*>(a.out), n, end, a.D, H, weight, item, row,
                            lane, lanes);
      }
    }
  }
}

// Positions of all clients with SENet, tables through L2.
template <typename T, int V, Scratch Where>
__global__ void __launch_bounds__(kThreads, 2)
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
    SENet<T> net(a, scratch_of<Where>(shared, memory, group, groups, SENet<T>::bytes(a.H, a.S)));
    net.select(a, client);
    look_up_gated<T, V>(a, net, modulus, rows, n, active, lane, lanes);
  }
}

// SENet of one client for a whole block, its weights in shared memory as accumulators. Rows of
// weights and of hidden values have odd strides, so that lanes at different rows meet different
// banks.
template <typename T>
struct BlockNet {
  using A = acc_t<T>;
  int H, S, row1, row2;  // row2 is the stride of a position's hidden values too
  A *w1, *b1, *w2, *b2;  // [S, row1], [S], [H, row2], [H]

  static int64_t size(int64_t H, int64_t S) { return S * (H | 1) + S + H * (S | 1) + H; }

  FEDPEFT_DEVICE BlockNet(const HashLookupArgs& a, void* to)
      : H(int(a.H)), S(int(a.S)), row1(H | 1), row2(S | 1) {
    w1 = static_cast<A*>(to);
    b1 = w1 + S * row1;
    w2 = b1 + S;
    b2 = w2 + H * row2;
  }

  FEDPEFT_DEVICE void load(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    const T* from1 = static_cast<const T*>(a.w1) + c * S * H;
    const T* from2 = static_cast<const T*>(a.w2) + c * H * S;
    for (int i = int(threadIdx.x); i < S * H; i += int(blockDim.x)) {
      const int s = int(unsigned(i) / unsigned(H)), h = int(unsigned(i) / unsigned(S));
      w1[s * row1 + i - s * H] = to_acc(from1[i]);
      w2[h * row2 + i - h * S] = to_acc(from2[i]);
    }
    for (int s = int(threadIdx.x); s < S; s += int(blockDim.x))
      b1[s] = to_acc(static_cast<const T*>(a.b1)[c * S + s]);
    for (int h = int(threadIdx.x); h < H; h += int(blockDim.x))
      b2[h] = to_acc(static_cast<const T*>(a.b2)[c * H + h]);
  }

  // Hidden values of `count` positions, whose buckets (-1 at padding) and squeezed values (of an
  // entry) are given; 0 at padding.
  template <typename Squeezed>
  FEDPEFT_DEVICE void hide(A* hidden, int count, const int* bucket, const Squeezed& squeezed) {
    for (int i = int(threadIdx.x); i < count * S; i += int(blockDim.x)) {
      const int p = int(unsigned(i) / unsigned(S)), s = i - p * S;
      A sum = 0;
      if (bucket[p * H] >= 0) {
        sum = b1[s];
        for (int h = 0; h < H; ++h) sum += w1[s * row1 + h] * squeezed(p * H + h);
      }
      hidden[p * row2 + s] = sum > A(0) ? sum : A(0);
    }
  }
  FEDPEFT_DEVICE A gate(const A* hidden, int p, int h) const {
    A sum = b2[h];
#pragma unroll 4
    for (int s = 0; s < S; ++s) sum += w2[h * row2 + s] * hidden[p * row2 + s];
    return sigmoid(sum);
  }
};

// Buckets of the `count` entries (position, hash) from position `first` of all clients on, -1 at
// padding; a thread has kBatch items under way at a time.
template <int kBatch>
FEDPEFT_DEVICE void hash_entries(const HashLookupArgs& a, const Modulus& modulus, int64_t first,
                                 int count, int* bucket, int* copy) {
  const int H = int(a.H), threads = int(blockDim.x);
  for (int start = int(threadIdx.x); start < count; start += kBatch * threads) {
    int64_t place[kBatch], item[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int e = start + k * threads;
      place[k] = e < count ? first + int(unsigned(e) / unsigned(H)) : -1;
    }
    gather(a.items, place, item);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int e = start + k * threads;
      if (e >= count) break;
      const int p = int(unsigned(e) / unsigned(H));
      check_item(a, item[k], first + p);
      const int to = item[k] < 0 ? -1 : int(bucket_of(a.hashes, modulus, item[k], e - p * H));
      bucket[e] = to;
      if (copy) copy[e] = to;
    }
  }
}

// Buckets of a client, and weights of their rows.
template <typename T>
struct PlainEntries {
  const HashLookupArgs& a;
  const Modulus& modulus;
  acc_t<T> weight;

  FEDPEFT_DEVICE void start(int64_t) const {}
  FEDPEFT_DEVICE void find(int64_t n, int count, int* bucket) const {
    hash_entries<4>(a, modulus, n, count * int(a.H), bucket, nullptr);
  }
  FEDPEFT_DEVICE void ready(const T*, const int*, int, bool) const {}
  FEDPEFT_DEVICE acc_t<T> scale(int) const { return weight; }
};

// With SENet, all columns: means of rows, hidden values and gates, in shared memory too.
struct GatedStagedPlan {
  StagedPlan rows;
  int64_t gate, mean, hidden, net;
};

template <typename T, int V>
struct GatedEntries {
  using A = acc_t<T>;
  const HashLookupArgs& a;
  const Modulus& modulus;
  BlockNet<T> net;
  A *gate, *mean, *hidden;
  int width;

  FEDPEFT_DEVICE GatedEntries(const HashLookupArgs& a_, const Modulus& modulus_,
                              const GatedStagedPlan& plan, unsigned char* shared)
      : a(a_),
        modulus(modulus_),
        net(a_, shared + plan.net),
        gate(reinterpret_cast<A*>(shared + plan.gate)),
        mean(reinterpret_cast<A*>(shared + plan.mean)),
        hidden(reinterpret_cast<A*>(shared + plan.hidden)),
        width(plan.rows.width) {}
  FEDPEFT_DEVICE void start(int64_t client) { net.load(a, client); }
  FEDPEFT_DEVICE void find(int64_t n, int count, int* bucket) const {
    hash_entries<1>(a, modulus, n, count * int(a.H), bucket, nullptr);
  }
  FEDPEFT_DEVICE void ready(const T* rows, const int* bucket, int count, bool first) {
    const int H = int(a.H), M = int(a.M);
    const int lanes = lanes_for(width / V), groups = int(blockDim.x) / lanes;
    const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
    if (first) {
      for (int m = group; m - group < M; m += groups) {
        A sum = 0;
        if (m < M) {
          for (int column = lane * V; column < width; column += lanes * V) {
            Sum<A, V> v;
            v.set(rows + m * width + column);
#pragma unroll
            for (int i = 0; i < V; ++i) sum += v.at[i];
          }
        }
        sum = group_sum(sum, lanes);
        if (m < M && lane == 0) mean[m] = sum / A(width);
      }
      __syncthreads();
    }
    net.hide(hidden, count, bucket, [&](int e) { return mean[bucket[e]]; });
    __syncthreads();
    for (int e = int(threadIdx.x); e < count * H; e += int(blockDim.x)) {
      const int p = int(unsigned(e) / unsigned(H));
      gate[e] = net.gate(hidden, p, e - p * H);
    }
    __syncthreads();
  }
  FEDPEFT_DEVICE A scale(int e) const { return gate[e]; }
};

FEDPEFT_HD RowSums row_sums(const HashLookupArgs& a) {
  return {a.table, a.base, a.out, a.items, a.num_items, a.positions, a.D, int(a.M), int(a.H)};
}

template <typename T, int V>
__global__ void __launch_bounds__(kStagedThreads, FEDPEFT_TWO_OR_THREE)
    forward_staged(HashLookupArgs a, Modulus modulus, StagedPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  PlainEntries<T> source{a, modulus, plain_weight<acc_t<T>>(a)};
  sum_staged_rows<V, kLanePositions<V>, T>(row_sums(a), plan, source, shared);
}

template <typename T, int V>
__global__ void __launch_bounds__(1024, 1)
    forward_staged_gated(HashLookupArgs a, Modulus modulus, GatedStagedPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  GatedEntries<T, V> source(a, modulus, plan, shared);
  sum_staged_rows<V, V == 1 ? 1 : 2, T>(row_sums(a), plan.rows, source, shared);
}

constexpr int kLaneHashes = 4, kLaneSlots = 2;

// Whether a group of lanes may hold the rows of two positions in registers, and their SENet, of
// which lane s has the hidden values s and s + lanes.
template <int V>
bool suits_lanes(const HashLookupArgs& a) {
  const int lanes = lanes_for(a.D / V);
  return a.H <= kLaneHashes && lanes >= 2 * kLaneHashes && a.D <= lanes * V &&
         a.S <= kLaneSlots * lanes && a.M * a.D < INT32_MAX;
}

// The SENet of one client as its lanes read it, in shared memory as accumulators: of each hidden
// value w1, w2 and b1 side by side, at strides that keep lanes apart; zeros for hashes that there
// are not.
template <typename T>
struct LaneWeights {
  using A = acc_t<T>;
  static constexpr int kStride = 2 * kLaneHashes + 4;
  int H, S;
  A *rows, *b2;

  static int64_t size(int64_t S) { return S * kStride + kLaneHashes; }

  FEDPEFT_DEVICE LaneWeights(const HashLookupArgs& a, void* to)
      : H(int(a.H)), S(int(a.S)), rows(static_cast<A*>(to)), b2(rows + S * kStride) {}

  FEDPEFT_DEVICE void load(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    const T* from1 = static_cast<const T*>(a.w1) + c * S * H;
    const T* from2 = static_cast<const T*>(a.w2) + c * H * S;
    for (int i = int(threadIdx.x); i < S * kLaneHashes; i += int(blockDim.x)) {
      const int s = i / kLaneHashes, h = i % kLaneHashes;
      A* const row = rows + s * kStride;
      row[h] = h < H ? to_acc(from1[s * H + h]) : A(0);
      row[kLaneHashes + h] = h < H ? to_acc(from2[h * S + s]) : A(0);
      if (h == 0) row[2 * kLaneHashes] = to_acc(static_cast<const T*>(a.b1)[c * S + s]);
    }
    if (const int h = int(threadIdx.x); h < kLaneHashes)
      b2[h] = h < H ? to_acc(static_cast<const T*>(a.b2)[c * H + h]) : A(0);
  }

  FEDPEFT_DEVICE Sum<A, kLaneHashes> w1(int s) const { return four(s * kStride); }
  FEDPEFT_DEVICE Sum<A, kLaneHashes> w2(int s) const { return four(s * kStride + kLaneHashes); }
  FEDPEFT_DEVICE A b1(int s) const { return rows[s * kStride + 2 * kLaneHashes]; }

 private:
  FEDPEFT_DEVICE Sum<A, kLaneHashes> four(int at) const {
    Sum<A, kLaneHashes> all;
#pragma unroll
    for (int h = 0; h < kLaneHashes; h += kWide<A>) {
      const Pack<A, kWide<A>> pack = load_pack<kWide<A>>(rows + at + h);
#pragma unroll
      for (int i = 0; i < kWide<A>; ++i) all.at[h + i] = pack.at[i];
    }
    return all;
  }
};

// SENet of two positions by a group of at least eight lanes. Of eight values for (position k, hash
// h) lane i has that of k = i / 4 % 2 and h = i % 4, or each lane has all, at [4 k + h].
template <typename T>
struct LaneNet {
  using A = acc_t<T>;
  const LaneWeights<T>& net;
  int lane, lanes;
  A hidden[kLaneSlots][2];

  FEDPEFT_DEVICE LaneNet(const LaneWeights<T>& n, int own, int of) : net(n), lane(own), lanes(of) {}

  FEDPEFT_DEVICE void spread(A mine, A (&all)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) all[i] = __shfl_sync(kFullMask, mine, i, lanes);
  }

  // The lane's gate, from the means of all rows; fills `hidden`, with zeros at padding.
  FEDPEFT_DEVICE A gate(const A (&means)[8], const bool (&active)[2]) {
    A part[8] = {};
#pragma unroll
    for (int slot = 0; slot < kLaneSlots; ++slot) {
      const int s = lane + slot * lanes;
      hidden[slot][0] = hidden[slot][1] = A(0);
      if (s >= net.S) continue;
      const Sum<A, kLaneHashes> w1 = net.w1(s), w2 = net.w2(s);
      const A b1 = net.b1(s);
      A sum[2] = {b1, b1};
#pragma unroll
      for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] += w1.at[h] * means[4 * k + h];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) hidden[slot][k] = active[k] && sum[k] > A(0) ? sum[k] : A(0);
#pragma unroll
      for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
        for (int k = 0; k < 2; ++k) part[4 * k + h] += w2.at[h] * hidden[slot][k];
      }
    }
    const A sum = sums_of_eight(part, lane, lanes);
    const int h = lane % kLaneHashes;
    return h < net.H ? sigmoid(net.b2[h] + sum) : A(0);
  }
};

// Blocks that a multiprocessor must have registers for.
template <typename T, int V>
constexpr int kLaneBlocks = sizeof(T) == 8 || V > 4 ? 1 : 2;

// With SENet, tables through L2: blocks of one client take `span` positions each, a group two at a
// time, whose rows are read once.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kLaneBlocks<T, V>)
    forward_lanes(HashLookupArgs a, int64_t clients, int64_t span, Modulus modulus) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, H = int(a.H);
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int own_h = lane % kLaneHashes, own_k = lane / kLaneHashes;
  const int64_t column = lane * V;
  const bool mine = column < a.D;
  const Hash hash(a.hashes, own_h < H ? own_h : 0);
  const int64_t spans = (a.positions + span - 1) / span, tasks = clients * spans;
  LaneWeights<T> net(a, shared);
  LaneNet<T> own(net, lane, lanes);
  const int bytes = a.items.bytes, row_bytes = int(a.D) * int(sizeof(T));
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, spans), begin = (task - client * spans) * span;
    const int64_t end = begin + span < a.positions ? begin + span : a.positions;
    const T* table = static_cast<const T*>(a.table) + (a.per_client ? client * a.M * a.D : 0);
    // The item of the lane's own position and hash is on its way two turns ahead; where its row
    // begins is known one turn ahead, so that the row may come to L2.
    Late come;
    const char* from =
        static_cast<const char*>(a.items.data) + (client * a.positions + own_k) * bytes;
    const auto load_item = [&](int64_t p) {
      come.load(from + p * bytes, bytes, own_k < 2 && own_h < H && p + own_k < end);
    };
    int64_t item, next_item = -1;
    int row, next_row = 0;  // at padding one that is read for nothing
    const auto find_row = [&](int64_t p) {
      next_item = come.come(bytes);
      check_item(a, next_item, client * a.positions + p + own_k);
      next_row = 0;
      if (next_item < 0) return;
      next_row = int(modulus(hash_of(hash.a, hash.b, uint64_t(next_item)))) * int(a.D);
      ask_ahead(table + next_row, row_bytes, 0, 1);
    };
    load_item(begin + 2 * group);
    __syncthreads();  // the readers of the task before
    net.load(a, client);
    find_row(begin + 2 * group);
    load_item(begin + 2 * group + 2 * groups);
    __syncthreads();
    // All lanes of a warp take as many turns, since they exchange values.
    for (int64_t turn = begin; turn < end; turn += 2 * groups) {
      const int64_t p = turn + 2 * group, n = client * a.positions + p;
      item = next_item;
      row = next_row;
      Pack<T, V> pack[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        pack[i] = load_pack<V>(table + __shfl_sync(kFullMask, row, i, lanes) + (mine ? column : 0));
      }
      bool active[2];
      Pack<T, V> base[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t of = __shfl_sync(kFullMask, item, k * kLaneHashes, lanes);
        active[k] = of >= 0;
        base[k] = base_at<V, T>(a, mine ? of : -1, column);
      }
      find_row(p + 2 * groups);
      load_item(p + 4 * groups);
      A of[8], all[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        of[i] = A(0);
        if (i % kLaneHashes >= H || !mine) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) of[i] += to_acc(pack[i].at[v]);
      }
      own.spread(sums_of_eight(of, lane, lanes) / A(a.D), all);
      const A gate = own.gate(all, active);
      own.spread(gate, all);
      Sum<A, V> sum[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) sum[k].set(base[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i % kLaneHashes >= H) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[i / 4].at[v] += all[i] * to_acc(pack[i].at[v]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!active[k]) sum[k].clear();
        if (mine && p + k < end) sum[k].store_once(static_cast<T*>(a.out) + (n + k) * a.D + column);
      }
    }
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
  template <int N>
  struct At {
    int64_t item[N];
  };
  template <int N>
  FEDPEFT_DEVICE At<N> at(const int64_t (&n)[N]) const {
    At<N> at;
    gather(a.items, n, at.item);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (n[u] >= 0) check_item(a, at.item[u], n[u]);
    }
    return at;
  }
  template <int N>
  FEDPEFT_DEVICE void rows(const At<N>& at, int slot, int (&row)[N]) const {
    const Hash hash(a.hashes, slot);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int64_t bucket = modulus(hash_of(hash.a, hash.b, uint64_t(at.item[u])));
      row[u] = at.item[u] < 0 ? -1 : int(bucket);
    }
  }
  FEDPEFT_HD const T* values() const
    requires(!Gated)
  {
    return static_cast<const T*>(a.grad);
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

// All gradients of a client by one block. Its first warp links the entries of each row while the
// others take the means of the rows that positions read and their products with the gradient; then
// the SENet, forward and backward; then each row's sum.
template <typename T, int V>
__global__ void __launch_bounds__(384, FEDPEFT_TWO_OR_THREE - 1)
    backward_whole(HashLookupArgs a, int64_t clients, Modulus modulus, WholePlan plan, T* out,
                   SENetOutputs<T> weights) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.grad);
  auto* coefficients = reinterpret_cast<Coefficients<A>*>(shared + plan.coefficients);
  A* squeezed = reinterpret_cast<A*>(shared + plan.squeezed);
  A* product = reinterpret_cast<A*>(shared + plan.product);  // then the gates' gradient
  A* hidden = reinterpret_cast<A*>(shared + plan.hidden);
  A* grad_hidden = reinterpret_cast<A*>(shared + plan.grad_hidden);
  A* partial = reinterpret_cast<A*>(shared + plan.partial);  // [strips, outputs], then a one
  int* head = reinterpret_cast<int*>(shared + plan.head);
  int* next = reinterpret_cast<int*>(shared + plan.next);
  int* bucket = reinterpret_cast<int*>(shared + plan.bucket);
  int* work = reinterpret_cast<int*>(shared + plan.work);
  BlockNet<T> net(a, shared + plan.net);
  const int H = net.H, S = net.S, M = int(a.M), P = int(a.positions), entries = P * H;
  const int outputs = 2 * S * H + S + H;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), lanes = plan.lanes;
  const int lane = thread % lanes;

  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* rows = static_cast<const T*>(a.table) + client * a.M * a.D;
    const T* grad = static_cast<const T*>(a.grad) + client * P * a.D;
    net.load(a, client);
    for (int r = thread; r < M; r += threads) head[r] = -1;
    for (int i = thread; i < plan.strips * outputs; i += threads) partial[i] = A(0);
    if (thread == 0) {
      partial[plan.strips * outputs] = A(1);
      *work = 0;
    }
    hash_entries<4>(a, modulus, client * P, entries, bucket, next);
    __syncthreads();

    if (thread < kWarp) link_entries(head, M, next, entries, 0, 1);
    const int at_once = kWarp / lanes;
    for (;;) {
      int first = 0;
      if (thread % kWarp == 0) first = atomicAdd(work, at_once);
      first = __shfl_sync(kFullMask, first, 0);
      if (first >= P) break;
      const int p = first + thread % kWarp / lanes;
      const bool active = p < P && bucket[p * H] >= 0;
      for (int h = 0; h < H; h += 4) {
        A sums[8] = {};  // of four rows, then of their products
        if (active) {
          int64_t row[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) row[j] = bucket[p * H + (h + j < H ? h + j : H - 1)] * a.D;
          for (int64_t column = lane * V; column < a.D; column += lanes * V) {
            Pack<T, V> values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = load_pack<V>(rows + row[j] + column);
            const Pack<T, V> g = load_pack<V>(grad + p * a.D + column);
            if (plan.staged && h == 0) store_pack<V>(staged + p * a.D + column, g);
#pragma unroll
            for (int i = 0; i < V; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const A x = to_acc(values[j].at[i]);
                sums[j] += x;
                sums[4 + j] += x * to_acc(g.at[i]);
              }
            }
          }
        }
        const A sum = sums_of_eight(sums, lane, lanes);
        const int to = h + (lane & 3);
        if (lane < 8 && p < P && to < H) {
          if (lane < 4) {
            squeezed[p * H + to] = sum / A(a.D);
          } else {
            product[p * H + to] = sum;
          }
        }
      }
    }
    __syncthreads();

    for (int first = 0; first < P; first += plan.chunk) {
      const int count = P - first < plan.chunk ? P - first : plan.chunk;
      const int entry = first * H;  // the chunk's first
      net.hide(hidden, count, bucket + entry, [&](int e) { return squeezed[entry + e]; });
      __syncthreads();
      for (int e = thread; e < count * H; e += threads) {
        const int p = int(unsigned(e) / unsigned(H));
        const A gate = net.gate(hidden, p, e - p * H);
        coefficients[entry + e].gate = gate;
        product[entry + e] =
            bucket[entry + e] >= 0 ? product[entry + e] * gate * (A(1) - gate) : A(0);
      }
      __syncthreads();
      for (int i = thread; i < count * S; i += threads) {
        const int p = int(unsigned(i) / unsigned(S)), s = i - p * S;
        A sum = 0;
        if (hidden[p * net.row2 + s] > A(0)) {
          for (int h = 0; h < H; ++h) sum += product[entry + p * H + h] * net.w2[h * net.row2 + s];
        }
        grad_hidden[p * net.row2 + s] = sum;
      }
      __syncthreads();
      for (int e = thread; e < count * H; e += threads) {
        const int p = int(unsigned(e) / unsigned(H)), h = e - p * H;
        A sum = 0;
#pragma unroll 4
        for (int s = 0; s < S; ++s) sum += grad_hidden[p * net.row2 + s] * net.w1[s * net.row1 + h];
        coefficients[entry + e].shift = sum / A(a.D);
      }
      // Output i of [w1 (S, H), b1 (S), w2 (H, S), b2 (H)] sums a product of two values a position.
      for (int task = thread; task < plan.strips * outputs; task += threads) {
        const int strip = int(unsigned(task) / unsigned(outputs));
        int i = task - strip * outputs;
        const A *x = partial + plan.strips * outputs, *y;
        int x_step = 0, y_step = H;
        if (i < S * H + S) {
          const int s = i < S * H ? int(unsigned(i) / unsigned(H)) : i - S * H;
          y = grad_hidden + s;
          y_step = net.row2;
          if (i < S * H) {
            x = squeezed + entry + i - s * H;
            x_step = H;
          }
        } else {
          i -= S * H + S;
          const int h = i < H * S ? int(unsigned(i) / unsigned(S)) : i - H * S;
          y = product + entry + h;
          if (i < H * S) {
            x = hidden + i - h * S;
            x_step = net.row2;
          }
        }
        A sum = partial[task];
#pragma unroll 4
        for (int p = strip; p < count; p += plan.strips) sum += x[p * x_step] * y[p * y_step];
        partial[task] = sum;
      }
      __syncthreads();
    }

    for (int i = thread; i < outputs; i += threads) {
      A sum = 0;
      for (int strip = 0; strip < plan.strips; ++strip) sum += partial[strip * outputs + i];
      *weights(client, i) = from_acc<T>(sum);
    }
    sum_rows<V>(out + client * a.M * a.D, plan.staged ? staged : grad, a, head, next, lanes,
                [&](int e) { return coefficients[e]; });
    __syncthreads();
  }
}

// As backward_whole where suits_lanes: groups of all warps but the first take two positions through
// the SENet and back in registers, those of the weights' gradients among them.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kLaneBlocks<T, V>)
    backward_lanes(HashLookupArgs a, int64_t clients, Modulus modulus, WholePlan plan, T* out,
                   SENetOutputs<T> weights) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.grad);
  auto* coefficients = reinterpret_cast<Coefficients<A>*>(shared + plan.coefficients);
  A* partial = reinterpret_cast<A*>(shared + plan.partial);  // [groups, outputs]
  int* head = reinterpret_cast<int*>(shared + plan.head);
  int* next = reinterpret_cast<int*>(shared + plan.next);
  int* bucket = reinterpret_cast<int*>(shared + plan.bucket);
  LaneWeights<T> net(a, shared + plan.net);
  const int H = net.H, S = net.S, M = int(a.M), D = int(a.D), P = int(a.positions);
  const int outputs = 2 * S * H + S + H;
  const int thread = int(threadIdx.x), lanes = plan.lanes, lane = thread % lanes;
  const int groups = (kThreads - kWarp) / lanes, group = (thread - kWarp) / lanes;
  const int own_h = lane % kLaneHashes, own_k = lane / kLaneHashes, column = lane * V;
  const bool mine = column < D;
  LaneNet<T> own(net, lane, lanes);

  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* rows = static_cast<const T*>(a.table) + client * a.M * a.D;
    const T* grad = static_cast<const T*>(a.grad) + client * P * a.D;
    net.load(a, client);
    for (int r = thread; r < M; r += kThreads) head[r] = -1;
    hash_entries<4>(a, modulus, client * P, P * H, bucket, next);
    __syncthreads();

    if (thread < kWarp) {
      link_entries(head, M, next, P * H, 0, 1);
    } else {
      A grad_w1[kLaneSlots][kLaneHashes] = {}, grad_w2[kLaneSlots][kLaneHashes] = {};
      A grad_b1[kLaneSlots] = {}, grad_b2 = 0;
      for (int turn = 0; turn < P; turn += 2 * groups) {
        const int p = turn + 2 * group;
        bool active[2];
        Pack<T, V> pack[8], g[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          active[k] = p + k < P && bucket[(p + k) * H] >= 0;
          g[k] = zero_pack<V, T>();
          if (active[k] && mine) g[k] = load_pack<V>(grad + (p + k) * D + column);
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
            pack[4 * k + h] = zero_pack<V, T>();
            if (active[k] && mine && h < H)
              pack[4 * k + h] = load_pack<V>(rows + int64_t(bucket[(p + k) * H + h]) * D + column);
          }
        }
        A sums[8], products[8], means[8], slopes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[i] = products[i] = A(0);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A x = to_acc(pack[i].at[v]);
            sums[i] += x;
            products[i] += x * to_acc(g[i / 4].at[v]);
          }
        }
        if (plan.staged && mine) {
#pragma unroll
          for (int k = 0; k < 2; ++k)
            if (active[k]) store_pack<V>(staged + (p + k) * D + column, g[k]);
        }
        own.spread(sums_of_eight(sums, lane, lanes) / A(D), means);
        const A gate = own.gate(means, active);
        const A product = sums_of_eight(products, lane, lanes);
        // The gradient before the sigmoid; zero at padding, of whose rows the products are.
        const A slope = product * gate * (A(1) - gate);
        own.spread(slope, slopes);
        if (own_k < 2) grad_b2 += slope;
        A part[8] = {};
#pragma unroll
        for (int slot = 0; slot < kLaneSlots; ++slot) {
          const int s = lane + slot * lanes;
          if (s >= S) continue;
          A before[2] = {};  // the ReLU
          const Sum<A, kLaneHashes> w1 = net.w1(s), w2 = net.w2(s);
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              before[k] += slopes[4 * k + h] * w2.at[h];
              grad_w2[slot][h] += slopes[4 * k + h] * own.hidden[slot][k];
            }
          }
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (!(own.hidden[slot][k] > A(0))) before[k] = A(0);
            grad_b1[slot] += before[k];
          }
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              part[4 * k + h] += before[k] * w1.at[h];
              grad_w1[slot][h] += before[k] * means[4 * k + h];
            }
          }
        }
        const A shift = sums_of_eight(part, lane, lanes) / A(D);
        if (own_k < 2 && own_h < H && p + own_k < P)
          coefficients[(p + own_k) * H + own_h] = {gate, shift};
      }
      A* to = partial + group * outputs;
#pragma unroll
      for (int slot = 0; slot < kLaneSlots; ++slot) {
        const int s = lane + slot * lanes;
        if (s >= S) continue;
#pragma unroll
        for (int h = 0; h < kLaneHashes; ++h) {
          if (h >= H) break;
          to[s * H + h] = grad_w1[slot][h];
          to[S * H + S + h * S + s] = grad_w2[slot][h];
        }
        to[S * H + s] = grad_b1[slot];
      }
      grad_b2 += __shfl_xor_sync(kFullMask, grad_b2, kLaneHashes, lanes);
      if (lane < H) to[2 * S * H + S + lane] = grad_b2;
    }
    __syncthreads();
    for (int i = thread; i < outputs; i += kThreads) {
      A sum = 0;
#pragma unroll 4
      for (int j = 0; j < groups; ++j) sum += partial[j * outputs + i];
      *weights(client, i) = from_acc<T>(sum);
    }
    const auto entry = [&](int e) { return coefficients[e]; };
    T* to = out + client * a.M * a.D;
    if (plan.staged) {
      sum_rows<V, 1>(to, staged, a, head, next, lanes, entry);
    } else {
      sum_rows<V>(to, grad, a, head, next, lanes, entry);
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

// With SENet; false where it does not pay, or shared memory does not hold a whole table.
template <typename T>
bool plan_gated_stage(const HashLookupArgs& a, int64_t clients, GatedStagedPlan* plan) {
  using A = acc_t<T>;
  if (!a.per_client || !StagedPlan::pays(a.positions, a.H, a.M, a.D)) return false;
  int64_t chunk = StagedPlan::chunk_of(a.positions, a.H);
  while (chunk > 1 && chunk * a.S > 8192) chunk = (chunk + 1) / 2;
  Carve carve;
  carve.take<T>(a.M * a.D);
  plan->rows.list = carve.take<int>(chunk * a.H);
  plan->gate = carve.take<A>(chunk * a.H);
  plan->mean = carve.take<A>(a.M);
  plan->hidden = carve.take<A>(chunk * (a.S | 1));
  plan->net = carve.take<A>(BlockNet<T>::size(a.H, a.S));
  plan->rows.bytes = carve.used;
  plan->rows.blocks = clients;
  plan->rows.slices = 1;
  plan->rows.width = int(a.D);
  plan->rows.chunk = int(chunk);
  // About 32 warps a multiprocessor, however many blocks fit.
  plan->rows.threads = carve.used > 100 * 1024 ? 1024 : carve.used > 40 * 1024 ? 512 : 256;
  return carve.used <= limits().shared_bytes;
}

template <typename T, int V>
void launch_plain(const HashLookupArgs& a, int64_t clients, Stream stream) {
  const int lanes = lanes_for(a.D / V);
  const auto by_lanes = [&](const auto& call) {
    return with_lane_positions<V>(a.H, (a.per_client ? clients : 1) * a.M * a.D, lanes, call);
  };
  if (StagedPlan plan{}; a.per_client && plan.make<T, V>(clients, a.positions, a.M, a.H, a.D, 64) &&
                         (plan.beats_lanes<V>() || !by_lanes([](auto) {}))) {
    launch(forward_staged<T, V>, plan.blocks, plan.threads, plan.bytes, stream, a, Modulus(a.M),
           plan);
    return;
  }
  const int64_t total = clients * a.positions, groups = kLaneThreads / lanes;
  const bool done = by_lanes([&](auto at_once) {
    constexpr int N = decltype(at_once)::value;
    const LaneTurns turns(total, groups * N);
    launch(forward_plain<T, V, N>, turns.tasks, kLaneThreads, 0, stream, a, turns, Modulus(a.M),
           lanes);
  });
  if (!done)
    launch(forward_plain<T, V, 0>, (total + groups - 1) / groups, kLaneThreads, 0, stream, a,
           LaneTurns(total, groups), Modulus(a.M), lanes);
}

template <typename T, int V>
void launch_gated(const HashLookupArgs& a, int64_t clients, void* memory, Stream stream) {
  if (suits_lanes<V>(a)) {
    const int64_t turn = 2 * (kThreads / lanes_for(a.D / V));
    const int64_t span = (span_for(clients * a.positions, 4 * turn) + turn - 1) / turn * turn;
    launch(forward_lanes<T, V>, clients * ((a.positions + span - 1) / span), kThreads,
           LaneWeights<T>::size(a.S) * int64_t(sizeof(acc_t<T>)), stream, a, clients, span,
           Modulus(a.M));
    return;
  }
  if (GatedStagedPlan staged{}; plan_gated_stage<T>(a, clients, &staged)) {
    launch(forward_staged_gated<T, V>, clients, staged.rows.threads, staged.rows.bytes, stream, a,
           Modulus(a.M), staged);
    return;
  }
  const GatedPlan plan = plan_gated<T>(a, lanes_for(a.D / V), limits());
  const auto kernel = plan.where == Scratch::shared ? forward<T, V, Scratch::shared>
                                                    : forward<T, V, Scratch::memory>;
  launch(kernel, plan.grid(clients * a.positions), unsigned(plan.threads), plan.shared(), stream, a,
         clients * a.positions, Modulus(a.M), plan.lanes, static_cast<unsigned char*>(memory));
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

// False where shared memory does not hold it.
template <typename T, int V>
bool plan_whole(const HashLookupArgs& a, WholePlan* plan) {
  using A = acc_t<T>;
  const int64_t entries = a.positions * a.H, outputs = a.senet_size();
  int64_t chunk = a.positions < 64 ? a.positions : 64;
  while (chunk > 1 && chunk * a.S > 4096) chunk = (chunk + 1) / 2;
  int strips = 1;
  while (strips < 8 && strips * outputs < 1024) strips *= 2;
  Carve carve;
  plan->coefficients = carve.take<A>(2 * entries);
  plan->squeezed = carve.take<A>(entries);
  plan->product = carve.take<A>(entries);
  plan->net = carve.take<A>(BlockNet<T>::size(a.H, a.S));
  plan->hidden = carve.take<A>(chunk * (a.S | 1));
  plan->grad_hidden = carve.take<A>(chunk * (a.S | 1));
  plan->partial = carve.take<A>(strips * outputs + 1);
  plan->head = carve.take<int>(a.M);
  plan->next = carve.take<int>(entries);
  plan->bucket = carve.take<int>(entries);
  plan->work = carve.take<int>(1);
  stage_gradient<T>(a, &carve, plan);
  plan->chunk = int(chunk);
  plan->strips = strips;
  const int lanes = lanes_for(a.D / V);
  plan->lanes = lanes < 8 ? 8 : lanes;
  plan->threads = carve.used > 72 * 1024 ? 384 : 256;
  return carve.used <= limits().shared_bytes;
}

// False where shared memory does not hold it, or its registers.
template <typename T, int V>
bool plan_lanes(const HashLookupArgs& a, WholePlan* plan) {
  using A = acc_t<T>;
  if (!suits_lanes<V>(a)) return false;
  const int64_t entries = a.positions * a.H;
  *plan = {};
  plan->threads = kThreads;
  plan->lanes = lanes_for(a.D / V);
  Carve carve;
  plan->coefficients = carve.take<A>(2 * entries);
  plan->net = carve.take<A>(LaneWeights<T>::size(a.S));
  plan->partial = carve.take<A>((kThreads - kWarp) / plan->lanes * a.senet_size());
  plan->head = carve.take<int>(a.M);
  plan->next = carve.take<int>(entries);
  plan->bucket = carve.take<int>(entries);
  stage_gradient<T>(a, &carve, plan);
  return carve.used <= limits().shared_bytes;
}

}  // namespace

void hash_buckets(const IndexArray& items, const int64_t* hashes, int64_t* out, int64_t count,
                  int64_t H, int64_t table_size, Stream stream) {
  if (count == 0) return;
  // A thread takes many, so that its own hash is a small part, while 16 blocks are left to each
  // multiprocessor; and a thread a hash at least.
  const int64_t least = (H + 255) / 256, most = 16 * limits().multiprocessors;
  int64_t blocks = (count * H + 255) / 256;
  if (blocks > most) blocks = most;
  if (blocks < least) blocks = least;
  launch(buckets, blocks, 256, 0, stream, items, hashes, out, count, H, Modulus(table_size));
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

ScatterShape hash_lookup_shape(const HashLookupArgs& a, DType dtype, int64_t clients) {
  ScatterShape shape{clients, a.positions, a.H, a.M, a.D, false};
  if (!a.w1) {  // an entry is the gradient itself, and the mean's 1 / H is left to the row
    shape.bytes = element_size(dtype);
    if (a.mean) shape.scale = 1.0 / double(a.H);
  }
  return shape;
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

bool hash_lookup_backward_whole(const HashLookupArgs& a, DType dtype, int64_t clients, void* out,
                                const SENetGradients& weights, Stream stream) {
  // More rows and entries than these are done faster by several blocks, and sooner where few
  // clients leave most of the device idle.
  const int64_t most = clients < limits().multiprocessors ? 512 : 4096;
  if (a.positions * a.H > most || a.M > most) return false;
  bool done = false;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          WholePlan plan;
          const bool lanes = plan_lanes<T, V>(a, &plan);
          if (!lanes && !plan_whole<T, V>(a, &plan)) return;
          launch(lanes ? backward_lanes<T, V> : backward_whole<T, V>, clients, plan.threads,
                 plan.bytes, stream, a, clients, Modulus(a.M), plan, static_cast<T*>(out),
                 SENetOutputs<T>(a, weights));
          done = true;
        },
        a.table, a.grad, out);
  });
  return done;
}

}  // namespace fedpeft::gpu
