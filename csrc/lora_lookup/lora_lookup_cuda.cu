// CUDA kernels of lora_lookup. Forward: a block serves a range of one client's positions with B
// transposed in shared memory where it fits, a group of lanes a position. Backward: A by a scatter,
// B by a sum over positions.
#include "common/position_sum.cuh"
#include "common/scatter.cuh"
#include "common/streaming.cuh"
#include "lora_lookup/lora_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 128;                // of the forward: small blocks use up registers
constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor

// The row of A that position n reads, -1 at padding.
FEDPEFT_DEVICE int64_t row_at(const LoraLookupArgs& a, int64_t n) {
  const int64_t row = a.rows[n];
  if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, n, a.num_rows);
  return row;
}

// Blocks of one client take `span` positions each. VA: columns of a row of A that a load takes.
template <typename T, int V, int VA, bool Staged>
__global__ void __launch_bounds__(kThreads, Staged ? FEDPEFT_TWO_OR_THREE + 2 : 4)
    forward(LoraLookupArgs a, int64_t clients, int64_t span) {
  using A = acc_t<T>;
  constexpr int N = kAtOnce<T, V>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  A* transposed = reinterpret_cast<A*>(shared);  // [rank, D]
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  const int64_t spans = (a.positions + span - 1) / span, tasks = clients * spans;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, spans), begin = (task - client * spans) * span;
    const int64_t end = begin + span < a.positions ? begin + span : a.positions;
    const int64_t c = a.per_client ? client : 0;
    const T* B = static_cast<const T*>(a.B) + c * a.D * a.rank;
    if constexpr (Staged) {
      __syncthreads();  // the readers of the task before
      const int size = int(a.D * a.rank), rank = int(a.rank), D = int(a.D);
      for (int i = int(threadIdx.x); i < size; i += 4 * kThreads) {
        T x[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) x[u] = B[i + u * kThreads < size ? i + u * kThreads : i];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int at = i + u * kThreads, d = at / rank;
          if (at < size) transposed[(at - d * rank) * D + d] = to_acc(x[u]);
        }
      }
      __syncthreads();
    }
    for (int64_t p = begin + threadIdx.x / lanes; p < end; p += groups * N) {
      int64_t at[N], item[N], row[N];
#pragma unroll
      for (int u = 0; u < N; ++u)
        at[u] = p + u * groups < end ? client * a.positions + p + u * groups : -1;
      gather(a.items, at, item);
      if (a.separate_rows) gather(a.rows, at, row);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (at[u] >= 0 && classify(item[u], a.num_items) == Position::bad)
          FEDPEFT_BAD_INDEX("items", item[u], at[u], a.num_items);
        if (!a.separate_rows) row[u] = item[u];
        if ((at[u] >= 0 && classify(row[u], a.num_rows) == Position::bad) ||
            (row[u] < 0) != (item[u] < 0))
          FEDPEFT_BAD_INDEX("rows", row[u], at[u], a.num_rows);
      }
      const T* factors = static_cast<const T*>(a.A) + c * a.num_rows * a.rank;
      for (int64_t column = lane * V; column < a.D; column += lanes * V) {
        // At padding the first item and row, for nothing: loads under a condition wait for each
        // other.
        Pack<T, V> under[N];
#pragma unroll
        for (int u = 0; u < N; ++u) {
          under[u] = zero_pack<V, T>();
          if (a.base && a.num_items > 0) {
            under[u] = load_pack<V>(static_cast<const T*>(a.base) +
                                    (item[u] >= 0 ? item[u] : 0) * a.D + column);
          }
        }
        Sum<A, V> sum[N];
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u].set(under[u]);
        const int rank = a.num_rows > 0 ? int(a.rank) : 0;
        const A* b_at = transposed + column;
        for (int j = 0; j < rank; j += VA) {
          Pack<T, VA> factor[N];
#pragma unroll
          for (int u = 0; u < N; ++u)
            factor[u] = load_pack<VA>(factors + (row[u] >= 0 ? row[u] : 0) * a.rank + j);
#pragma unroll
          for (int i = 0; i < VA; ++i) {
            Sum<A, V> b;
            if constexpr (Staged) {
              b.set(b_at);
              b_at += a.D;
            } else {
#pragma unroll
              for (int v = 0; v < V; ++v) b.at[v] = to_acc(B[(column + v) * a.rank + j + i]);
            }
#pragma unroll
            for (int u = 0; u < N; ++u) {
#pragma unroll
              for (int v = 0; v < V; ++v) sum[u].at[v] += to_acc(factor[u].at[i]) * b.at[v];
            }
          }
        }
#pragma unroll
        for (int u = 0; u < N; ++u) {
          if (row[u] < 0) sum[u].clear();
          if (p + u * groups < end) {
            sum[u].store_once(static_cast<T*>(a.out) +
                              (client * a.positions + p + u * groups) * a.D + column);
          }
        }
      }
    }
  }
}

// B^T g at the row of A that a position reads; columns are those of the rank.
template <typename T>
struct SourceA {
  LoraLookupArgs a;
  static constexpr int kRowsAtOnce = 1;

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t) const { return row_at(a, n); }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.clear();
    const int64_t client = a.per_client ? divide(n, a.positions) : 0;
    const T* B = static_cast<const T*>(a.B) + client * a.D * a.rank + column;
    const T* grad = static_cast<const T*>(a.grad) + n * a.D;
#pragma unroll 4
    for (int64_t d = 0; d < a.D; ++d) v.add_scaled(to_acc(grad[d]), B + d * a.rank);
    return v;
  }
};

// Output d * rank + j: g[d] a[j].
template <typename T>
struct SourceB {
  LoraLookupArgs a;

  FEDPEFT_DEVICE bool active(int64_t n) const { return row_at(a, n) >= 0; }
  template <int V>
  FEDPEFT_DEVICE void add(Sum<acc_t<T>, V>& sum, int64_t client, int64_t n, int64_t output) const {
    const int64_t d = divide(output, a.rank), j = output - d * a.rank;
    const int64_t row = (a.per_client ? client * a.num_rows : 0) + a.rows[n];
    sum.add_scaled(to_acc(static_cast<const T*>(a.grad)[n * a.D + d]),
                   static_cast<const T*>(a.A) + row * a.rank + j);
  }
};

// Both gradients in one launch: the first `lists` blocks take A's, the others B's.
template <typename T, int V>
__global__ void __launch_bounds__(256, 2)
    backward(LoraLookupArgs a, ScatterPlan plan, PositionSum shape, T* out_A, T* out_B,
             int64_t lists) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  if (blockIdx.x < lists) {
    scatter_lists_tasks<T, V>(SourceA<T>{a}, out_A, plan, shared, blockIdx.x, lists);
  } else {
    sum_positions_tasks<T, V>(SourceB<T>{a}, OneArray<T>{out_B, shape.outputs}, shape,
                              static_cast<acc_t<T>*>(nullptr), blockIdx.x - lists,
                              gridDim.x - lists);
  }
}

// Products B^T g of a client's positions, which lie in shared memory, as their rows of A do.
template <typename T>
struct SourceProducts {
  const acc_t<T>* products;  // [positions, rank]
  const int* rows;           // [positions]
  int rank;
  int64_t first;  // flat position of the first

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t) const { return rows[n - first]; }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
#pragma unroll
    for (int i = 0; i < V; ++i) v.at[i] = products[int(n - first) * rank + int(column) + i];
    return v;
  }
};

constexpr int kRanks = 8;  // columns of A and B that a pass takes, as sums_of_eight

// A pass' columns of a row of A, zeros where there are fewer or no row.
template <int VA, typename T>
FEDPEFT_DEVICE void load_factors(const T* from, bool there, int ranks, acc_t<T> (&to)[kRanks]) {
  if (VA > 1 && ranks == kRanks) {
#pragma unroll
    for (int j = 0; j < kRanks; j += VA) {
      Pack<T, VA> pack = zero_pack<VA, T>();
      if (there) pack = load_pack<VA>(from + j);
#pragma unroll
      for (int i = 0; i < VA; ++i) to[j + i] = to_acc(pack.at[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kRanks; ++j) to[j] = there && j < ranks ? to_acc(from[j]) : acc_t<T>(0);
  }
}

constexpr int kClientThreads = 128;
constexpr int kTilePositions = 32;

// Places in the shared memory of backward_clients, in bytes.
struct ClientPlan {
  ScatterPlan lists;
  int64_t rows, products, tiles, tile_bytes, bytes;
  int tile;  // positions
};

// A tile of positions: a pass' columns of their rows of A, and their columns of the gradient.
template <typename T>
struct Tile {
  T *factors, *grad;  // [tile, kRanks], [tile, columns]

  static FEDPEFT_HD int64_t bytes(int64_t tile, int64_t columns) {
    return tile * ((kRanks + columns) * int64_t(sizeof(T)));
  }
  FEDPEFT_DEVICE Tile(unsigned char* at, int tile)
      : factors(reinterpret_cast<T*>(at)), grad(factors + tile * kRanks) {}
};

// A block a client, which reads the gradient once, in tiles of positions of which the next is on
// its way into shared memory while the block works on one: a group of lanes takes every so many-th
// position and holds its columns of B and of B's gradient in registers.
template <typename T, int V, int VA>
__global__ void __launch_bounds__(kClientThreads, sizeof(T) == 8 || VA == 1 ? 3 : 4)
    backward_clients(LoraLookupArgs a, ClientPlan plan, T* out_A, T* out_B) {
  using A = acc_t<T>;
  constexpr int kCopied = V > 1 ? kWide<T> : 1;  // elements of the gradient that a copy takes
  constexpr int kValues = V * kRanks;            // of a thread, of B's gradient
  FEDPEFT_DYNAMIC_SHARED(shared);
  int* rows = reinterpret_cast<int*>(shared + plan.rows);
  A* products = reinterpret_cast<A*>(shared + plan.products);  // [positions, rank]
  A* parts = reinterpret_cast<A*>(shared + plan.tiles);        // [threads, kValues and a gap]
  const int lanes = lanes_for((a.D + V - 1) / V), groups = kClientThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int columns = lanes * V;  // of a tile
  const int positions = int(a.positions), rank = int(a.rank), D = int(a.D);
  const auto tile_at = [&](int t) {
    return Tile<T>(shared + plan.tiles + (t & 1) * plan.tile_bytes, plan.tile);
  };
  for (int64_t client = blockIdx.x; client < plan.lists.clients; client += gridDim.x) {
    const int64_t c = a.per_client ? client : 0;
    const T* B = static_cast<const T*>(a.B) + c * a.D * a.rank;
    const T* A_rows = static_cast<const T*>(a.A) + c * a.num_rows * a.rank;
    const T* grads = static_cast<const T*>(a.grad) + client * positions * a.D;
    const auto copy_grad = [&](int t, int base) {
      const int first = t * plan.tile;
      const int count = positions - first < plan.tile ? positions - first : plan.tile;
      const int in_row = columns / kCopied;  // a power of two
      const int column = int(threadIdx.x) % in_row * kCopied;
      if (column >= D - base) return;
      T* to = tile_at(t).grad + column;
      const T* source = grads + int64_t(first) * D + base + column;
      for (int p = int(threadIdx.x) / in_row; p < count; p += kClientThreads / in_row)
        copy_to_shared<kCopied>(to + p * columns, source + p * D);
    };
    const auto copy_factors = [&](int t, int from, int ranks) {
      const int first = t * plan.tile;
      const int count = positions - first < plan.tile ? positions - first : plan.tile;
      T* to = tile_at(t).factors;
      constexpr int kPieces = kRanks / kWide<T>;
      for (int i = int(threadIdx.x); i < count * kPieces; i += kClientThreads) {
        const int p = i / kPieces, column = i % kPieces * kWide<T>;
        const int row = rows[first + p];
        const T* source = A_rows + int64_t(row) * rank + from + column;
        T* place = to + p * kRanks + column;
        if (VA > 1 && row >= 0 && column < ranks) {  // where ranks is a multiple of VA
          copy_to_shared<kWide<T>>(place, source);
        } else {
          Pack<T, kWide<T>> pack = zero_pack<kWide<T>, T>();
          if (row >= 0) {
#pragma unroll
            for (int k = 0; k < kWide<T>; ++k)
              if (column + k < ranks) pack.at[k] = source[k];
          }
          store_pack<kWide<T>>(place, pack);
        }
      }
    };
    const int tiles = (positions + plan.tile - 1) / plan.tile;
    if (tiles > 0) copy_grad(0, 0);
    for (int p = int(threadIdx.x); p < positions; p += kClientThreads)
      rows[p] = int(row_at(a, client * positions + p));
    __syncthreads();
    for (int from = 0; from < rank; from += kRanks) {
      const int ranks = rank - from < kRanks ? rank - from : kRanks;
      for (int base = 0; base < D; base += columns) {
        if (tiles > 0) {
          if (from > 0 || base > 0) copy_grad(0, base);
          copy_factors(0, from, ranks);
        }
        commit_copies();
        const int column = base + lane * V;
        const bool mine = column < D;
        A b[V][kRanks], sum[V][kRanks];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          load_factors<VA>(B + int64_t(column + v) * rank + from, mine, ranks, b[v]);
#pragma unroll
          for (int j = 0; j < kRanks; ++j) sum[v][j] = 0;
        }
#pragma unroll 1
        for (int t = 0; t < tiles; ++t) {
          if (t + 1 < tiles) {
            copy_grad(t + 1, base);
            copy_factors(t + 1, from, ranks);
          }
          commit_copies();
          wait_for_copies<1>();
          __syncthreads();
          const Tile<T> tile = tile_at(t);
          const int first = t * plan.tile;
          const int count = positions - first < plan.tile ? positions - first : plan.tile;
          // All lanes of a warp take as many turns, since they exchange sums.
          const int in_warp = kWarp / lanes, within = group % in_warp;
#pragma unroll 1
          for (int turn = group - within; turn < count; turn += groups) {
            const int i = turn + within, p = first + i;
            const bool there = i < count && rows[p] >= 0;
            Pack<T, V> g = zero_pack<V, T>();
            A factor[kRanks], product[kRanks];
            if (there && mine) g = load_pack<V>(tile.grad + i * columns + lane * V);
            load_factors<kWide<T>>(tile.factors + i * kRanks, there, kRanks, factor);
#pragma unroll
            for (int j = 0; j < kRanks; ++j) product[j] = 0;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const A value = to_acc(g.at[v]);
#pragma unroll
              for (int j = 0; j < kRanks; ++j) {
                product[j] += value * b[v][j];
                sum[v][j] += value * factor[j];
              }
            }
            const auto keep = [&](int j, A x) {
              A& to = products[p * rank + from + j];
              to = base == 0 ? x : to + x;
            };
            if (lanes >= kRanks) {
              const A own = sums_of_eight(product, lane, lanes);
              if (i < count && lane < ranks) keep(lane, own);
            } else {
#pragma unroll
              for (int j = 0; j < kRanks; ++j) {
                const A whole = group_sum(product[j], lanes);
                if (i < count && lane == 0 && j < ranks) keep(j, whole);
              }
            }
          }
          __syncthreads();
        }
        // The groups' sums, in order; the tiles make room.
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int j = 0; j < kRanks; ++j)
            parts[int(threadIdx.x) * (kValues + 1) + v * kRanks + j] = sum[v][j];
        }
        __syncthreads();
        const int outputs = columns * kRanks;
        for (int o = int(threadIdx.x); o < outputs; o += kClientThreads) {
          const int d = base + o / kRanks;
          if (d >= D || o % kRanks >= ranks) continue;
          A total = 0;
          const A* part = parts + o / kValues * (kValues + 1) + o % kValues;
          for (int i = 0; i < groups; ++i) total += part[i * lanes * (kValues + 1)];
          out_B[(client * D + d) * rank + from + o % kRanks] = from_acc<T>(total);
        }
        __syncthreads();
      }
    }
    scatter_lists_team<SourceProducts<T>, T, 1>({products, rows, rank, client * positions}, out_A,
                                                plan.lists, client, int(threadIdx.x),
                                                reinterpret_cast<int*>(shared));
    __syncthreads();
  }
}

}  // namespace

void lora_lookup(const LoraLookupArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions;
  if (total == 0 || a.D == 0) return;
  const Limits device = limits();
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t bytes = a.rank * a.D * int64_t(sizeof(acc_t<T>));
    const bool staged = bytes <= kStagedBytes && bytes <= device.shared_bytes;
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t span = span_for(total, 4 * (kThreads / lanes_for(a.D / V)));
          const int64_t grid = clients * ((a.positions + span - 1) / span);
          with_width<T>(
              a.rank,
              [&](auto factors) {
                constexpr int VA = decltype(factors)::value;
                launch(staged ? forward<T, V, VA, true> : forward<T, V, VA, false>, grid, kThreads,
                       staged ? bytes : 0, stream, a, clients, span);
              },
              a.A);
        },
        a.base, a.out);
  });
}

ScatterShape lora_lookup_shape_A(const LoraLookupArgs& a, int64_t clients) {
  return {clients, a.positions, 1, a.num_rows, a.rank, true};
}

void lora_lookup_keys(const LoraLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream) {
  launch_scatter_keys(SourceA<float>{a}, plan, keys, stream);
}

void lora_lookup_backward_A(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                            const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          launch_scatter<T, decltype(width)::value>(SourceA<T>{a}, plan, sorted, out, stream);
        },
        a.B, out, sorted.partial);
  });
}

namespace {

// Whether it did; it does while a block's shared memory holds a client's lists and products.
bool lora_lookup_backward_clients(const LoraLookupArgs& a, DType dtype, const ScatterPlan& lists,
                                  void* out_A, void* out_B, Stream stream) {
  if (lists.splits != 1 || a.D == 0) return false;
  const Limits device = limits();
  bool done = false;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    constexpr int kFour = 16 / int(sizeof(A));  // columns of a lane: few registers for each type
    const auto run = [&](auto columns, auto factors) {
      constexpr int V = decltype(columns)::value, VA = decltype(factors)::value;
      const auto round = [](int64_t bytes) { return (bytes + 31) / 32 * 32; };
      ClientPlan plan{};
      plan.lists = lists;
      plan.lists.team = plan.lists.block = kClientThreads;
      const int64_t some = a.positions > 0 ? a.positions : 1;
      plan.tile = int(some < kTilePositions ? some : kTilePositions);
      plan.tile_bytes = round(Tile<T>::bytes(plan.tile, lanes_for((a.D + V - 1) / V) * V));
      plan.rows = round((lists.rows_per_split + a.positions) * int64_t(sizeof(int)));
      plan.products = plan.rows + round(a.positions * int64_t(sizeof(int)));
      plan.tiles = plan.products + round(a.positions * a.rank * int64_t(sizeof(A)));
      const int64_t parts = int64_t(kClientThreads) * (V * kRanks + 1) * int64_t(sizeof(A));
      const int64_t tiles = plan.tile_bytes * (a.positions > plan.tile ? 2 : 1);
      plan.bytes = plan.tiles + (parts > tiles ? parts : tiles);
      if (plan.bytes > device.shared_bytes) return;
      launch(backward_clients<T, V, VA>, lists.clients, kClientThreads, plan.bytes, stream, a, plan,
             static_cast<T*>(out_A), static_cast<T*>(out_B));
      done = true;
    };
    const auto one = std::integral_constant<int, 1>{};
    const bool wide = a.D % kWide<T> == 0 && aligned16(a.grad);
    with_width<T>(
        a.rank,
        [&](auto factors) {
          if (wide) {
            run(std::integral_constant<int, kFour>{}, factors);
          } else {
            run(one, factors);
          }
        },
        a.A, a.B);
  });
  return done;
}

}  // namespace

void lora_lookup_backward(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const PositionSum& shape, void* out_A, void* out_B, Stream stream) {
  if (lora_lookup_backward_clients(a, dtype, plan, out_A, out_B, stream)) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t lists = grid_half(plan.list_blocks());
          const int64_t sums = grid_half(position_sum_tasks<V>(shape, plan.block));
          launch(backward<T, V>, lists + sums, unsigned(plan.block), plan.shared_bytes, stream, a,
                 plan, shape, static_cast<T*>(out_A), static_cast<T*>(out_B), lists);
        },
        a.A, a.B, out_A, out_B);
  });
}

PositionSum lora_lookup_shape_B(const LoraLookupArgs& a, int64_t clients) {
  return {clients, a.positions, a.D * a.rank};
}

void lora_lookup_backward_B(const LoraLookupArgs& a, DType dtype, const PositionSum& shape,
                            void* partial, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.rank,
        [&](auto width) {
          launch_position_sum<T, decltype(width)::value>(
              SourceB<T>{a}, shape, OneArray<T>{static_cast<T*>(out), shape.outputs}, partial,
              stream);
        },
        a.A, out, partial);
  });
}

}  // namespace fedpeft::gpu
