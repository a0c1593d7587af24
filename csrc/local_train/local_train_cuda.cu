// CUDA kernel of local_train: a block trains a client from its first draw to its upload, then takes
// the next.
//
// As on the CPU every gradient of a touched row is a number times a vector that all rows share, so
// that a step is: dot products of rows with shared vectors, scores, their gradients, one number a
// row (alpha, the sum of its entries in the order of the batch), and one pass that adds rows to the
// user's gradient and takes the optimizer's step. All draws of all epochs are known before the
// first step, so rows are found once: an atomic minimum finds each row's first entry, whatever the
// order of the threads, and a prefix sum numbers them. What the steps use most is in shared memory,
// the rest in the block's part of `scratch`; where it lies changes no result.
//
// With FedPerGNN's layer, which is compiled apart (Graph), what scores is (user + sum of the own
// items' vectors / sqrt(n)) / 2, so that an own item's rows also get a number times the gradient of
// that vector, which has to be whole before a row is stepped: a step has two more passes over rows.
#include "common/block.cuh"
#include "common/hash.h"
#include "common/logistic.cuh"
#include "common/negatives.cuh"
#include "common/scatter.cuh"
#include "local_train/local_train_cuda.h"

namespace fedpeft::gpu {
namespace {

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
    const int64_t wide = column_sums_scratch(widest, kThreads);
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
    item_of = arena.take<int64_t>(all);
    order = a.batch > 0 ? arena.take<int>(n) : nullptr;
    keys = a.batch > 0 ? arena.take<uint64_t>(n) : nullptr;
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

// f(i, sum over columns of term(i, column)) for i in [0, count), by one lane of the group that
// takes it.
template <typename A, typename Term, typename F>
FEDPEFT_DEVICE void row_sums(int width, int count, const Term& term, const F& f) {
  const int lanes = lanes_for(width), groups = kThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  for (int begin = 0; begin < count; begin += groups) {
    const int i = begin + group;
    A sum = 0;
    if (i < count) {
      for (int column = lane; column < width; column += lanes) sum += term(i, column);
    }
    sum = group_sum(sum, lanes);
    if (i < count && lane == 0) f(i, sum);
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
  for_all(int64_t(count) * width, [&](int64_t i) {
    const int64_t s = divide(i, width);
    const T value = t.source[row_of(int(s)) * width + (i - s * width)];
    t.p[i] = value;
    if (t.start) t.start[i] = value;
    if (t.m) t.m[i] = t.v[i] = 0;
  });
}

// One step of element i, whose gradient is g without the proximal term.
template <typename T>
FEDPEFT_DEVICE void update(const Table<T>& t, const Rates<T>& rates, int64_t i, T g) {
  const T p = t.p[i];
  if (t.start) g += rates.prox * (p - t.start[i]);
  if (t.m) {
    const T m = t.m[i] + rates.rest1 * (g - t.m[i]);
    const T v = rates.beta2 * t.v[i] + rates.rest2 * g * g;
    t.m[i] = m;
    t.v[i] = v;
    t.p[i] = p - rates.step_size * (m / (T(sqrt(v)) * rates.denominator_scale + rates.eps));
  } else {
    t.p[i] = p - rates.lr * g;
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
  column_sums(
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
  const int warp = int(threadIdx.x) / kWarp;
  if (disjoint) {
    for (int j = warp; j < t.reads; j += kWarps) link_entries(t.head, t.next, batch, j, t.reads);
  } else if (warp == 0) {
    link_entries(t.head, t.next, batch * t.reads, 0, 1);
  }
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
    for_all(t.table_rows * width, [&](int64_t i) {
      const int64_t row = divide(i, width);
      out[i] = t.first[row] == INT32_MAX
                   ? T(0)
                   : table.p[int64_t(t.slot_of[row]) * width + (i - row * width)] - table.source[i];
    });
    return;
  }
  for_all(t.table_rows * width, [&](int64_t i) { out[i] = 0; });
  __syncthreads();
  for_all(int64_t(t.count) * width, [&](int64_t i) {
    const int64_t s = divide(i, width), to = t.rows[s] * width + (i - s * width);
    out[to] = table.p[i] - table.source[to];
  });
}

// [R, width] of a client: the change of the touched rows, zero behind.
template <typename T>
FEDPEFT_DEVICE void write_rows(const Touched<T>& t, const Table<T>& table, int64_t R, T* out) {
  const int width = table.width;
  for_all(R * width, [&](int64_t i) {
    const int64_t s = divide(i, width);
    out[i] = s < t.count ? table.p[i] - table.source[t.rows[s] * width + (i - s * width)] : T(0);
  });
}

// The SENet's weights as one row: w1 [S, H], b1 [S], w2 [H, S], b2 [H]; rows of them count for L2.
template <typename T>
struct Weights {
  const T *w1, *b1, *w2, *b2;

  FEDPEFT_DEVICE Weights(const T* packed, int S, int H)
      : w1(packed), b1(w1 + S * H), w2(b1 + S), b2(w2 + S * H) {}
};

// The weight at place i of the packed row, in the arrays of the call.
template <typename T>
FEDPEFT_DEVICE const T* given_weight(const LocalTrainArgs& a, int64_t i) {
  if (i < a.S * a.H) return static_cast<const T*>(a.w1) + i;
  if ((i -= a.S * a.H) < a.S) return static_cast<const T*>(a.b1) + i;
  if ((i -= a.S) < a.S * a.H) return static_cast<const T*>(a.w2) + i;
  return static_cast<const T*>(a.b2) + (i - a.S * a.H);
}

// Gates, hidden units and weighted sums of a batch.
template <typename T, typename DrawOf>
FEDPEFT_DEVICE void activate(const LocalTrainArgs& a, const Workspace<T>& w, int batch,
                             const DrawOf& draw_of) {
  const int S = int(a.S), H = int(a.H);
  const Weights<T> net(w.senet.p, S, H);
  for_all(int64_t(batch) * S, [&](int64_t i) {
    const int k = int(i) / S, s = int(i) - k * S;
    const int* slot = w.buckets.at + int64_t(draw_of(k)) * H;
    T sum = net.b1[s];
    for (int h = 0; h < H; ++h) sum += w.means[slot[h]] * net.w1[s * H + h];
    w.hidden[i] = sum > T(0) ? sum : T(0);
  });
  __syncthreads();
  for_all(int64_t(batch) * H, [&](int64_t i) {
    const int k = int(i) / H, h = int(i) - k * H;
    T sum = net.b2[h];
    for (int s = 0; s < S; ++s) sum += net.w2[h * S + s] * w.hidden[int64_t(k) * S + s];
    w.gates[i] = sigmoid(sum);
  });
  __syncthreads();
}

// Gradients of a batch: of its entries (alpha_of, beta_of) and of the weights.
template <typename T, typename DrawOf>
FEDPEFT_DEVICE void differentiate(const LocalTrainArgs& a, const Workspace<T>& w, int batch,
                                  const DrawOf& draw_of) {
  const int S = int(a.S), H = int(a.H);
  const Weights<T> net(w.senet.p, S, H);
  for_all(int64_t(batch) * H, [&](int64_t i) {
    const int k = int(i) / H;
    const T gate = w.gates[i], c = w.coefficients[k];
    const int slot = w.buckets.at[int64_t(draw_of(k)) * H + (int(i) - k * H)];
    w.buckets.alpha_of[i] = c * gate;
    w.slopes[i] = c * w.hashed.dots[slot] * gate * (T(1) - gate);
  });
  __syncthreads();
  for_all(int64_t(batch) * S, [&](int64_t i) {
    const int k = int(i) / S, s = int(i) - k * S;
    T sum = 0;
    for (int h = 0; h < H; ++h) sum += w.slopes[int64_t(k) * H + h] * net.w2[h * S + s];
    w.hidden_grad[i] = w.hidden[i] > T(0) ? sum : T(0);
  });
  __syncthreads();
  for_all(int64_t(batch) * H, [&](int64_t i) {
    const int k = int(i) / H, h = int(i) - k * H;
    T sum = 0;
    for (int s = 0; s < S; ++s) sum += net.w1[s * H + h] * w.hidden_grad[int64_t(k) * S + s];
    w.buckets.beta_of[i] = sum;
  });
  column_sums(
      w.senet.width, batch, w.partial,
      [&](int k, int output) {
        const T *hidden = w.hidden + int64_t(k) * S, *hidden_grad = w.hidden_grad + int64_t(k) * S,
                *slope = w.slopes + int64_t(k) * H;
        int i = output;
        if (i < S * H) {
          const int s = i / H;
          return hidden_grad[s] * w.means[w.buckets.at[int64_t(draw_of(k)) * H + (i - s * H)]];
        }
        if ((i -= S * H) < S) return hidden_grad[i];
        if ((i -= S) < S * H) {
          const int h = i / S;
          return slope[h] * hidden[i - h * S];
        }
        return slope[i - S * H];
      },
      [&](int output, T sum) { w.senet_grad[output] = sum; });
}

// A step of the SENet's weights. L2 is for those rows of w1 and w2, and those of b1 and b2, that
// have a gradient.
template <typename T>
FEDPEFT_DEVICE void step_senet(const LocalTrainArgs& a, const Workspace<T>& w, T l2) {
  const int S = int(a.S), H = int(a.H), rows = S + 1 + H + 1;
  T* pulled = w.partial;
  for_all(rows, [&](int64_t r) {
    // Row r of w1, then b1, rows of w2, b2.
    const int row = int(r);
    const int begin = row < S ? row * H : row == S ? S * H : S * H + S + (row - S - 1) * S;
    const int end = begin + (row < S || row == rows - 1 ? H : S);
    bool any = false;
    for (int i = begin; i < end; ++i)
      any |= w.senet_grad[i] != T(0) || (w.senet.start && w.senet.p[i] != w.senet.start[i]);
    pulled[row] = T(any);
  });
  __syncthreads();
  for_all(w.senet.width, [&](int64_t at) {
    int i = int(at), row = rows - 1;
    if (i < S * H) {
      row = i / H;
    } else if ((i -= S * H) < S) {
      row = S;
    } else if ((i -= S) < S * H) {
      row = S + 1 + i / S;
    }
    update(w.senet, w.rates, at,
           w.senet_grad[at] + (pulled[row] != T(0) ? l2 * w.senet.p[at] : T(0)));
  });
  __syncthreads();
}

// The graph layer's part of a row: beta[s], how often the first n draws, the own items, read it.
template <typename T>
FEDPEFT_DEVICE void count_own(const Touched<T>& t, int n, T scale) {
  int* counts = t.head;
  for_all(t.count, [&](int64_t s) { counts[s] = 0; });
  __syncthreads();
  for_all(int64_t(n) * t.reads, [&](int64_t e) { atomicAdd(counts + t.at[e], 1); });
  __syncthreads();
  for_all(t.count, [&](int64_t s) { t.beta[s] = scale * T(counts[s]); });
}

// into[column] += sum of weights[s] p[s], by the thread that for_all gives the column.
template <typename T>
FEDPEFT_DEVICE void add_rows(const Table<T>& t, int count, const T* weights, T* partial, T* into) {
  const T* p = t.p;
  const int width = t.width;
  column_sums(
      width, count, partial, [&](int s, int d) { return weights[s] * p[int64_t(s) * width + d]; },
      [&](int d, T sum) { into[d] += sum; });
}

// into += sum over all rows of items of the vectors that their `weights`, alpha or beta, multiply;
// `through_A` receives the sum of A's rows. Starts and ends with a barrier.
template <typename T, typename Weights>
FEDPEFT_DEVICE void add_vectors(const LocalTrainArgs& a, const Workspace<T>& w,
                                const Weights& weights, T* through_A, T* into) {
  if (a.table) add_rows(w.table, w.items.count, weights(w.items), w.partial, into);
  if (a.codebooks) add_rows(w.codebooks, w.codewords.count, weights(w.codewords), w.partial, into);
  if (a.buckets) add_rows(w.hashed, w.buckets.count, weights(w.buckets), w.partial, into);
  if (a.A) {
    for_all(w.A.width, [&](int64_t j) { through_A[j] = 0; });
    add_rows(w.A, w.items.count, weights(w.items), w.partial, through_A);
    dot_rows(w.B, int(a.D), through_A);
    __syncthreads();
    for_all(a.D, [&](int64_t d) { into[d] += w.B.dots[d]; });
  }
  __syncthreads();
}

// The vector that scores.
template <typename T>
FEDPEFT_DEVICE void see_neighbours(const LocalTrainArgs& a, const Workspace<T>& w) {
  for_all(a.D, [&](int64_t d) { w.seen[d] = w.base_sum[d]; });
  add_vectors(a, w, [](const Touched<T>& t) { return t.beta; }, w.near, w.seen);
  const T share = T(1 / sqrt(double(w.size)));
  for_all(a.D, [&](int64_t d) { w.seen[d] = (w.user.p[d] + share * w.seen[d]) / 2; });
  __syncthreads();
}

// A step of rows with gradients alpha[s] x + beta[s] y. `x_moves`, `y_moves`: not all zero.
template <typename T>
FEDPEFT_DEVICE void step_pairs(const Table<T>& t, int count, const T* alpha, const T* x,
                               bool x_moves, const T* beta, const T* y, bool y_moves, T l2,
                               const Workspace<T>& w) {
  const int width = t.width;
  if (t.start) find_moved(t, count);
  for_all(int64_t(count) * width, [&](int64_t i) {
    const int64_t s = divide(i, width);
    const int d = int(i - s * width);
    const T factor = alpha[s], other = beta[s];
    const bool pulled =
        (x_moves && factor != T(0)) || (y_moves && other != T(0)) || (t.start && t.dots[s] != T(0));
    T g = factor * x[d] + other * y[d];
    if (pulled) g += l2 * t.p[i];
    update(t, w.rates, i, g);
  });
  __syncthreads();
}

// The steps of all parts but the user, after the sums of the base in w.user_grad, which becomes the
// gradient of what scores.
template <typename T, typename Any>
FEDPEFT_DEVICE void step_graph(const LocalTrainArgs& a, const Workspace<T>& w, bool seen_moves,
                               const Any& any) {
  const int D = int(a.D);
  const T l2 = T(a.l2_items), *x = w.seen, *y = w.own_grad;
  add_vectors(a, w, [](const Touched<T>& t) { return t.alpha; }, w.mixed, w.user_grad);
  const T share = T(0.5 / sqrt(double(w.size)));
  for_all(D, [&](int64_t d) { w.own_grad[d] = share * w.user_grad[d]; });
  __syncthreads();
  const bool y_moves = any(y, D);
  const auto step = [&](const Table<T>& table, const Touched<T>& t) {
    step_pairs(table, t.count, t.alpha, x, seen_moves, t.beta, y, y_moves, l2, w);
  };
  if (a.table) step(w.table, w.items);
  if (a.codebooks) step(w.codebooks, w.codewords);
  if (a.buckets) step(w.hashed, w.buckets);
  if (a.A) {
    const T* B = w.B.p;
    const int rank = w.B.width;
    column_sums(
        rank, D, w.partial, [&](int d, int j) { return y[d] * B[int64_t(d) * rank + j]; },
        [&](int j, T sum) { w.pull[j] = sum; });
    step_pairs(w.A, w.items.count, w.items.alpha, w.q, any(w.q, rank), w.items.beta, w.pull,
               any(w.pull, rank), l2, w);
    step_pairs(w.B, D, x, w.mixed, any(w.mixed, rank), y, w.near, any(w.near, rank), l2, w);
  }
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

// The draws and the rows they read, and everything as it starts.
template <bool Graph, typename T>
FEDPEFT_DEVICE void start_client(const LocalTrainArgs& a, Workspace<T>& w, int* counts,
                                 LocalTrainErrors* errors) {
  const int n = w.size;
  for_all(w.draws, [&](int64_t draw) {
    const int epoch = int(draw) / n - 1, position = int(draw) - (epoch + 1) * n;
    int64_t item;
    if (epoch < 0) {
      const int64_t at = w.first + position, positive = a.positives[at];
      item = a.items[at];
      if (classify(item, a.num_items) != Position::item) {
        report(&errors->item, at);
        item = 0;
      }
      if (positive >= a.num_items || positive <= (position ? a.positives[at - 1] : -1))
        report(&errors->order, at);
    } else {
      item = draw_negative(a.positives, w.first, n, a.num_items, uint32_t(position),
                           uint32_t(w.client), a.round, uint32_t(epoch), a.seed);
      if (uint64_t(item) >= uint64_t(a.num_items)) item = 0;  // positives out of order
    }
    w.item_of[draw] = item;
  });
  __syncthreads();
  if (a.table || a.A) resolve(w.items, w.draws, counts, [&](int d, int) { return w.item_of[d]; });
  if (a.codebooks) {
    resolve(w.codewords, w.draws, counts, [&](int d, int level) {
      const int64_t at = w.item_of[d] * a.L + level, code = a.codes[at];
      const bool known = uint64_t(code) < uint64_t(a.K);
      if (!known) report(&errors->code, at);
      return level * a.K + (known ? code : 0);
    });
  }
  if (a.buckets) {
    resolve(w.buckets, w.draws, counts, [&](int d, int h) {
      return hash_bucket(uint64_t(a.hashes[2 * h]), uint64_t(a.hashes[2 * h + 1]),
                         uint64_t(w.item_of[d]), uint64_t(a.M));
    });
  }
  load(w.user, 1, [&](int) { return w.client; });
  const auto item_row = [&](int s) { return w.items.rows[s]; };
  if (a.table) load(w.table, w.items.count, item_row);
  if (a.A) {
    load(w.A, w.items.count, item_row);
    load(w.B, int(a.D), [](int d) { return int64_t(d); });
  }
  if (a.codebooks) load(w.codebooks, w.codewords.count, [&](int s) { return w.codewords.rows[s]; });
  if (a.buckets) load(w.hashed, w.buckets.count, [&](int s) { return w.buckets.rows[s]; });
  if (has_gates<Graph>(a)) {
    for_all(w.senet.width, [&](int64_t i) {
      const T value = *given_weight<T>(a, i);
      w.senet.p[i] = value;
      if (w.senet.start) w.senet.start[i] = value;
      if (w.senet.m) w.senet.m[i] = w.senet.v[i] = 0;
    });
  }
  if (threadIdx.x == 0) {
    Rates<T>& rates = w.rates;
    rates.power1 = rates.power2 = 1;
    rates.beta2 = T(a.beta2);
    rates.rest1 = T(1 - a.beta1);
    rates.rest2 = T(1 - a.beta2);
    rates.eps = T(a.eps);
    rates.lr = T(a.lr);
    rates.prox = T(a.prox);
  }
  if constexpr (Graph) {
    if (a.table || a.A) count_own(w.items, n, T(1));
    if (a.codebooks) count_own(w.codewords, n, T(1));
    if (a.buckets) count_own(w.buckets, n, row_scale<T>(a));
    const T* base = static_cast<const T*>(a.base);
    column_sums(
        int(a.D), base ? n : 0, w.partial,
        [&](int i, int d) { return base[w.item_of[i] * a.D + d]; },
        [&](int d, T sum) { w.base_sum[d] = sum; });
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

// A step on positives [first, first + pairs) of an epoch's order, each beside its negative, so that
// what cancels in a pair cancels exactly. Returns its loss, in every thread.
template <bool Graph, typename T>
FEDPEFT_DEVICE double take_step(const LocalTrainArgs& a, Workspace<T>& w, int epoch, int first,
                                int pairs, double* sums, int* flags) {
  const int batch = 2 * pairs, D = int(a.D);
  const bool gated = has_gates<Graph>(a);
  const auto draw_of = [&](int k) {
    const int positive = w.order ? w.order[first + k / 2] : first + k / 2;
    return k % 2 ? (1 + epoch) * w.size + positive : positive;
  };
  const T* user = Graph ? w.seen : w.user.p;
  if constexpr (Graph) see_neighbours(a, w);

  // Shared vectors and products with them.
  if (threadIdx.x == 0) {
    Rates<T>& rates = w.rates;
    rates.power1 *= a.beta1;
    rates.power2 *= a.beta2;
    rates.step_size = T(a.lr / (1 - rates.power1));
    rates.denominator_scale = T(1 / sqrt(1 - rates.power2));
  }
  if (a.A) {
    column_sums(
        w.B.width, D, w.partial,
        [&](int d, int j) { return user[d] * w.B.p[int64_t(d) * w.B.width + j]; },
        [&](int j, T sum) { w.q[j] = sum; });
    dot_rows(w.A, w.items.count, w.q);
  }
  if (a.table) dot_rows(w.table, w.items.count, user);
  if (a.codebooks) dot_rows(w.codebooks, w.codewords.count, user);
  if (a.buckets) dot_rows(w.hashed, w.buckets.count, user);
  if (gated) {
    row_sums<T>(
        D, w.buckets.count, [&](int s, int d) { return w.hashed.p[int64_t(s) * D + d]; },
        [&](int s, T sum) { w.means[s] = sum / T(D); });
  }
  const T* base = static_cast<const T*>(a.base);
  if (base) {
    row_sums<T>(
        D, batch, [&](int k, int d) { return base[w.item_of[draw_of(k)] * D + d] * user[d]; },
        [&](int k, T sum) { w.scores[k] = sum; });
  }
  __syncthreads();
  if (gated) activate(a, w, batch, draw_of);

  // Scores, and which entries each row has.
  const T scale = a.buckets && !gated ? row_scale<T>(a) : T(1);
  for_all(batch, [&](int64_t k) {
    const int64_t draw = draw_of(int(k));
    T score = base ? w.scores[k] : T(0);
    if (a.table) score += w.table.dots[w.items.at[draw]];
    if (a.A) score += w.A.dots[w.items.at[draw]];
    if (a.codebooks) {
      T sum = 0;
      for (int64_t j = 0; j < a.L; ++j) sum += w.codebooks.dots[w.codewords.at[draw * a.L + j]];
      score += sum;
    }
    if (a.buckets) {
      T sum = 0;
      for (int64_t h = 0; h < a.H; ++h) {
        const T dot = w.hashed.dots[w.buckets.at[draw * a.H + h]];
        sum += gated ? w.gates[k * a.H + h] * dot : dot;
      }
      score += scale * sum;
    }
    w.scores[k] = score;
  });
  if (a.table || a.A) start_lists(w.items, batch, draw_of);
  if (a.codebooks) start_lists(w.codewords, batch, draw_of);
  if (a.buckets) start_lists(w.buckets, batch, draw_of);
  __syncthreads();
  if (a.table || a.A) link_lists(w.items, batch, false);
  if (a.codebooks) link_lists(w.codewords, batch, true);
  if (a.buckets) link_lists(w.buckets, batch, false);

  // The loss and its gradient.
  double loss = 0;
  const T share = T(a.bpr ? 1.0 : 0.5) / T(pairs);
  for_all(pairs, [&](int64_t i) {
    const T positive = w.scores[2 * i], negative = w.scores[2 * i + 1];
    if (a.bpr) {
      const T difference = negative - positive, g = share * sigmoid(difference);
      loss += double(softplus(difference));
      w.coefficients[2 * i] = -g;
      w.coefficients[2 * i + 1] = g;
    } else {
      loss += double(softplus(-positive)) + double(softplus(negative));
      w.coefficients[2 * i] = -(share * sigmoid(-positive));
      w.coefficients[2 * i + 1] = share * sigmoid(negative);
    }
  });
  loss = block_sum(loss, sums) / double(a.bpr ? pairs : batch);

  // Each row's sums.
  if (gated) differentiate(a, w, batch, draw_of);
  if (a.table || a.A) sum_lists(w.items, w.coefficients, T(1));
  if (a.codebooks) sum_lists(w.codewords, w.coefficients, T(1));
  if (a.buckets) sum_lists(w.buckets, w.coefficients, scale);
  const auto any = [&](const T* x, int count) {
    bool mine = false;
    for (int i = int(threadIdx.x); i < count; i += kThreads) mine |= x[i] != T(0);
    return block_any(mine, flags);
  };
  const bool user_moves = any(user, D);

  // The user's gradient, by rows as they were, and the steps of the rows.
  const T l2 = T(a.l2_items);
  column_sums(
      D, base ? batch : 0, w.partial,
      [&](int k, int d) { return w.coefficients[k] * base[w.item_of[draw_of(k)] * D + d]; },
      [&](int d, T sum) { w.user_grad[d] = sum; });
  if constexpr (Graph) {
    step_graph(a, w, user_moves, any);
  } else {
    const auto add_to_user = [&](int d, T sum) { w.user_grad[d] += sum; };
    const T* none = nullptr;
    if (a.table) {
      step_rows(w.table, w.items.count, w.items.alpha, none, user, user_moves, l2, w, add_to_user);
    }
    if (a.codebooks) {
      step_rows(w.codebooks, w.codewords.count, w.codewords.alpha, none, user, user_moves, l2, w,
                add_to_user);
    }
    if (a.buckets) {
      step_rows(w.hashed, w.buckets.count, w.buckets.alpha, w.buckets.beta, user, user_moves, l2, w,
                add_to_user);
    }
    if (gated) step_senet(a, w, l2);
    if (a.A) {
      const bool q_moves = any(w.q, w.A.width);
      step_rows(w.A, w.items.count, w.items.alpha, none, w.q, q_moves, l2, w,
                [&](int j, T sum) { w.mixed[j] = sum; });
      // The score is u^T B a: dB = u mixed^T, and B mixed is the user's part.
      dot_rows(w.B, D, w.mixed);
      __syncthreads();
      for_all(D, [&](int64_t d) { w.user_grad[d] += w.B.dots[d]; });
      const bool mixed_moves = any(w.mixed, w.B.width);
      step_rows(w.B, D, user, none, w.mixed, mixed_moves, l2, w, [](int, T) {});
    }
  }
  const bool pulled = any(w.user_grad, D);
  for_all(D, [&](int64_t d) {
    const T g = Graph ? w.user_grad[d] / 2 : w.user_grad[d];
    update(w.user, w.rates, d, g + (pulled ? T(a.l2_user) * w.user.p[d] : T(0)));
  });
  __syncthreads();
  return loss;
}

template <bool Graph, typename T>
FEDPEFT_DEVICE void write_client(const LocalTrainArgs& a, const Workspace<T>& w) {
  const int64_t c = w.place;
  for_all(a.D, [&](int64_t d) { static_cast<T*>(a.new_user)[c * a.D + d] = w.user.p[d]; });
  if (a.table || a.A) {
    for_all(a.R,
            [&](int64_t s) { a.rows[c * a.R + s] = s < w.items.count ? w.items.rows[s] : -1; });
  }
  if (a.table) write_rows(w.items, w.table, a.R, static_cast<T*>(a.d_table) + c * a.R * a.D);
  if (a.A) {
    write_rows(w.items, w.A, a.R, static_cast<T*>(a.d_A) + c * a.R * a.rank);
    T* d_B = static_cast<T*>(a.d_B) + c * a.D * a.rank;
    for_all(a.D * a.rank, [&](int64_t i) { d_B[i] = w.B.p[i] - w.B.source[i]; });
  }
  if (a.codebooks) {
    write_whole(w.codewords, w.codebooks, static_cast<T*>(a.d_codebooks) + c * a.L * a.K * a.D);
  }
  if (a.buckets) {
    write_whole(w.buckets, w.hashed, static_cast<T*>(a.d_buckets) + c * a.M * a.D);
  }
  if (has_gates<Graph>(a)) {
    T *d_w1 = static_cast<T*>(a.d_w1) + c * a.S * a.H, *d_b1 = static_cast<T*>(a.d_b1) + c * a.S,
      *d_w2 = static_cast<T*>(a.d_w2) + c * a.H * a.S, *d_b2 = static_cast<T*>(a.d_b2) + c * a.H;
    for_all(w.senet.width, [&](int64_t i) {
      const T change = w.senet.p[i] - *given_weight<T>(a, i);
      int64_t at = i;
      if (at < a.S * a.H) {
        d_w1[at] = change;
      } else if ((at -= a.S * a.H) < a.S) {
        d_b1[at] = change;
      } else if ((at -= a.S) < a.S * a.H) {
        d_w2[at] = change;
      } else {
        d_b2[at - a.S * a.H] = change;
      }
    });
  }
}

template <typename T, bool Graph>
__global__ void __launch_bounds__(kThreads, 2)
    train(LocalTrainArgs a, int64_t clients, LocalTrainPlan plan, const int64_t* order,
          char* scratch, LocalTrainState* state) {
  FEDPEFT_DYNAMIC_SHARED(dynamic);
  FEDPEFT_SHARED(Workspace<T>, workspace, 1);
  FEDPEFT_SHARED(double, sums, kWarps);
  FEDPEFT_SHARED(int, counts, kWarps);
  FEDPEFT_SHARED(int64_t, taken, 1);
  Workspace<T>& w = workspace[0];
  for (;;) {
    if (threadIdx.x == 0) {
      taken[0] = int64_t(atomicAdd(reinterpret_cast<unsigned long long*>(&state->next), 1ull));
      if (taken[0] < clients) {
        const int64_t c = order[taken[0]], client = a.clients[c];
        w.place = int(c);
        w.client = client;
        w.first = a.indptr[client];
        Arena arena{reinterpret_cast<char*>(dynamic), scratch + blockIdx.x * plan.scratch_bytes,
                    plan.shared_bytes, 0, 0};
        w.template lay_out<Graph>(arena, a, a.indptr[client + 1] - w.first);
      }
    }
    __syncthreads();
    if (taken[0] >= clients) break;
    start_client<Graph>(a, w, counts, &state->errors);
    __syncthreads();
    double loss = 0;
    int64_t steps = 0;
    for (int epoch = 0; epoch < int(a.epochs); ++epoch) {
      if (a.batch > 0) shuffle(a, w, epoch);
      const int most = a.batch > 0 && a.batch < w.size ? int(a.batch) : w.size;
      for (int first = 0; first < w.size; first += most) {
        const int pairs = w.size - first < most ? w.size - first : most;
        loss += take_step<Graph>(a, w, epoch, first, pairs, sums, counts);
        ++steps;
      }
    }
    if (threadIdx.x == 0) a.losses[w.place] = steps ? loss / double(steps) : 0.0;
    write_client<Graph>(a, w);
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    find_ranges(LocalTrainArgs a, int64_t clients, ClientRange* ranges) {
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < clients;
       c += int64_t(gridDim.x) * kThreads) {
    const int64_t client = a.clients[c];
    const bool known = uint64_t(client) < uint64_t(a.users);
    ranges[c] = {client, known ? a.indptr[client] : 0, known ? a.indptr[client + 1] : 0};
  }
}

template <typename T>
Arena measured(const LocalTrainArgs& a, int64_t n, int64_t shared) {
  Arena arena{nullptr, nullptr, shared, 0, 0};
  Workspace<T> w{};
  if (a.graph) {
    w.template lay_out<true>(arena, a, n);
  } else {
    w.template lay_out<false>(arena, a, n);
  }
  return arena;
}

}  // namespace

std::vector<ClientRange> local_train_ranges(const LocalTrainArgs& a, int64_t clients,
                                            ClientRange* ranges, Stream stream) {
  std::vector<ClientRange> found(static_cast<size_t>(clients));
  if (clients == 0) return found;
  launch(find_ranges, (clients + kThreads - 1) / kThreads, kThreads, 0, stream, a, clients, ranges);
  copy_to_host(found.data(), ranges, clients * int64_t(sizeof(ClientRange)), stream);
  return found;
}

LocalTrainPlan plan_local_train(const LocalTrainArgs& a, DType dtype,
                                const std::vector<int64_t>& sizes) {
  // Blocks wait at barriers often: two and more share a multiprocessor. 2 KiB of each are for the
  // device and the kernel's own arrays.
  constexpr int64_t kOwn = 2048;
  constexpr int64_t kMostScratch = int64_t{4} << 30;
  const Limits device = limits();
  const auto measure = [&](int64_t n, int64_t shared) {
    return dtype == DType::f64 ? measured<double>(a, n, shared) : measured<float>(a, n, shared);
  };
  const int64_t half = device.shared_bytes / 2 - kOwn, most = half > 0 ? half : 0;
  LocalTrainPlan plan{};
  const int64_t needed = sizes.empty() ? 0 : measure(sizes[0], INT64_MAX).shared_used;
  plan.shared_bytes = needed < most ? needed : most;
  // Not always the most for the most items: the maps of rows change their kind.
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0 && sizes[i] == sizes[i - 1]) continue;
    const int64_t bytes = measure(sizes[i], plan.shared_bytes).memory_used;
    plan.scratch_bytes = bytes > plan.scratch_bytes ? bytes : plan.scratch_bytes;
  }
  int64_t resident = device.shared_bytes / (plan.shared_bytes + kOwn);
  resident = resident < 1 ? 1 : resident > 2048 / kThreads ? 2048 / kThreads : resident;
  plan.blocks = resident * device.multiprocessors;
  if (plan.blocks > int64_t(sizes.size())) plan.blocks = int64_t(sizes.size());
  if (plan.scratch_bytes > 0 && plan.blocks * plan.scratch_bytes > kMostScratch)
    plan.blocks = kMostScratch / plan.scratch_bytes > 1 ? kMostScratch / plan.scratch_bytes : 1;
  return plan;
}

LocalTrainErrors local_train(const LocalTrainArgs& a, DType dtype, int64_t clients,
                             const LocalTrainPlan& plan, const int64_t* order, void* scratch,
                             LocalTrainState* state, Stream stream) {
  LocalTrainState host{{INT64_MAX, INT64_MAX, INT64_MAX}, 0};
  copy_to_device(state, &host, sizeof(host), stream);
  const auto kernel = a.graph ? dtype == DType::f64 ? train<double, true> : train<float, true>
                      : dtype == DType::f64 ? train<double, false>
                                            : train<float, false>;
  launch(kernel, plan.blocks, kThreads, plan.shared_bytes, stream, a, clients, plan, order,
         static_cast<char*>(scratch), state);
  copy_to_host(&host, state, sizeof(host), stream);
  return host.errors;
}

int64_t read_index(const IndexArray& indices, int64_t at, Stream stream) {
  int64_t value = 0;
  copy_to_host(&value, static_cast<const char*>(indices.data) + at * indices.bytes, indices.bytes,
               stream);
  return IndexArray{&value, indices.bytes}[0];
}

void copy_to_device(void* to, const void* from, int64_t bytes, [[maybe_unused]] Stream stream) {
#if defined(__CUDACC__)
  check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyHostToDevice,
                        static_cast<cudaStream_t>(stream.handle)),
        "cudaMemcpyAsync");
#else
  if (bytes > 0) std::memcpy(to, from, size_t(bytes));
#endif
}

}  // namespace fedpeft::gpu
