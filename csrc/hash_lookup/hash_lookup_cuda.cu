// CUDA kernels of hash_lookup. Plain lookups: a group of lanes takes several positions at a time,
// its lanes hash in parallel and pass the rows' addresses around by shuffles; or a block copies a
// client's table, or some of its columns, to shared memory while it hashes. Their gradient is a
// scatter. With SENet a group keeps the rows of two positions in registers (lane_senet.cuh); where
// they don't fit, a block takes a client (block_senet.cuh), or a group a position
// (group_senet.cuh).
#include "common/scatter.cuh"
#include "hash_lookup/block_senet.cuh"
#include "hash_lookup/group_senet.cuh"
#include "hash_lookup/lane_senet.cuh"

namespace fedpeft::gpu {
namespace {

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

template <typename T, int V>
__global__ void __launch_bounds__(kStagedThreads, FEDPEFT_TWO_OR_THREE)
    forward_staged(HashLookupArgs a, Modulus modulus, StagedPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  PlainEntries<T> source{a, modulus, plain_weight<acc_t<T>>(a)};
  sum_staged_rows<V, kLanePositions<V>, T>(row_sums(a), plan, source, shared);
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
  const auto kernel = plan.where == Scratch::shared ? forward_groups<T, V, Scratch::shared>
                                                    : forward_groups<T, V, Scratch::memory>;
  launch(kernel, plan.grid(clients * a.positions), unsigned(plan.threads), plan.shared(), stream, a,
         clients * a.positions, Modulus(a.M), plan.lanes, static_cast<unsigned char*>(memory));
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
          const auto kernel = plan.where == Scratch::shared
                                  ? activate_groups<T, V, Scratch::shared>
                                  : activate_groups<T, V, Scratch::memory>;
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
  if (a.positions * a.D > UINT32_MAX) return false;  // sum_rows has such offsets
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
