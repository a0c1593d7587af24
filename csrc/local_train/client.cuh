// A client on the GPU: its memory, the rows that its draws read, and what all kinds of steps do
// with them. For local_train_cuda.cu.
#pragma once

#include "common/block.cuh"
#include "common/hash.h"
#include "common/logistic.cuh"
#include "common/negatives.cuh"
#include "common/scatter.cuh"
#include "local_train/local_train_cuda.h"

namespace fedpeft::gpu {

// Results depend on the number of threads, by the order of sums: it is the same for every client.
constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Hands out pieces of shared memory while there is room, then of memory. Without memory it only
// measures.
struct Arena {
  char *shared, *memory;
  int64_t shared_size, shared_used, memory_used;

  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    const int64_t bytes = (count * int64_t(sizeof(T)) + 15) / 16 * 16;
    if (shared_used + bytes <= shared_size) {
      shared_used += bytes;
      return shared ? reinterpret_cast<T*>(shared + shared_used - bytes) : nullptr;
    }
    memory_used += bytes;
    return memory ? reinterpret_cast<T*>(memory + memory_used - bytes) : nullptr;
  }
};

// Parameters [rows, width] beside their optimizer state.
template <typename T>
struct Table {
  const T* source;  // where they start from
  int width;
  T *p, *m, *v;  // m, v: Adam
  T* start;      // with a proximal term
  T* dots;       // [rows]: products with the shared vector; while stepping, whether a row moved

  __host__ __device__ void lay_out(Arena& arena, const LocalTrainArgs& a, const void* from,
                                   int64_t rows, int64_t width_, bool travels = true) {
    source = static_cast<const T*>(from);
    width = int(width_);
    dots = arena.take<T>(rows);
    p = arena.take<T>(rows * width);
    m = a.adam ? arena.take<T>(rows * width) : nullptr;
    v = a.adam ? arena.take<T>(rows * width) : nullptr;
    start = travels && a.prox > 0 ? arena.take<T>(rows * width) : nullptr;
  }
};

// The rows of a table that a client's draws read, and a step's sums over their entries. Entry
// (draw, j) is the j-th row that the draw reads.
template <typename T>
struct Touched {
  int64_t table_rows;
  int reads, capacity, map_size, count;
  bool direct;                    // cell of a row: the row itself, else by hashing
  int64_t* keys;                  // [map_size]: row of a cell, -1: free; null where direct
  int *first, *slot_of, *at;      // [map_size]: first entry; [map_size]; [draws, reads]: slots
  int64_t* rows;                  // [capacity]: row of a slot
  int *head, *next;               // [capacity], [batch, reads]: entries of each slot in order
  T *alpha, *alpha_of, *beta_of;  // [capacity]; SENet: of entries [batch, reads]
  T* beta;  // [capacity]: SENet: sum of beta_of; Graph: what the own items read, times their scale

  __host__ __device__ void lay_out(Arena& arena, int64_t rows_, int64_t reads_, int64_t draws,
                                   int64_t batch, bool gated, bool graph = false) {
    table_rows = rows_;
    reads = int(reads_);
    const int64_t entries = draws * reads_;
    capacity = int(entries < rows_ ? entries : rows_);
    int64_t size = 16;
    while (size < 2 * int64_t(capacity)) size *= 2;
    direct = rows_ <= size;
    map_size = int(direct ? rows_ : size);
    alpha = arena.take<T>(capacity);
    beta = gated || graph ? arena.take<T>(capacity) : nullptr;
    head = arena.take<int>(capacity);
    next = arena.take<int>(batch * reads_);
    alpha_of = gated ? arena.take<T>(batch * reads_) : nullptr;
    beta_of = gated ? arena.take<T>(batch * reads_) : nullptr;
    at = arena.take<int>(entries);
  }

  // What only the start and the upload use.
  __host__ __device__ void lay_out_map(Arena& arena) {
    rows = arena.take<int64_t>(capacity);
    slot_of = arena.take<int>(map_size);
    first = arena.take<int>(map_size);
    keys = direct ? nullptr : arena.take<int64_t>(map_size);
  }
};

// Bias corrections and rates of a step.
template <typename T>
struct Rates {
  double power1, power2;  // beta1 and beta2 to the number of the step
  T beta2, rest1, rest2, step_size, denominator_scale, eps, lr, prox;
};

// Whether there is a SENet, which goes without the graph layer.
template <bool Graph>
__host__ __device__ inline bool has_gates(const LocalTrainArgs& a) {
  return !Graph && a.buckets && a.w1;
}

// What multiplies the sum of an item's buckets, without SENet.
template <typename T>
FEDPEFT_DEVICE T row_scale(const LocalTrainArgs& a) {
  return a.mean ? T(1) / T(a.H) : T(1);
}

// A client's memory. Held in shared memory, so that its pointers take no registers.
template <typename T>
struct Workspace {
  int size, draws;  // positives; with the negatives of every epoch
  int64_t client, first;
  int place;  // in the call
  Touched<T> items, codewords, buckets;
  Table<T> user, table, A, B, codebooks, hashed, senet;
  T *user_grad, *q, *mixed, *partial;  // [D], [r]: B^T u, [r]: sum of alpha a, column_sums
  // Graph, [D]: sum of the own items' base rows, the vector that scores, what its gradient gives to
  // an own item; [r]: sum of beta a, B^T of that gradient.
  T *base_sum, *seen, *own_grad, *near, *pull;
  T *scores, *coefficients;                                       // [batch]
  T *means, *senet_grad, *hidden, *hidden_grad, *gates, *slopes;  // SENet
  int64_t* item_of;                                               // [draws]
  uint64_t* keys;                                                 // [size], with minibatches
  int* order;                                                     // [size]
  Rates<T> rates;

  // The client of n items. In the order of use in a step: the first pieces get shared memory.
  template <bool Graph>
  __host__ __device__ void lay_out(Arena& arena, const LocalTrainArgs& a, int64_t n) {
    const int64_t all = n * (1 + a.epochs);
    const int64_t batch = 2 * (a.batch > 0 && a.batch < n ? a.batch : n);
    const int64_t weights = 2 * a.S * a.H + a.S + a.H;
    const bool gated = has_gates<Graph>(a);
    size = int(n);
    draws = int(all);
    int64_t widest = a.D;
    if (a.A && a.rank > widest) widest = a.rank;
    if (gated && weights > widest) widest = weights;
    const int64_t narrow = column_sums_scratch(kWarp, kThreads);
    int64_t wide = column_sums_scratch(widest, kThreads);
    const int vector = a.base && a.D % kWide<T> == 0 ? kWide<T> : 1;
    if (const int64_t of_base = column_sums_scratch(a.D, kThreads, vector); of_base > wide)
      wide = of_base;
    user.lay_out(arena, a, a.user, 1, a.D, false);
    user_grad = arena.take<T>(a.D);
    if (Graph) {
      base_sum = arena.take<T>(a.D);
      seen = arena.take<T>(a.D);
      own_grad = arena.take<T>(a.D);
    }
    partial = arena.take<T>(wide > narrow ? wide : narrow);
    scores = arena.take<T>(batch);
    coefficients = arena.take<T>(batch);
    if (a.table || a.A) items.lay_out(arena, a.num_items, 1, all, batch, false, Graph);
    if (a.codebooks) codewords.lay_out(arena, a.L * a.K, a.L, all, batch, false, Graph);
    if (a.buckets) buckets.lay_out(arena, a.M, a.H, all, batch, gated, Graph);
    if (a.A) {
      if (Graph) {
        near = arena.take<T>(a.rank);
        pull = arena.take<T>(a.rank);
      }
      q = arena.take<T>(a.rank);
      mixed = arena.take<T>(a.rank);
      B.lay_out(arena, a, a.B, a.D, a.rank);
      A.lay_out(arena, a, a.A, items.capacity, a.rank);
    }
    if (a.codebooks) codebooks.lay_out(arena, a, a.codebooks, codewords.capacity, a.D);
    if (a.buckets) hashed.lay_out(arena, a, a.buckets, buckets.capacity, a.D);
    if (gated) {
      senet.lay_out(arena, a, nullptr, 1, weights);
      means = arena.take<T>(buckets.capacity);
      senet_grad = arena.take<T>(weights);
      gates = arena.take<T>(batch * a.H);
      slopes = arena.take<T>(batch * a.H);
      hidden = arena.take<T>(batch * a.S);
      hidden_grad = arena.take<T>(batch * a.S);
    }
    if (a.table) table.lay_out(arena, a, a.table, items.capacity, a.D);
    lay_out_draws(arena, a);
  }

  // What steps use least: the draws and their order, and the maps of rows.
  __host__ __device__ void lay_out_draws(Arena& arena, const LocalTrainArgs& a) {
    item_of = arena.take<int64_t>(draws);
    order = a.batch > 0 ? arena.take<int>(size) : nullptr;
    keys = a.batch > 0 ? arena.take<uint64_t>(size) : nullptr;
    if (a.table || a.A) items.lay_out_map(arena);
    if (a.codebooks) codewords.lay_out_map(arena);
    if (a.buckets) buckets.lay_out_map(arena);
  }
};

FEDPEFT_DEVICE void report(int64_t* lowest, int64_t position) {
  atomicMin(reinterpret_cast<long long*>(lowest), static_cast<long long>(position));
}

// Every thread calls f(i) for its share of [0, count).
template <typename F>
FEDPEFT_DEVICE void for_all(int64_t count, const F& f) {
  for (int64_t i = threadIdx.x; i < count; i += kThreads) f(i);
}

// As for_all, store(i, value_of(i)); the values of several i are under way together.
template <typename ValueOf, typename Store>
FEDPEFT_DEVICE void for_several(int64_t count, const ValueOf& value_of, const Store& store) {
  constexpr int N = 4;
#pragma unroll 1
  for (int64_t first = threadIdx.x; first < count; first += N * kThreads) {
    decltype(value_of(first)) value[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int64_t i = first + u * kThreads;
      value[u] = value_of(i < count ? i : first);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (first + u * kThreads < count) store(first + u * kThreads, value[u]);
    }
  }
}

// f(i, sum over columns of term(i, column)) for i in [0, count), by one lane of the group that
// takes it. N rows of a group are under way together; where they are several, the last row's terms
// stand for those behind it, and so must do nothing else.
template <typename A, int N = 4, typename Term, typename F>
FEDPEFT_DEVICE void row_sums(int width, int count, const Term& term, const F& f) {
  const int lanes = lanes_for(width), groups = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
#pragma unroll 1
  for (int begin = 0; begin < count; begin += N * groups) {
    A sum[N] = {};
    int row[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      row[u] = begin + u * groups + group;
      if (N > 1 && row[u] >= count) row[u] = count - 1;
    }
    if (N > 1 || row[0] < count) {
#pragma unroll 1
      for (int column = lane; column < width; column += lanes) {
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u] += term(row[u], column);
      }
    }
    group_sums(sum, lanes);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (lane == 0 && begin + u * groups + group < count) f(row[u], sum[u]);
    }
  }
}

// Calls f with the number of elements that an access to `rows` of so many may take, as a constant.
template <typename T, typename F>
FEDPEFT_DEVICE void with_vectors(const T* rows, int width, const F& f) {
  if (width % kWide<T> == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0) {
    f(std::integral_constant<int, kWide<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

template <typename T>
FEDPEFT_DEVICE void dot_rows(const Table<T>& t, int count, const T* x) {
  const T* p = t.p;
  T* dots = t.dots;
  const int width = t.width;
  row_sums<T>(
      width, count, [&](int s, int d) { return p[int64_t(s) * width + d] * x[d]; },
      [&](int s, T sum) { dots[s] = sum; });
}

// Finds the rows that the draws read. row_of(n, j): the j-th row of draw n.
template <typename T, typename RowOf>
FEDPEFT_DEVICE void resolve(Touched<T>& t, int draws, int* counts, const RowOf& row_of) {
  const int entries = draws * t.reads;
  for_all(t.map_size, [&](int64_t i) {
    t.first[i] = INT32_MAX;
    if (!t.direct) t.keys[i] = -1;
  });
  __syncthreads();
  for_all(entries, [&](int64_t e) {
    const int n = int(e) / t.reads;
    const int64_t row = row_of(n, int(e) - n * t.reads);
    int cell = int(row);
    if (!t.direct) {
      const int mask = t.map_size - 1;
      cell = int(uint64_t(row) * 0x9E3779B97F4A7C15u >> 32) & mask;
      for (;; cell = (cell + 1) & mask) {
        const long long held = atomicCAS(reinterpret_cast<unsigned long long*>(t.keys + cell),
                                         ~0ull, static_cast<unsigned long long>(row));
        if (held == -1 || held == row) break;
      }
    }
    t.at[e] = cell;
    atomicMin(t.first + cell, int(e));
  });
  __syncthreads();
  int found = 0;
  for (int begin = 0; begin < entries; begin += kThreads) {
    const int e = begin + int(threadIdx.x);
    const int cell = e < entries ? t.at[e] : 0;
    const bool opens = e < entries && t.first[cell] == e;
    int all = 0;
    const int slot = found + block_rank(opens, counts, &all);
    if (opens) {
      t.slot_of[cell] = slot;
      t.rows[slot] = t.direct ? cell : t.keys[cell];
    }
    found += all;
  }
  __syncthreads();
  for_all(entries, [&](int64_t e) { t.at[e] = t.slot_of[t.at[e]]; });
  if (threadIdx.x == 0) t.count = found;
  __syncthreads();
}

// Parameters and their state as they start: row s of `count` is `source`'s row_of(s).
template <typename T, typename RowOf>
FEDPEFT_DEVICE void load(const Table<T>& t, int count, const RowOf& row_of) {
  const int width = t.width;
  for_several(
      int64_t(count) * width,
      [&](int64_t i) {
        const int64_t s = divide(i, width);
        return t.source[row_of(int(s)) * width + (i - s * width)];
      },
      [&](int64_t i, T value) {
        t.p[i] = value;
        if (t.start) t.start[i] = value;
        if (t.m) t.m[i] = t.v[i] = 0;
      });
}

// Parameters of V elements, their state and where they started.
template <typename T, int V = 1>
struct Element {
  Pack<T, V> p, m, v, start;

  FEDPEFT_DEVICE void load(const Table<T>& t, int64_t i) {
    p = load_pack<V>(t.p + i);
    m = v = start = zero_pack<V, T>();
    if (t.m) {
      m = load_pack<V>(t.m + i);
      v = load_pack<V>(t.v + i);
    }
    if (t.start) start = load_pack<V>(t.start + i);
  }
  // One step of the elements from i on, whose gradient is g without the proximal term.
  FEDPEFT_DEVICE void step(const Table<T>& t, const Rates<T>& rates, int64_t i, Pack<T, V> g) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (t.start) g.at[k] += rates.prox * (p.at[k] - start.at[k]);
      if (t.m) {
        m.at[k] += rates.rest1 * (g.at[k] - m.at[k]);
        v.at[k] = rates.beta2 * v.at[k] + rates.rest2 * g.at[k] * g.at[k];
        p.at[k] -=
            rates.step_size * (m.at[k] / (T(sqrt(v.at[k])) * rates.denominator_scale + rates.eps));
      } else {
        p.at[k] -= rates.lr * g.at[k];
      }
    }
    if (t.m) {
      store_whole_pack<V, true>(t.m + i, m);
      store_whole_pack<V, true>(t.v + i, v);
    }
    store_whole_pack<V, true>(t.p + i, p);
  }
};
template <typename T>
FEDPEFT_DEVICE void update(const Table<T>& t, const Rates<T>& rates, int64_t i, T g) {
  Element<T> element;
  element.load(t, i);
  element.step(t, rates, i, {{g}});
}
// The same of `count` elements; gradient_of(i, parameter). Several of a thread are under way
// together.
template <typename T, typename GradientOf>
FEDPEFT_DEVICE void update_all(const Table<T>& t, const Rates<T>& rates, int64_t count,
                               const GradientOf& gradient_of) {
  constexpr int N = 2;
#pragma unroll 1
  for (int64_t first = opaque_thread(); first < count; first += N * kThreads) {
    Element<T> element[N];
    T g[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int64_t i = first + u * kThreads < count ? first + u * kThreads : first;
      element[u].load(t, i);
      g[u] = gradient_of(i, element[u].p.at[0]);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (first + u * kThreads < count) element[u].step(t, rates, first + u * kThreads, {{g[u]}});
    }
  }
}

// With a proximal term: dots[s] = whether row s is away from its start, and so has a gradient.
template <typename T>
FEDPEFT_DEVICE void find_moved(const Table<T>& t, int count) {
  const int width = t.width;
  row_sums<int>(
      width, count,
      [&](int s, int d) {
        return int(t.p[int64_t(s) * width + d] != t.start[int64_t(s) * width + d]);
      },
      [&](int s, int moved) { t.dots[s] = T(moved != 0); });
  __syncthreads();
}

// Rows with gradients alpha[s] x + beta[s] / width: store(column, sum of alpha[s] p[s]) of the rows
// as they were, and the optimizer's step. `x_moves`: x is not all zero.
template <typename T, typename Store>
FEDPEFT_DEVICE void step_rows(const Table<T>& t, int count, const T* alpha, const T* beta,
                              const T* x, bool x_moves, T l2, const Workspace<T>& w,
                              const Store& store) {
  const int width = t.width;
  const T share = T(1) / T(width);
  if (t.start) find_moved(t, count);
  column_sums<1>(
      width, count, w.partial,
      [&](int s, int d) {
        const int64_t i = int64_t(s) * width + d;
        const T p = t.p[i], factor = alpha[s], shift = beta ? beta[s] : T(0);
        const bool pulled =
            (x_moves && factor != T(0)) || shift != T(0) || (t.start && t.dots[s] != T(0));
        T g = factor * x[d];
        if (pulled) g += l2 * p;
        if (beta) g += shift * share;
        update(t, w.rates, i, g);
        return factor * p;
      },
      store);
}

// Lists of each slot's entries of a batch, in order, in two calls with a barrier between.
// `disjoint`: the j-th rows of draws are never their i-th rows.
template <typename T, typename DrawOf>
FEDPEFT_DEVICE void start_lists(const Touched<T>& t, int batch, const DrawOf& draw_of) {
  for_all(t.count, [&](int64_t s) { t.head[s] = -1; });
  for_all(int64_t(batch) * t.reads, [&](int64_t e) {
    const int k = int(e) / t.reads;
    t.next[e] = t.at[int64_t(draw_of(k)) * t.reads + (int(e) - k * t.reads)];
  });
}
template <typename T>
FEDPEFT_DEVICE void link_lists(const Touched<T>& t, int batch, bool disjoint) {
  link_slots(t.head, t.count, t.next, batch, t.reads, disjoint, int(threadIdx.x) / kWarp, kWarps);
}

// alpha (and beta) of every slot: the sum of its entries' in the order of the batch. The mean's
// scale multiplies the sum, so that what cancels does so exactly.
template <typename T>
FEDPEFT_DEVICE void sum_lists(const Touched<T>& t, const T* coefficients, T scale) {
  for_all(t.count, [&](int64_t s) {
    T alpha = 0, beta = 0;
    for (int e = t.head[s]; e >= 0; e = t.next[e]) {
      alpha += t.alpha_of ? t.alpha_of[e] : coefficients[e / t.reads];
      if (t.beta_of) beta += t.beta_of[e];
    }
    t.alpha[s] = scale * alpha;
    if (t.beta_of) t.beta[s] = beta;
  });
}

// [table_rows, width] of a client: the change of the touched rows, zero elsewhere.
template <typename T>
FEDPEFT_DEVICE void write_whole(const Touched<T>& t, const Table<T>& table, T* out) {
  const int width = table.width;
  if (t.direct) {
    for_several(
        t.table_rows * width,
        [&](int64_t i) {
          const int64_t row = divide(i, width);
          return t.first[row] == INT32_MAX
                     ? T(0)
                     : table.p[int64_t(t.slot_of[row]) * width + (i - row * width)] -
                           table.source[i];
        },
        [&](int64_t i, T change) { out[i] = change; });
    return;
  }
  for_all(t.table_rows * width, [&](int64_t i) { out[i] = 0; });
  __syncthreads();
  const auto place = [&](int64_t i) {
    const int64_t s = divide(i, width);
    return t.rows[s] * width + (i - s * width);
  };
  for_several(
      int64_t(t.count) * width, [&](int64_t i) { return table.p[i] - table.source[place(i)]; },
      [&](int64_t i, T change) { out[place(i)] = change; });
}

// [R, width] of a client: the change of the touched rows, zero behind.
template <typename T>
FEDPEFT_DEVICE void write_rows(const Touched<T>& t, const Table<T>& table, int64_t R, T* out) {
  const int width = table.width;
  const int64_t there = int64_t(t.count) * width;
  for_several(
      there,
      [&](int64_t i) {
        const int64_t s = divide(i, width);
        return table.p[i] - table.source[t.rows[s] * width + (i - s * width)];
      },
      [&](int64_t i, T change) { out[i] = change; });
  for_all(R * width - there, [&](int64_t i) { out[there + i] = 0; });
}

// Ascending by (key, place): a bitonic sorter whose comparators all point the same way, so that
// what lies past the end needs no place.
template <typename T>
FEDPEFT_DEVICE void sort_keys(const Workspace<T>& w) {
  const int n = w.size;
  for (int64_t run = 2; run < 2 * int64_t(n); run *= 2) {
    for (int64_t gap = run / 2; gap > 0; gap /= 2) {
      for_all(n, [&](int64_t i) {
        // The first pass of a run compares mirrored places.
        const int64_t other = gap == run / 2 ? (i ^ (run - 1)) : (i ^ gap);
        if (other <= i || other >= n) return;
        const uint64_t x = w.keys[i], y = w.keys[other];
        const int from_x = w.order[i], from_y = w.order[other];
        if (x < y || (x == y && from_x < from_y)) return;
        w.keys[i] = y;
        w.keys[other] = x;
        w.order[i] = from_y;
        w.order[other] = from_x;
      });
      __syncthreads();
    }
  }
}

// The order of the client's positives in an epoch.
template <typename T>
FEDPEFT_DEVICE void shuffle(const LocalTrainArgs& a, const Workspace<T>& w, int epoch) {
  for_all(w.size, [&](int64_t p) {
    const PhiloxBlock block =
        philox(uint32_t(p), uint32_t(w.client), a.round,
               philox_stream(Purpose::batch_order, 0, uint32_t(epoch)), a.seed);
    w.keys[p] = block.low64() >> 1;
    w.order[p] = int(p);
  });
  __syncthreads();
  sort_keys(w);
}

// The draw of score k of a step on positives from `first` on in an epoch's order: each positive is
// beside its negative, so that what cancels in a pair cancels exactly.
template <typename T>
FEDPEFT_DEVICE int draw_of(const Workspace<T>& w, int epoch, int first, int k) {
  const int positive = w.order ? w.order[first + k / 2] : first + k / 2;
  return k % 2 ? (1 + epoch) * w.size + positive : positive;
}

// Before a step, by one thread: its bias corrections.
template <typename T>
FEDPEFT_DEVICE void advance(const LocalTrainArgs& a, Rates<T>& rates) {
  rates.power1 *= a.beta1;
  rates.power2 *= a.beta2;
  rates.step_size = T(a.lr / (1 - rates.power1));
  rates.denominator_scale = T(1 / sqrt(1 - rates.power2));
}

// The loss's gradient over scores [2 pairs], of a step of `all` pairs; the sum of the losses of the
// calling thread's pairs.
template <typename T>
FEDPEFT_DEVICE double slopes(const LocalTrainArgs& a, const T* scores, T* coefficients, int pairs,
                             int all) {
  double loss = 0;
  const T share = T(a.bpr ? 1.0 : 0.5) / T(all);
  for_all(pairs, [&](int64_t i) {
    const T positive = scores[2 * i], negative = scores[2 * i + 1];
    if (a.bpr) {
      const T difference = negative - positive, g = share * sigmoid(difference);
      loss += double(softplus(difference));
      coefficients[2 * i] = -g;
      coefficients[2 * i + 1] = g;
    } else {
      loss += double(softplus(-positive)) + double(softplus(negative));
      coefficients[2 * i] = -(share * sigmoid(-positive));
      coefficients[2 * i + 1] = share * sigmoid(negative);
    }
  });
  return loss;
}

}  // namespace fedpeft::gpu
