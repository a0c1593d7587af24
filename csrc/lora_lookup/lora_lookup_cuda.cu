// CUDA kernels of lora_lookup. Forward: a block serves a range of one client's positions with B
// transposed in shared memory where it fits, a group of lanes a position. Backward: a block a
// client where its lists fit; else A by a scatter, B by a sum over positions.
#include "common/position_sum.cuh"
#include "common/scatter.cuh"
#include "common/streaming.cuh"
#include "lora_lookup/lora_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 128;                // of the forward: small blocks use up registers
constexpr int64_t kMostPositions = 512;      // of a block at a time,
constexpr int64_t kPlaceBytes = 16;          // for each of which it keeps two places
constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor

// The row of A that position n reads, -1 at padding.
FEDPEFT_DEVICE int64_t row_at(const LoraLookupArgs& a, int64_t n) {
  const int64_t row = a.rows[n];
  if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, n, a.num_rows);
  return row;
}

// Blocks of one client take `span` positions each, whose places are found together and stay in
// shared memory; -1 for a row: padding. VA: columns of a row of A that a load takes.
template <typename T, int V, int VA, bool Staged>
__global__ void __launch_bounds__(kThreads, Staged ? (sizeof(T) < 8 ? FEDPEFT_TWO_OR_THREE + 2 : 4)
                                                   : (V > 1 ? 4 : 3))
    forward(LoraLookupArgs a, int64_t clients, int64_t span) {
  using A = acc_t<T>;
  constexpr int N = kAtOnce<T, V>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  int64_t* places = reinterpret_cast<int64_t*>(shared);               // [span, 2]: base, row
  A* transposed = reinterpret_cast<A*>(shared + span * kPlaceBytes);  // [rank, D]
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, lane = int(threadIdx.x) % lanes;
  const int D = int(a.D), rank = a.num_rows > 0 ? int(a.rank) : 0;
  const int64_t spans = (a.positions + span - 1) / span, tasks = clients * spans;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, spans), begin = (task - client * spans) * span;
    const int count = int(begin + span < a.positions ? span : a.positions - begin);
    const int64_t c = a.per_client ? client : 0, first = client * a.positions + begin;
    const T* B = static_cast<const T*>(a.B) + c * a.D * a.rank;
    const T* factors = static_cast<const T*>(a.A) + c * a.num_rows * a.rank;
    if constexpr (Staged)  // comes while the items do
      ask_ahead(B, a.D * a.rank * int64_t(sizeof(T)), int(threadIdx.x), kThreads);
    __syncthreads();  // the readers of the task before
    for (int p = int(threadIdx.x); p < count; p += kThreads) {
      const int64_t item = a.items[first + p];
      const int64_t row = a.separate_rows ? a.rows[first + p] : item;
      if (classify(item, a.num_items) == Position::bad)
        FEDPEFT_BAD_INDEX("items", item, first + p, a.num_items);
      if (classify(row, a.num_rows) == Position::bad || (row < 0) != (item < 0))
        FEDPEFT_BAD_INDEX("rows", row, first + p, a.num_rows);
      store_pack<2>(places + 2 * p, {{item < 0 ? 0 : item * D, row < 0 ? -1 : row * a.rank}});
      if (row >= 0) ask_ahead(factors + row * a.rank, rank * int64_t(sizeof(T)), 0, 1);
    }
    if constexpr (Staged) {
      const int size = D * int(a.rank);
      for (int i = int(threadIdx.x); i < size; i += 4 * kThreads) {
        T x[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) x[u] = B[i + u * kThreads < size ? i + u * kThreads : i];
#pragma unroll
        for (int u = 0; u < 4; ++u) {
          const int at = i + u * kThreads, d = at / int(a.rank);
          if (at < size) transposed[(at - d * int(a.rank)) * D + d] = to_acc(x[u]);
        }
      }
    }
    __syncthreads();
    for (int p = int(threadIdx.x) / lanes; p < count; p += groups * N) {
      int64_t row[N];
      for (int column = lane * V; column < D; column += lanes * V) {
        // At padding the first item and row, for nothing: loads under a condition wait for each
        // other.
        Sum<A, V> sum[N];
        Pack<T, V> under[N];
#pragma unroll
        for (int u = 0; u < N; ++u) {
          const Pack<int64_t, 2> place =
              load_pack<2>(places + 2 * (p + u * groups < count ? p + u * groups : p));
          under[u] = zero_pack<V, T>();
          if (a.base && a.num_items > 0)
            under[u] = load_pack<V>(static_cast<const T*>(a.base) + place.at[0] + column);
          row[u] = place.at[1];
        }
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u].set(under[u]);
        const A* b_at = transposed + column;
        for (int j = 0; j < rank; j += VA) {
          Pack<T, VA> factor[N];
#pragma unroll
          for (int u = 0; u < N; ++u)
            factor[u] = load_pack<VA>(factors + (row[u] >= 0 ? row[u] : 0) + j);
#pragma unroll
          for (int i = 0; i < VA; ++i) {
            Sum<A, V> b;
            if constexpr (Staged) {
              b.set(b_at);
              b_at += D;
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
          if (p + u * groups < count)
            sum[u].store_once(static_cast<T*>(a.out) + first * D + int64_t(p + u * groups) * D +
                              column);
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

constexpr int kClientThreads = 128, kClientWarps = kClientThreads / kWarp;
constexpr int kRanks = 8;                     // columns of A and B that a pass takes,
constexpr int kQuad = 4;                      // and those of them that a lane takes,
constexpr int kParts = kRanks / kQuad;        // so that as many sets of lanes share a position
constexpr int kPairs = 2;                     // positions that a lane takes at once,
constexpr int kOwn = kPairs * kQuad;          // and their products
constexpr int64_t kWarpTileBytes = 16 * 288;  // of a warp's tile, at most

template <int N>
constexpr int kLog2 = 1 + kLog2<N / 2>;
template <>
inline constexpr int kLog2<1> = 0;

// Columns of the gradient that a lane takes: registers for their B and its gradient.
template <typename T>
constexpr int kLaneColumns = 32 / int(sizeof(acc_t<T>));
template <typename T>
constexpr int kQuadPack = kWide<T> < kQuad ? kWide<T> : kQuad;
// Elements of shared memory for a lane's sums, with a gap against bank conflicts.
template <typename A>
constexpr int kSums = 32 / int(sizeof(A)) * kQuad + kWide<A>;

// Shared memory of backward_clients: places in bytes.
struct ClientPlan {
  int64_t clients;
  int64_t rows, products, zeros, tiles, warp_bytes, bytes;
  int tile;         // positions of a warp's tile
  int across_bits;  // log2 of the lanes that share a position's columns
  int products_stride;
};

// Four of a pass' columns of a row of A or B, zeros where there are fewer or no row.
template <int VA, typename T>
FEDPEFT_DEVICE void load_quad(const T* from, bool there, int ranks, acc_t<T> (&to)[kQuad]) {
  if constexpr (VA > 1) {
    constexpr int kPack = kQuadPack<T>;
#pragma unroll
    for (int j = 0; j < kQuad; j += kPack) {
      Pack<T, kPack> pack = zero_pack<kPack, T>();
      if (there && j < ranks) pack = load_pack<kPack>(from + j);
#pragma unroll
      for (int i = 0; i < kPack; ++i) to[j + i] = to_acc(pack.at[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kQuad; ++j) to[j] = there && j < ranks ? to_acc(from[j]) : acc_t<T>(0);
  }
}

// The first `ranks` of them, to global memory.
template <int VA, typename T>
FEDPEFT_DEVICE void store_quad(T* to, int ranks, const Sum<acc_t<T>, kQuad>& sum) {
  constexpr int kPack = VA > 1 ? kQuadPack<T> : 1;
#pragma unroll
  for (int j = 0; j < kQuad; j += kPack) {
    Sum<acc_t<T>, kPack> part;
#pragma unroll
    for (int i = 0; i < kPack; ++i) part.at[i] = sum.at[j + i];
    if (j < ranks) part.store_once(to + j);
  }
}

// Adds four accumulators of shared memory.
template <typename A>
FEDPEFT_DEVICE void add_quad(Sum<A, kQuad>& sum, const A* from) {
  constexpr int kPack = kQuadPack<A>;
#pragma unroll
  for (int j = 0; j < kQuad; j += kPack) {
    const Pack<A, kPack> pack = load_pack<kPack>(from + j);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum.at[j + i] += pack.at[i];
  }
}

// A block a client, which reads the gradient once. Each warp takes every so many-th tile of
// positions, of which the next is on its way into shared memory while it works on one: a lane holds
// four columns of B, and of B's gradient, at its columns of the gradient, and takes two positions
// at once. VA: whether rows of A and B are read as vectors, and Wide: those of the gradient.
template <typename T, int VA, bool Wide>
__global__ void __launch_bounds__(kClientThreads, sizeof(T) == 8 ? 3 : 4)
    backward_clients(LoraLookupArgs a, ClientPlan plan, T* out_A, T* out_B) {
  using A = acc_t<T>;
  constexpr int V = kLaneColumns<T>, kPack = kWide<T> < V ? kWide<T> : V;
  constexpr int kCopied = Wide ? kWide<T> : 1;  // elements of the gradient that a copy takes
  FEDPEFT_DYNAMIC_SHARED(shared);
  int* head = reinterpret_cast<int*>(shared);                  // lists, as link_entries makes them
  int* rows = reinterpret_cast<int*>(shared + plan.rows);      // [positions]
  A* products = reinterpret_cast<A*>(shared + plan.products);  // [positions, stride]: B^T g
  T* zeros = reinterpret_cast<T*>(shared + plan.zeros);        // a position's, of padding
  const int positions = int(a.positions), rank = int(a.rank), D = int(a.D);
  const int num_rows = int(a.num_rows);
  int* next = head + num_rows;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int across = 1 << plan.across_bits, place = lane & (across - 1);
  const int quad = (lane >> plan.across_bits & 1) * kQuad;  // first of the lane's ranks
  const int group = lane >> (plan.across_bits + 1), groups = kWarp / kParts >> plan.across_bits;
  const int columns = V << plan.across_bits;  // of a pass
  const int stride = kRanks + columns;        // of a tile: a position's row of A, then its gradient
  const int stored = plan.products_stride;
  // log2 of the lanes that copy a position's columns.
  const int all_bits = plan.across_bits + kLog2<V / kCopied>;
  const int in_row_bits = all_bits < kLog2<kWarp> ? all_bits : kLog2<kWarp>;
  unsigned char* const region = shared + plan.tiles + warp * plan.warp_bytes;
  // A lane keeps its products in an order of its own, the i-th that of position i / 4 ^ mine / 4
  // and rank i % 4 ^ mine % 4, so that it is always the upper half of them that it gives away.
  const int mine = across >= kOwn ? place % kOwn : 0;
  // Of a lane's v-th element of the gradient.
  const auto column_of = [&](int v) {
    return v / kPack * (kPack << plan.across_bits) + place * kPack + v % kPack;
  };
  for (int i = int(threadIdx.x); i < stride; i += kClientThreads) zeros[i] = from_acc<T>(A(0));
  for (int64_t client = blockIdx.x; client < plan.clients; client += gridDim.x) {
    const int64_t c = a.per_client ? client : 0;
    const T* B = static_cast<const T*>(a.B) + c * a.D * a.rank;
    const T* A_rows = static_cast<const T*>(a.A) + c * a.num_rows * a.rank;
    const T* grads = static_cast<const T*>(a.grad) + client * a.positions * a.D;
    const auto tile_at = [&](int buffer) {
      return reinterpret_cast<T*>(region) + buffer * plan.tile * stride;
    };
    const auto count_of = [&](int first) {
      return positions - first < plan.tile ? positions - first : plan.tile;
    };
    const auto copy_grad = [&](T* tile, int first, int base) {
      const int copier = opaque_thread() % kWarp;
      const int in_row = 1 << in_row_bits, down = kWarp >> in_row_bits;
      for (int column = (copier & (in_row - 1)) * kCopied; column < columns;
           column += in_row * kCopied) {
        int p = copier >> in_row_bits;
        T* to = tile + p * stride + kRanks + column;
        if (column < D - base) {
          const T* source = grads + int64_t(first + p) * D + base + column;
#pragma unroll 4
          for (; p < count_of(first); p += down, to += down * stride, source += down * D)
            copy_to_shared<kCopied>(to, source);
        } else {
#pragma unroll 1
          for (; p < count_of(first); p += down, to += down * stride)
            store_pack<kCopied>(to, zero_pack<kCopied, T>());
        }
        if (Wide) break;
      }
    };
    const auto copy_factors = [&](T* tile, int first, int from, int ranks) {
      constexpr int kPieces = kRanks / kWide<T>;
      const int copier = opaque_thread() % kWarp, column = copier % kPieces * kWide<T>;
#pragma unroll 1
      for (int p = copier / kPieces; p < count_of(first); p += kWarp / kPieces) {
        const int row = rows[first + p];
        const T* source = A_rows + uint32_t(row) * uint32_t(rank) + from + column;
        T* to = tile + p * stride + column;
        if (VA > 1 && row >= 0 && column < ranks) {  // where ranks is a multiple of VA
          copy_to_shared<kWide<T>>(to, source);
        } else {
          Pack<T, kWide<T>> pack = zero_pack<kWide<T>, T>();
          if (VA == 1 && row >= 0) {
#pragma unroll
            for (int k = 0; k < kWide<T>; ++k)
              if (column + k < ranks) pack.at[k] = source[k];
          }
          store_pack<kWide<T>>(to, pack);
        }
      }
    };
    const int begin = warp * plan.tile;
    if (begin < positions) copy_grad(tile_at(0), begin, 0);
    for (int r = opaque_thread(); r < num_rows; r += kClientThreads) head[r] = -1;
    for (int p = opaque_thread(); p < positions; p += kClientThreads)
      rows[p] = next[p] = int(row_at(a, client * positions + p));
    __syncthreads();
    for (int from = 0; from < rank; from += kRanks) {
      const int ranks = rank - from < kRanks ? rank - from : kRanks;
      const bool keeps = place < kOwn && from + quad + mine % kQuad < stored;
      for (int base = 0; base < D; base += columns) {
        if (begin < positions) {
          if (from > 0 || base > 0) copy_grad(tile_at(0), begin, base);
          copy_factors(tile_at(0), begin, from, ranks);
        }
        commit_copies();
        A b[V][kQuad], sum[V][kQuad];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int column = base + column_of(v);
          A own[kQuad];
          load_quad<VA>(B + int64_t(column) * rank + from + quad, column < D, ranks - quad, own);
#pragma unroll
          for (int j = 0; j < kQuad; ++j) {
            const A swapped = mine & 1 ? own[j ^ 1] : own[j];
            const A other = mine & 1 ? own[j ^ 3] : own[j ^ 2];
            b[v][j] = mine & 2 ? other : swapped;
            sum[v][j] = 0;
          }
        }
        // By the warp with the fewest tiles, while the others begin.
        if (from == 0 && base == 0 && warp == kClientWarps - 1)
          link_entries(head, num_rows, next, positions, 0, 1);
        int buffer = 0;
#pragma unroll 1
        for (int first = begin; first < positions; first += kClientWarps * plan.tile) {
          const int following = first + kClientWarps * plan.tile;
          __syncwarp();  // the readers of the tile before
          if (following < positions) {
            copy_grad(tile_at(buffer ^ 1), following, base);
            copy_factors(tile_at(buffer ^ 1), following, from, ranks);
          }
          commit_copies();
          wait_for_copies<1>();
          __syncwarp();
          const T* tile = tile_at(buffer);
          buffer ^= 1;
          const int count = count_of(first);
          unsigned items = __ballot_sync(
              kFullMask, lane < count && rows[first + (lane < count ? lane : 0)] >= 0);
          // The first position of the lane, and the second, the other of the two.
          const int own = kPairs * group + mine / kQuad;
          A* kept = products + (first + own) * stored + from + quad + mine % kQuad;
#pragma unroll 1
          for (int left = count; left > 0; left -= kPairs * groups) {
            A product[kOwn];
#pragma unroll
            for (int u = 0; u < kPairs; ++u) {
              const T* from_tile = items >> (own ^ u) & 1 ? tile + (own ^ u) * stride : zeros;
              Pack<T, kPack> g[V / kPack];
              A factor[kQuad];
              load_quad<kWide<T>>(from_tile + quad, true, kQuad, factor);
#pragma unroll
              for (int k = 0; k < V / kPack; ++k)
                g[k] = load_pack<kPack>(from_tile + kRanks + column_of(k * kPack));
#pragma unroll
              for (int j = 0; j < kQuad; ++j) product[u * kQuad + j] = 0;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                const A value = to_acc(g[v / kPack].at[v % kPack]);
#pragma unroll
                for (int j = 0; j < kQuad; ++j) {
                  product[u * kQuad + j] += value * b[v][j];
                  sum[v][j] += value * factor[j];
                }
              }
            }
            if (across >= kOwn) {
#pragma unroll
              for (int bit = kOwn / 2; bit > 0; bit /= 2) {
#pragma unroll
                for (int j = 0; j < bit; ++j)
                  product[j] += __shfl_xor_sync(kFullMask, product[j + bit], bit);
              }
              if (across > kOwn) product[0] += __shfl_xor_sync(kFullMask, product[0], kOwn);
              if (keeps && items >> own & 1) *kept = base == 0 ? product[0] : *kept + product[0];
            } else {
              for (int bit = across / 2; bit > 0; bit /= 2) {
#pragma unroll
                for (int j = 0; j < kOwn; ++j)
                  product[j] += __shfl_xor_sync(kFullMask, product[j], bit);
              }
#pragma unroll
              for (int j = 0; j < kOwn; ++j) {
                if (keeps && place == 0 && items >> (own + j / kQuad) & 1)
                  kept[j / kQuad * stored + j % kQuad] = product[j];
              }
            }
            tile += kPairs * groups * stride;
            kept += kPairs * groups * stored;
            items = kPairs * groups < kWarp ? items >> (kPairs * groups % kWarp) : 0;
          }
        }
        // The groups' sums, in order, where a warp's tiles were.
        __syncwarp();
        A* const parts = reinterpret_cast<A*>(region) + lane * kSums<A>;
#pragma unroll
        for (int v = 0; v < V; ++v) {
#pragma unroll
          for (int j = 0; j < kQuad; j += kQuadPack<A>) {
            Pack<A, kQuadPack<A>> pack;
#pragma unroll
            for (int k = 0; k < kQuadPack<A>; ++k) pack.at[k] = sum[v][j + k];
            store_pack<kQuadPack<A>>(parts + v * kQuad + j, pack);
          }
        }
        __syncthreads();
        for (int o = opaque_thread(); o < columns * kParts; o += kClientThreads) {
          const int d = o / kParts, first_rank = o % kParts * kQuad;
          const int from_lane = o % kParts * across + (d / kPack & (across - 1));
          const int v = (d >> plan.across_bits) / kPack * kPack + d % kPack;
          Sum<A, kQuad> total;
          total.clear();
#pragma unroll
          for (int w = 0; w < kClientWarps; ++w) {
            const A* of = reinterpret_cast<const A*>(shared + plan.tiles + w * plan.warp_bytes) +
                          from_lane * kSums<A> + v * kQuad;
#pragma unroll 1
            for (int g = 0; g < groups; ++g)
              add_quad(total, of + (g * kParts << plan.across_bits) * kSums<A>);
          }
          if (base + d < D)
            store_quad<VA>(out_B + (client * D + base + d) * rank + from + first_rank,
                           ranks - first_rank, total);
        }
        if (from + kRanks < rank || base + columns < D) __syncthreads();
      }
    }
    // The rows of A, four columns a thread.
    const int thread = opaque_thread(), quads = stored / kQuad, in_row = lanes_for(quads);
    for (int q = thread & (in_row - 1); q < quads; q += in_row) {
      int r = thread / in_row;
      const int down = kClientThreads / in_row;
      const A* of = products + q * kQuad;
      T* to = out_A + (client * num_rows + r) * rank + q * kQuad;
#pragma unroll 1
      for (; r < num_rows; r += down, to += down * rank) {
        Sum<A, kQuad> total;
        total.clear();
#pragma unroll 1
        for (int p = head[r]; p >= 0; p = next[p]) add_quad(total, of + p * stored);
        store_quad<VA>(to, rank - q * kQuad, total);
      }
    }
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
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          int64_t span = span_for(total, 4 * (kThreads / lanes_for(a.D / V)));
          if (span > kMostPositions) span = kMostPositions;
          if (span > a.positions) span = a.positions;
          span += span % 2;  // B stands behind their places, at a multiple of 32 bytes
          const int64_t places = span * kPlaceBytes;
          const bool staged = bytes <= kStagedBytes && places + bytes <= device.shared_bytes;
          const int64_t grid = clients * ((a.positions + span - 1) / span);
          with_width<T>(
              a.rank,
              [&](auto factors) {
                constexpr int VA = decltype(factors)::value;
                launch(staged ? forward<T, V, VA, true> : forward<T, V, VA, false>, grid, kThreads,
                       places + (staged ? bytes : 0), stream, a, clients, span);
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

// A block's shared memory has to hold a client's lists and products, and clients to be as many as
// make up for blocks that are few a multiprocessor then, or that each write many rows.
bool lora_lookup_backward_clients(const LoraLookupArgs& a, DType dtype, int64_t clients,
                                  void* out_A, void* out_B, Stream stream) {
  const Limits device = limits();
  const bool long_work = a.positions > 256 || a.num_rows > 4096;
  if (a.D == 0 || (long_work && 2 * clients < device.multiprocessors)) return false;
  bool done = false;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const auto round = [](int64_t bytes) { return (bytes + 31) / 32 * 32; };
    ClientPlan plan{};
    plan.clients = clients;
    int across = lanes_for((a.D + kLaneColumns<T> - 1) / kLaneColumns<T>);
    if (across > kWarp / kParts) across = kWarp / kParts;
    while (1 << plan.across_bits < across) ++plan.across_bits;
    plan.products_stride = int((a.rank + kQuad - 1) / kQuad * kQuad);
    plan.rows = round((a.num_rows + a.positions) * int64_t(sizeof(int)));
    plan.products = plan.rows + round(a.positions * int64_t(sizeof(int)));
    plan.zeros = plan.products + round(a.positions * plan.products_stride * int64_t(sizeof(A)));
    const int64_t row_bytes = (kRanks + across * kLaneColumns<T>)*int64_t(sizeof(T));
    plan.tiles = plan.zeros + round(row_bytes);
    // A tile is whole turns of a warp, at most a bit a lane; smaller ones where there are few
    // positions, or where four blocks would not fit on a multiprocessor.
    const int turn = kPairs * kWarp / kParts / across;
    const int64_t turns = (a.positions + kClientWarps * turn - 1) / (kClientWarps * turn);
    for (int64_t most = kWarpTileBytes;; most /= 2) {
      int64_t tile = most / (turn * row_bytes);
      if (tile > turns) tile = turns;
      if (tile > kWarp / turn) tile = kWarp / turn;
      if (tile < 1) tile = 1;
      plan.tile = int(tile) * turn;
      const int64_t sums = kWarp * kSums<A> * int64_t(sizeof(A)), tiles = 2 * plan.tile * row_bytes;
      plan.warp_bytes = round(tiles > sums ? tiles : sums);
      plan.bytes = plan.tiles + kClientWarps * plan.warp_bytes;
      if (most < kWarpTileBytes || plan.bytes <= shared_of_each(device, 4)) break;
    }
    if (plan.bytes > device.shared_bytes) return;
    with_width<T>(
        a.rank,
        [&](auto factors) {
          constexpr int VA = decltype(factors)::value;
          const bool wide = a.D % kWide<T> == 0 && aligned16(a.grad);
          launch(wide ? backward_clients<T, VA, true> : backward_clients<T, VA, false>, clients,
                 kClientThreads, plan.bytes, stream, a, plan, static_cast<T*>(out_A),
                 static_cast<T*>(out_B));
        },
        a.A, a.B, out_A, out_B);
    done = true;
  });
  return done;
}

void lora_lookup_backward(const LoraLookupArgs& a, DType dtype, const ScatterPlan& plan,
                          const PositionSum& shape, void* out_A, void* out_B, Stream stream) {
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
