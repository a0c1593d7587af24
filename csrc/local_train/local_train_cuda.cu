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
// An MLP that scores, which is compiled apart, is in mlp.cuh.
//
// With FedPerGNN's layer, which is compiled apart (Graph), what scores is (user + sum of the own
// items' vectors / sqrt(n)) / 2, so that an own item's rows also get a number times the gradient of
// that vector, which has to be whole before a row is stepped: a step has two more passes over rows.
#include <type_traits>

#include "local_train/client.cuh"
#include "local_train/mlp.cuh"

namespace fedpeft::gpu {
namespace {

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

// A step on positives [first, first + pairs) of an epoch's order, each beside its negative, so that
// what cancels in a pair cancels exactly. Returns its loss, in every thread.
template <bool Graph, typename T>
FEDPEFT_DEVICE double take_step(const LocalTrainArgs& a, Workspace<T>& w, int epoch, int first,
                                int pairs, double* sums, int* flags) {
  const int batch = 2 * pairs, D = int(a.D);
  const bool gated = has_gates<Graph>(a);
  const auto draw_of = [&](int k) { return gpu::draw_of(w, epoch, first, k); };
  const T* user = Graph ? w.seen : w.user.p;
  if constexpr (Graph) see_neighbours(a, w);

  // Shared vectors and products with them.
  if (threadIdx.x == 0) advance(a, w.rates);
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
        [&](int s, T sum) { w.means[s] = sum / T(D > 0 ? D : 1); });
  }
  const T* base = static_cast<const T*>(a.base);
  const auto item_of = [&](int k) { return w.item_of[draw_of(k)]; };
  if (base) {
    with_vectors(base, D, [&](auto width) {
      constexpr int V = decltype(width)::value;
      row_sums<T>(
          D / V, batch,
          [&](int k, int vector) {
            const Pack<T, V> x = load_pack<V>(base + item_of(k) * D + vector * V);
            const Pack<T, V> y = load_pack<V>(user + vector * V);
            T product = 0;
#pragma unroll
            for (int v = 0; v < V; ++v) product += x.at[v] * y.at[v];
            return product;
          },
          [&](int k, T sum) { w.scores[k] = sum; });
    });
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
  double loss = slopes(a, w.scores, w.coefficients, pairs, pairs);
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
  if (base) {
    with_vectors(base, D, [&](auto width) {
      constexpr int V = decltype(width)::value;
      column_sums(
          D, batch, w.partial,
          [&](int k, int d) {
            Pack<T, V> x = load_pack<V>(base + item_of(k) * D + d);
#pragma unroll
            for (int v = 0; v < V; ++v) x.at[v] *= w.coefficients[k];
            return x;
          },
          [&](int d, T sum) { w.user_grad[d] = sum; });
    });
  } else {
    for_all(D, [&](int64_t d) { w.user_grad[d] = 0; });
    __syncthreads();
  }
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

// The steps of a client, and the mean of their losses.
template <bool Graph, typename T>
FEDPEFT_DEVICE void train_client(const LocalTrainArgs& a, Workspace<T>& w, double* sums,
                                 int* counts) {
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
}

template <bool Graph, typename T>
FEDPEFT_DEVICE void write_client(const LocalTrainArgs& a, const Workspace<T>& w) {
  const int64_t c = w.place;
  const int64_t V = a.user_width;
  for_all(V, [&](int64_t d) { static_cast<T*>(a.new_user)[c * V + d] = w.user.p[d]; });
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

// What scores an item; each is compiled apart, so that none takes registers of another.
enum class Scoring { dot, graph, mlp };

template <typename T, Scoring scoring>
using WorkspaceOf = std::conditional_t<scoring == Scoring::mlp, MlpWorkspace<T>, Workspace<T>>;

template <Scoring scoring, typename W>
__host__ __device__ inline void lay_out(W& w, Arena& arena, const LocalTrainArgs& a, int64_t n) {
  if constexpr (scoring == Scoring::mlp) {
    w.lay_out(arena, a, n);
  } else {
    w.template lay_out<scoring == Scoring::graph>(arena, a, n);
  }
}

// Blocks that a multiprocessor has registers for: an MLP's products keep 8 x 4 sums a thread.
template <typename T, Scoring scoring>
constexpr int kBlocksOf = scoring == Scoring::mlp && sizeof(T) == 8 ? 1 : 2;

template <typename T, Scoring scoring>
__global__ void __launch_bounds__(kThreads, (kBlocksOf<T, scoring>))
    train(LocalTrainArgs a, int64_t clients, LocalTrainPlan plan, const int64_t* order,
          char* scratch, LocalTrainState* state) {
  FEDPEFT_DYNAMIC_SHARED(dynamic);
  constexpr bool Graph = scoring == Scoring::graph, Mlp = scoring == Scoring::mlp;
  using W = WorkspaceOf<T, scoring>;
  FEDPEFT_SHARED(W, workspace, 1);
  FEDPEFT_SHARED(double, sums, kWarps);
  FEDPEFT_SHARED(int, counts, kWarps);
  FEDPEFT_SHARED(int64_t, taken, 1);
  W& w = workspace[0];
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
        lay_out<scoring>(w, arena, a, a.indptr[client + 1] - w.first);
      }
    }
    __syncthreads();
    if (taken[0] >= clients) break;
    start_client<Graph>(a, w, counts, &state->errors);
    if constexpr (Mlp) start_mlp(a, w);
    __syncthreads();
    if constexpr (Mlp) {
      train_mlp(a, w, sums, counts);
      write_mlp(a, w);
    } else {
      train_client<Graph>(a, w, sums, counts);
    }
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

// Calls f(Scoring) as a constant.
template <typename F>
auto with_scoring(const LocalTrainArgs& a, const F& f) {
  if (a.layers) return f(std::integral_constant<Scoring, Scoring::mlp>{});
  return a.graph ? f(std::integral_constant<Scoring, Scoring::graph>{})
                 : f(std::integral_constant<Scoring, Scoring::dot>{});
}

template <typename T>
Arena measured(const LocalTrainArgs& a, int64_t n, int64_t shared) {
  return with_scoring(a, [&](auto scoring) {
    Arena arena{nullptr, nullptr, shared, 0, 0};
    WorkspaceOf<T, scoring()> w{};
    lay_out<scoring()>(w, arena, a, n);
    return arena;
  });
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
  // Blocks wait at barriers often: two and more share a multiprocessor. 2 KiB of each, 3 with an
  // MLP, are for the device and the kernel's own arrays.
  const int64_t own = a.layers ? 3072 : 2048;
  constexpr int64_t kMostScratch = int64_t{4} << 30;
  const Limits device = limits();
  const int64_t clients = int64_t(sizes.size());
  const auto measure = [&](int64_t n, int64_t shared) {
    return dtype == DType::f64 ? measured<double>(a, n, shared) : measured<float>(a, n, shared);
  };
  int64_t shares = 2, blocks = 2048 / kThreads;
  if (a.layers) {
    // Alone on its multiprocessor a block keeps more of what layers leave beside the tiles.
    const int64_t tiles = dtype == DType::f64 ? kTilesBytes<double> : kTilesBytes<float>;
    if (device.shared_bytes - own < tiles) {
      throw std::runtime_error("local_train: an MLP takes " + std::to_string(tiles + own) +
                               " bytes of a block's shared memory, the GPU has " +
                               std::to_string(device.shared_bytes));
    }
    blocks = dtype == DType::f64 ? 1 : 2;
    if (clients <= device.multiprocessors || device.shared_bytes / 2 - own < tiles) blocks = 1;
    shares = blocks;
  }
  const int64_t share = device.shared_bytes / shares - own, most = share > 0 ? share : 0;
  LocalTrainPlan plan{};
  const int64_t needed = sizes.empty() ? 0 : measure(sizes[0], INT64_MAX).shared_used;
  plan.shared_bytes = needed < most ? needed : most;
  // Not always the most for the most items: the maps of rows change their kind.
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (i > 0 && sizes[i] == sizes[i - 1]) continue;
    const int64_t bytes = measure(sizes[i], plan.shared_bytes).memory_used;
    plan.scratch_bytes = bytes > plan.scratch_bytes ? bytes : plan.scratch_bytes;
  }
  int64_t resident = device.shared_bytes / (plan.shared_bytes + own);
  resident = resident < 1 ? 1 : resident > blocks ? blocks : resident;
  plan.blocks = resident * device.multiprocessors;
  if (plan.blocks > clients) plan.blocks = clients;
  if (plan.scratch_bytes > 0 && plan.blocks * plan.scratch_bytes > kMostScratch)
    plan.blocks = kMostScratch / plan.scratch_bytes > 1 ? kMostScratch / plan.scratch_bytes : 1;
  return plan;
}

LocalTrainErrors local_train(const LocalTrainArgs& args, DType dtype, int64_t clients,
                             const LocalTrainPlan& plan, const int64_t* order, void* scratch,
                             LocalTrainState* state, void* lists, Stream stream) {
  LocalTrainArgs a = args;
  LocalTrainState host{{INT64_MAX, INT64_MAX, INT64_MAX}, 0};
  copy_to_device(state, &host, sizeof(host), stream);
  char* at = static_cast<char*>(lists);
  const auto moved = [&](auto& list, int64_t count) {
    copy_to_device(at, list, count * int64_t(sizeof(*list)), stream);
    list = reinterpret_cast<std::remove_reference_t<decltype(list)>>(at);
    at += count * int64_t(sizeof(*list));
  };
  if (a.layers) {
    moved(a.widths, a.layers);
    moved(a.mlp, 2 * a.layers + 1);
    moved(a.d_mlp, 2 * a.layers + 1);
  }
  with_scoring(a, [&](auto scoring) {
    const auto kernel = dtype == DType::f64 ? train<double, scoring()> : train<float, scoring()>;
    launch(kernel, plan.blocks, kThreads, plan.shared_bytes, stream, a, clients, plan, order,
           static_cast<char*>(scratch), state);
  });
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
