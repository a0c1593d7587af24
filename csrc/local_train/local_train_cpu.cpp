// CPU kernel of local_train: one client from its first draw to its upload.
#include "local_train/local_train_cpu.h"

#include "common/draws.h"
#include "common/vec.h"
#include "local_train/mlp.h"
#include "local_train/parts.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Calls f with the elements of an index array.
template <typename F>
FEDPEFT_INLINE auto with_type(const IndexArray& index, const F& f) {
  switch (index.bytes) {
    case 8:
      return f(static_cast<const int64_t*>(index.data));
    case 4:
      return f(static_cast<const int32_t*>(index.data));
    case 2:
      return f(static_cast<const int16_t*>(index.data));
    default:
      return f(static_cast<const uint8_t*>(index.data));
  }
}

FEDPEFT_INLINE int64_t items_of(const LocalTrainArgs& a, int64_t c) {
  const int64_t client = a.clients[c];
  return a.indptr[client + 1] - a.indptr[client];
}

// What a client trains on, which may be made while another client trains: its items, and the
// negatives of all its epochs.
struct Draws {
  int64_t client, first, size, count;
  bool usable;     // nothing was reported
  int64_t* items;  // [count]: the positives, then each epoch's negatives
  int64_t* gaps;   // [size]: each positive less the positives before it

  // Lays it out for a client of n items, and returns the bytes that it takes.
  static int64_t lay_out(const LocalTrainArgs& a, int64_t n, void* room, Draws** draws) {
    Arena arena(room);
    Draws* const at = arena.take<Draws>(1);
    const int64_t count = n * (1 + a.epochs);
    int64_t *const items = arena.take<int64_t>(count + kDrawBatch), *const gaps =
                                                                        arena.take<int64_t>(n);
    if (draws) {
      *at = {0, 0, n, count, false, items, gaps};
      *draws = at;
    }
    return arena.used();
  }

  void make(const LocalTrainArgs& a, int64_t c) {
    client = a.clients[c];
    first = a.indptr[client];
    usable = take_items(a);
    if (!usable) return;
    with_type(a.positives, [&](const auto* given) {
      for (int64_t i = 0; i < size; ++i) gaps[i] = int64_t(given[first + i]) - i;
    });
    for (int64_t epoch = 0; epoch < a.epochs; ++epoch) draw_negatives(a, epoch);
  }

 private:
  bool take_items(const LocalTrainArgs& a) {
    const bool known = with_type(a.items, [&](const auto* given) {
      bool ok = true;
      for (int64_t i = 0; i < size; ++i) {
        items[i] = given[first + i];
        ok &= classify(items[i], a.num_items) == Position::item;
      }
      for (int64_t i = 0; i < size && !ok; ++i) {
        if (classify(items[i], a.num_items) != Position::item) {
          a.bad_item->report(first + i);
          break;
        }
      }
      return ok;
    });
    const bool ascending = with_type(a.positives, [&](const auto* given) {
      const auto* const mine = given + first;
      bool ok = size == 0 || (mine[0] >= 0 && int64_t(mine[size - 1]) < a.num_items);
      for (int64_t i = 1; i < size; ++i) ok &= mine[i - 1] < mine[i];
      for (int64_t i = 0; i < size && !ok; ++i) {
        if (mine[i] >= a.num_items || int64_t(mine[i]) <= (i ? int64_t(mine[i - 1]) : -1)) {
          a.bad_order->report(first + i);
          break;
        }
      }
      return ok;
    });
    if (!known || !ascending) return false;
    const bool drawable = size == 0 || size < a.num_items;
    if (!drawable) a.no_negative->report(client);
    return drawable;
  }

  // Draws of an epoch, as sample_negatives makes them.
  void draw_negatives(const LocalTrainArgs& a, int64_t epoch) {
    const uint64_t choices = uint64_t(a.num_items - size);
    const uint32_t stream = philox_stream(Purpose::negatives, 0, uint32_t(epoch));
    for (int64_t p = 0; p < size; p += kDrawBatch) {
      uint64_t random[kDrawBatch], unused[kDrawBatch];
      philox_batch(uint64_t(p), uint32_t(client), a.round, stream, a.seed, random, unused);
      int64_t rank[kDrawBatch];
      for (int64_t i = 0; i < kDrawBatch; ++i) rank[i] = int64_t(multiply_high(random[i], choices));
      // A last batch goes beyond its epoch, where the next one begins or nothing is read.
      kth_negatives(rank, items + (1 + epoch) * size + p);
    }
  }

  // The items that draws stand for, as in common/draws.h: rank + j for the number j of gaps that
  // are at most it. Searched for in step, so that their chains of loads overlap, from the gaps,
  // which are made once a client.
  FEDPEFT_INLINE void kth_negatives(const int64_t* rank, int64_t* drawn) const {
    const int64_t* at[kDrawBatch];
    for (int64_t i = 0; i < kDrawBatch; ++i) at[i] = gaps;
    int64_t n = size;
    for (; n > 1; n -= n / 2) {
      const int64_t half = n / 2;
      for (int64_t i = 0; i < kDrawBatch; ++i) at[i] += half & -int64_t(at[i][half - 1] <= rank[i]);
    }
    for (int64_t i = 0; i < kDrawBatch; ++i)
      drawn[i] = rank[i] + (at[i] - gaps) + int64_t(n == 1 && *at[i] <= rank[i]);
  }
};

template <typename T>
class Trainer {
 public:
  Trainer(const LocalTrainArgs& args, int64_t n, void* scratch) : a(args), size(n), arena(scratch) {
    const int64_t draws = n * (1 + a.epochs), batch = 2 * n;
    batch_draws = arena.take<int32_t>(batch);
    scores = arena.take<T>(batch);
    coefficients = arena.take<T>(batch);
    difference = arena.take<T>(2 * n);
    if (a.batch > 0) {
      order = arena.take<int32_t>(n);
      spare = arena.take<int32_t>(n);
      keys = arena.take<uint64_t>(n);
    }
    user.lay_out(arena, a, a.user, 1, a.user_width, false);
    if (a.graph) {
      T** const vectors[] = {&base_sum, &graph_user, &score_grad, &neighbour_grad};
      for (T** vector : vectors) *vector = arena.take<T>(user.stride);
    }
    const GradientKind kind = a.layers  ? GradientKind::vectors
                              : a.graph ? GradientKind::alpha_beta
                                        : GradientKind::alpha;
    const bool small = !a.layers;  // whether a row without a gradient costs less than finding rows
    if (a.table) table.lay_out(arena, a, a.table, a.num_items, a.D, 1, draws, kind, false);
    if (a.A) lora.lay_out(arena, a, draws, kind);
    if (a.codebooks)
      codewords.lay_out(arena, a, a.codebooks, a.L * a.K, a.D, a.L, draws, kind, small);
    if (a.buckets && a.w1) senet.lay_out(arena, a, draws, batch);
    if (a.buckets && !a.w1) {
      hashed.lay_out(arena, a, a.buckets, a.M, a.D, a.H, draws, kind, small);
      hashed.scale = a.mean ? T(1) / T(a.H) : T(1);
    }
    if (a.layers) mlp.lay_out(arena, a);
  }

  int64_t scratch() const { return arena.used(); }

  // Trains client c on its draws. Meanwhile the rows that `ahead` will read, if there is such, are
  // asked for.
  void train(int64_t c, const Draws& draws, const Draws* ahead, LocalSums* sums, double weight) {
    if (!draws.usable) return;
    client = draws.client;
    items = draws.items;
    if (sums) add_to(*sums, weight);
    const int64_t most = a.batch > 0 ? a.batch : size;
    const int64_t all = size ? a.epochs * ((size + most - 1) / most) : 0;
    if (ahead && ahead->usable) look_ahead_to(*ahead, all);
    if (!start(c)) return;
    double loss = 0;
    int64_t steps = 0;
    for (epoch = 0; epoch < a.epochs; ++epoch) {
      if (!meet((1 + epoch) * size, (2 + epoch) * size)) return;
      if (a.batch > 0) shuffle();
      for (int64_t at = 0; at < size; at += most) {
        const int64_t count = size - at < most ? size - at : most;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t positive = order ? order[at + i] : at + i;
          batch_draws[2 * i] = int32_t(positive);
          batch_draws[2 * i + 1] = int32_t((1 + epoch) * size + positive);
        }
        loss += take_step(Batch{batch_draws, 2 * count}, LocalStep<T>(a, ++steps, all));
      }
    }
    a.losses[c] = steps ? loss / double(steps) : 0.0;
    copy_row(static_cast<T*>(a.new_user) + c * a.user_width, user.p, a.user_width);
    if (sums) {
      add_up(*sums);
    } else {
      write(c);
    }
    if (a.layers && (a.own_mlp || !sums)) mlp.write(a, c);
  }

 private:
  const LocalTrainArgs& a;
  const int64_t size;
  Arena arena;
  int64_t client = 0, epoch = 0;
  const int64_t* items = nullptr;                      // of its draws
  const int64_t *soon = nullptr, *soon_end = nullptr;  // draws of the next client, to be asked for,
  int64_t soon_share = 0;                              // so many at a time
  int32_t* batch_draws;  // positives and negatives alternating, so that what cancels in a pair
                         // cancels exactly
  T *scores, *coefficients, *difference;
  int32_t *order = nullptr, *spare = nullptr;
  uint64_t* keys = nullptr;
  // Of the graph: the sum of the own items' frozen vectors, the user vector that scores, its
  // gradient, and that of an own item's vector through it.
  T *base_sum = nullptr, *graph_user = nullptr, *score_grad = nullptr, *neighbour_grad = nullptr;
  DensePart<T> user;
  RowsPart<T> table, codewords, hashed;
  LoraPart<T> lora;
  SenetPart<T> senet;
  MlpPart<T> mlp;

  bool start(int64_t c) {
    user.source = static_cast<const T*>(a.user) + client * a.user_width;
    user.load_start();
    for_slots([](Slots<T>& slots) { slots.clear(); });
    if (a.A) lora.B.load_start();
    if (a.buckets && a.w1) senet.load_start();
    if (a.layers) mlp.load_start(a, c);
    if (!meet(0, size)) return false;
    if (a.graph) meet_neighbours();
    return true;
  }

  // What of the graph layer stays the same in all steps.
  void meet_neighbours() {
    if (a.table) table.count_reads(size);
    if (a.A) lora.A.count_reads(size);
    if (a.codebooks) codewords.count_reads(size);
    if (a.buckets) hashed.count_reads(size);
    zero_row(base_sum, user.stride);
    if (!a.base) return;
    for (int64_t i = 0; i < size; ++i) {
      batch_draws[i] = int32_t(i);
      coefficients[i] = 1;
    }
    frozen().step(Batch{batch_draws, size}, coefficients, base_sum);
  }

  BasePart<T> frozen() const { return {static_cast<const T*>(a.base), items, a.D}; }

  // The user vector after the layer.
  const T* layer() {
    T* const sum = graph_user;
    copy_row(sum, base_sum, user.stride);
    if (a.table) table.slots.weigh_all(table.slots.beta, sum);
    if (a.A) lora.weigh_all(lora.A.slots.beta, lora.near, sum);
    if (a.codebooks) codewords.slots.weigh_all(codewords.slots.beta, sum);
    if (a.buckets) hashed.slots.weigh_all(hashed.slots.beta, sum);
    const T share = T(1 / __builtin_sqrt(double(size)));
    for (int64_t d = 0; d < user.stride; ++d) sum[d] = multiply_add(share, sum[d], user.p[d]) / 2;
    return sum;
  }

  // The optimizer's step with the layer, whose gradient has to be whole before a row's is known.
  void step_graph(const Batch& batch, const LocalStep<T>& step, const T* u, T l2) {
    T* const grad = score_grad;
    zero_row(grad, user.stride);
    if (a.base) frozen().step(batch, coefficients, grad);
    const auto gather = [&](RowsPart<T>& part) {
      part.add_gradients(batch, coefficients);
      part.end_gradients();
    };
    const auto weigh = [&](RowsPart<T>& part) {
      gather(part);
      part.slots.weigh_all(part.slots.alpha, grad);
    };
    if (a.table) weigh(table);
    if (a.A) {
      gather(lora.A);
      lora.weigh_all(lora.A.slots.alpha, lora.mixed, grad);
    }
    if (a.codebooks) weigh(codewords);
    if (a.buckets) weigh(hashed);
    const T share = T(0.5 / __builtin_sqrt(double(size)));
    for (int64_t d = 0; d < user.stride; ++d) neighbour_grad[d] = share * grad[d];
    const T* const y = neighbour_grad;
    if (a.table) table.step(u, step, l2, nullptr, y);
    if (a.A) lora.step_graph(u, y, step, l2);
    if (a.codebooks) codewords.step(u, step, l2, nullptr, y);
    if (a.buckets) hashed.step(u, step, l2, nullptr, y);
    for (int64_t d = 0; d < user.stride; ++d) user.grad[d] = grad[d] / 2;
    user.step(step, T(a.l2_user));
  }

  // The trained parts with their names.
  template <typename F>
  FEDPEFT_INLINE void for_parts(const F& f) {
    if (a.table) f(table.slots, broken_table);
    if (a.A) f(lora.A.slots, broken_A);
    if (a.A) f(lora.B, broken_B);
    if (a.codebooks) f(codewords.slots, broken_codebooks);
    if (a.buckets) f(a.w1 ? senet.table.slots : hashed.slots, broken_buckets);
    if (!a.w1) return;
    f(senet.w1, broken_w1);
    f(senet.b1, broken_b1);
    f(senet.w2, broken_w2);
    f(senet.b2, broken_b2);
  }

  void add_to(const LocalSums& sums, double weight) {
    for_parts([&](auto& part, BrokenPart name) {
      part.total = {sums.totals[name], sums.locks[name], {weight, sums.shift}};
    });
    if (a.layers && !a.own_mlp) mlp.add_to(sums.mlp, {weight, sums.shift});
  }

  void add_up(LocalSums& sums) {
    const Slots<T>& slots = a.table ? table.slots : lora.A.slots;
    for_parts([&](auto& part, BrokenPart name) {
      part.add_up();
      sums.broken |= uint32_t(part.total.broken) << name;
    });
    if (a.layers && !a.own_mlp) sums.broken |= uint32_t(mlp.add_up()) << broken_mlp;
    if (!sums.seen) return;
    int64_t* fresh = sums.fresh;
    for (int64_t s = 0; s < slots.count; ++s) {
      const int64_t row = slots.rows[s];
      const uint64_t word = sums.seen[row / 64], bit = uint64_t{1} << row % 64;
      *fresh = row;
      fresh += (word & bit) == 0;
      sums.seen[row / 64] = word | bit;
    }
    sums.fresh = fresh;
  }

  template <typename F>
  FEDPEFT_INLINE void for_slots(const F& f) {
    if (a.table) f(table.slots);
    if (a.A) f(lora.A.slots);
    if (a.codebooks) f(codewords.slots);
    if (a.buckets) f(a.w1 ? senet.table.slots : hashed.slots);
  }

  // Parts of which a draw's rows may have to come from beyond a core's own caches.
  struct Far {
    static constexpr int64_t kNear = 1 << 18;  // bytes
    bool codes, base, table, A;

    explicit Far(const LocalTrainArgs& a) {
      const int64_t row = a.D * int64_t(sizeof(T));
      codes = a.codebooks && a.num_items * a.L * a.codes.bytes > kNear;
      base = a.base && a.num_items * row > kNear;
      table = a.table && a.num_items * row > kNear;
      A = a.A && a.num_items * a.rank * int64_t(sizeof(T)) > kNear;
    }
    bool any() const { return codes || base || table || A; }
  };
  const Far far{a};

  // Takes up what draws [begin, end) read.
  bool meet(int64_t begin, int64_t end) {
    if (far.any()) {
      for (int64_t n = begin; n < end; ++n) {
        if (far.codes) a.codes.prefetch(items[n] * a.L);
        if (far.base) prefetch_row(static_cast<const T*>(a.base) + items[n] * a.D, a.D);
        if (far.table) table.slots.prefetch(items[n]);
        if (far.A) lora.A.slots.prefetch(items[n]);
      }
    }
    return resolve(begin, end);
  }

  // Memory takes a while to answer, and a processor keeps track of a few dozen questions: so they
  // are put little by little, between the passes of this client's steps. The answers fit in the
  // second-level cache.
  static constexpr int64_t kStretch = 16;  // scores between two pauses

  void look_ahead_to(const Draws& ahead, int64_t steps) {
    if (!far.any() || steps == 0) return;
    soon = ahead.items;
    soon_end = soon + ahead.count;
    const int64_t of_batch = 2 * ((a.batch > 0 && a.batch < size ? a.batch : size) / kStretch);
    const int64_t pauses = steps * (4 + (a.base ? 2 * of_batch : 0));
    soon_share = (ahead.count + pauses - 1) / pauses;
  }

  template <typename E>
  static FEDPEFT_INLINE void ask_for_row(const E* row, int64_t width) {
    const char* bytes = reinterpret_cast<const char*>(row);
    const int64_t all = width * int64_t(sizeof(E)), some = all < 512 ? all : 512;
    for (int64_t b = 0; b < some; b += 64) __builtin_prefetch(bytes + b, 0, 2);
  }

  FEDPEFT_INLINE void look_ahead() {
    if (soon == soon_end) return;
    const int64_t* const end = soon_end - soon < soon_share ? soon_end : soon + soon_share;
    for (; soon < end; ++soon) {
      const int64_t item = *soon;
      if (far.codes) a.codes.prefetch(item * a.L);
      if (far.base) ask_for_row(static_cast<const T*>(a.base) + item * a.D, a.D);
      if (far.table) ask_for(table.slots, item);
      if (far.A) ask_for(lora.A.slots, item);
    }
  }
  FEDPEFT_INLINE void ask_for(const Slots<T>& slots, int64_t row) const {
    ask_for_row(slots.source + row * slots.width, slots.width);
    if (slots.total.rows) ask_for_row(slots.total.rows + row * slots.width, slots.width);
  }

  bool resolve(int64_t begin, int64_t end) {
    if (a.table) table.resolve(begin, end, [&](int64_t n, int64_t) { return items[n]; });
    if (a.A) lora.A.resolve(begin, end, [&](int64_t n, int64_t) { return items[n]; });
    bool known = true;
    if (a.codebooks) {
      with_type(a.codes, [&](const auto* codes) {
        codewords.resolve(begin, end, [&](int64_t n, int64_t level) {
          int64_t code = codes[items[n] * a.L + level];
          if (uint64_t(code) >= uint64_t(a.K)) [[unlikely]] {
            a.bad_code->report(items[n] * a.L + level);
            known = false;
            code = 0;
          }
          return level * a.K + code;
        });
      });
    }
    if (a.buckets) {
      (a.w1 ? senet.table : hashed).resolve(begin, end, [&](int64_t n, int64_t h) {
        return hash_bucket(uint64_t(a.hashes[2 * h]), uint64_t(a.hashes[2 * h + 1]),
                           uint64_t(items[n]), uint64_t(a.M));
      });
    }
    return known;
  }

  // The order of the client's positions in an epoch: ascending random keys.
  void shuffle() {
    const uint32_t stream = philox_stream(Purpose::batch_order, 0, uint32_t(epoch));
    for (int64_t p = 0; p < size; p += kDrawBatch) {
      uint64_t random[kDrawBatch], unused[kDrawBatch];
      philox_batch(uint64_t(p), uint32_t(client), a.round, stream, a.seed, random, unused);
      const int64_t count = size - p < kDrawBatch ? size - p : kDrawBatch;
      for (int64_t i = 0; i < count; ++i) {
        keys[p + i] = random[i] >> 1;
        order[p + i] = int32_t(p + i);
      }
    }
    // Merges runs of doubling length; equal keys keep their order.
    for (int64_t run = 1; run < size; run *= 2) {
      for (int64_t low = 0; low < size; low += 2 * run) {
        const int64_t middle = low + run < size ? low + run : size;
        const int64_t high = low + 2 * run < size ? low + 2 * run : size;
        int64_t i = low, j = middle;
        for (int64_t k = low; k < high; ++k) {
          const bool left = j >= high || (i < middle && keys[order[i]] <= keys[order[j]]);
          spare[k] = left ? order[i++] : order[j++];
        }
      }
      int32_t* swap = order;
      order = spare;
      spare = swap;
    }
  }

  // Sum of the losses of `pairs` pairs of scores; leaves its gradient over `all`, the pairs of the
  // step, in `coefficients`.
  double losses_of(int64_t pairs, int64_t all) {
    T* const slope = difference + pairs;
    if (a.bpr) {
      const T share = T(1) / T(all);
      for (int64_t i = 0; i < pairs; ++i) difference[i] = scores[2 * i + 1] - scores[2 * i];
      losses_and_slopes(pairs, share, difference, slope);
      for (int64_t i = 0; i < pairs; ++i) {
        coefficients[2 * i] = -slope[i];
        coefficients[2 * i + 1] = slope[i];
      }
      return sum_of(difference, pairs);
    }
    const T share = T(0.5) / T(all);
    for (int64_t i = 0; i < pairs; ++i) scores[2 * i] = -scores[2 * i];
    losses_and_slopes(2 * pairs, share, scores, coefficients);
    for (int64_t i = 0; i < pairs; ++i) coefficients[2 * i] = -coefficients[2 * i];
    return sum_of(scores, 2 * pairs) / 2;
  }

  // softplus of x in its place, and share * sigmoid(x).
  static void losses_and_slopes(int64_t n, T share, T* __restrict x, T* __restrict slope) {
    for (int64_t i = 0; i < n; ++i) {
      const T e = exp_nonpositive(-absolute(x[i]));
      slope[i] = share * ((x[i] < 0 ? e : T(1)) / (T(1) + e));
      x[i] = (x[i] > 0 ? x[i] : T(0)) + log1p_unit(e);
    }
  }

  static double sum_of(const T* x, int64_t n) {
    constexpr int64_t kChains = 4;
    double sums[kChains] = {};
    int64_t i = 0;
    for (; i + kChains <= n; i += kChains) {
      for (int64_t j = 0; j < kChains; ++j) sums[j] += double(x[i + j]);
    }
    for (; i < n; ++i) sums[0] += double(x[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The step with an MLP, a block of scores after the other.
  __attribute__((noinline)) double take_mlp_step(const Batch& batch, const LocalStep<T>& step) {
    const int64_t pairs = batch.size / 2;
    double loss = 0;
    mlp.begin(user.p);
    if (a.A) lora.begin_vectors();
    for (int64_t k = 0; k < batch.size; k += kMlpBlock) {
      const Batch block = batch.part(k, kMlpBlock);
      for (int64_t i = 0; i < block.size; ++i) {
        T* const x = mlp.input + i * mlp.input_stride;
        a.base ? copy_row(x, frozen().row(block.draws[i]), a.D) : zero_row(x, a.D);
      }
      for_rows([&](auto& part) { part.add_vectors(block, mlp.input, mlp.input_stride); });
      mlp.forward(a, uint32_t(client), uint32_t(epoch), block.size, k, scores);
      loss += losses_of(block.size / 2, pairs);
      mlp.backward(a, block.size, coefficients);
      for_rows(
          [&](auto& part) { part.add_vector_gradients(block, mlp.input_grad, mlp.input_stride); });
      look_ahead();
    }
    mlp.end(user.p, user.grad);
    mlp.step(step);
    if (a.table) table.slots.step_vectors(step, T(a.l2_items));
    if (a.A) lora.step_vectors(step, T(a.l2_items));
    if (a.codebooks) codewords.slots.step_vectors(step, T(a.l2_items));
    if (a.buckets) hashed.slots.step_vectors(step, T(a.l2_items));
    user.step(step, T(a.l2_user));
    return loss / double(pairs);
  }

  // The parts of item vectors that are trained.
  template <typename F>
  FEDPEFT_INLINE void for_rows(const F& f) {
    if (a.table) f(table);
    if (a.A) f(lora);
    if (a.codebooks) f(codewords);
    if (a.buckets) f(hashed);
  }

  double take_step(const Batch& batch, const LocalStep<T>& step) {
    if (a.layers) return take_mlp_step(batch, step);
    const BasePart<T> base = frozen();
    const int64_t stretch = soon == soon_end ? batch.size : kStretch;
    const T* const u = a.graph ? layer() : user.p;
    const T l2 = T(a.l2_items);
    if (a.base) {
      for (int64_t k = 0; k < batch.size; k += stretch) {
        base.set_scores(batch.part(k, stretch), u, scores + k);
        look_ahead();
      }
    } else {
      zero_row(scores, batch.size);
    }
    look_ahead();
    if (a.table) {
      table.begin(u);
      table.add_scores(batch, scores);
    }
    if (a.A) {
      lora.begin(u);
      lora.A.add_scores(batch, scores);
    }
    if (a.codebooks) {
      codewords.begin(u);
      codewords.add_scores(batch, scores);
    }
    if (a.buckets) {
      if (a.w1) {
        senet.begin(u);
        senet.add_scores(batch, scores);
      } else {
        hashed.begin(u);
        hashed.add_scores(batch, scores);
      }
    }

    look_ahead();
    const double loss = losses_of(batch.size / 2, batch.size / 2) / double(batch.size / 2);
    look_ahead();
    if (a.graph) {
      step_graph(batch, step, u, l2);
      return loss;
    }
    T* user_grad = user.grad;
    for (int64_t k = 0; a.base && k < batch.size; k += stretch) {
      base.step(batch.part(k, stretch), coefficients + k, user_grad);
      look_ahead();
    }
    if (a.table) {
      table.add_gradients(batch, coefficients);
      look_ahead();
      table.step(u, step, l2, user_grad);
    }
    if (a.A) {
      lora.A.add_gradients(batch, coefficients);
      look_ahead();
      lora.step(u, step, l2, user_grad);
    }
    if (a.codebooks) {
      codewords.add_gradients(batch, coefficients);
      look_ahead();
      codewords.step(u, step, l2, user_grad);
    }
    if (a.buckets) {
      if (a.w1) {
        senet.add_gradients(batch, coefficients);
        senet.step(u, step, l2, user_grad);
      } else {
        hashed.add_gradients(batch, coefficients);
        hashed.end_gradients();
        hashed.step(u, step, l2, user_grad);
      }
    }
    look_ahead();
    user.step(step, T(a.l2_user));
    return loss;
  }

  // Rows of an item table, [R, width] of client c.
  void write_rows(const Slots<T>& slots, int64_t c, void* delta) const {
    T* out = static_cast<T*>(delta) + c * a.R * slots.width;
    const int64_t changed = slots.moved ? slots.count : 0;
    for (int64_t s = 0; s < changed; ++s) slots.write_delta(out + s * slots.width, s);
    zero_row(out + changed * slots.width, (a.R - changed) * slots.width);
    int64_t* rows = a.rows + c * a.R;
    for (int64_t s = 0; s < a.R; ++s) rows[s] = s < slots.count ? slots.rows[s] : -1;
  }

  template <typename Part>
  static void write_dense(const Part& part, void* delta, int64_t c) {
    part.write(static_cast<T*>(delta) + c * part.rows * part.width);
  }

  static void write_whole(const Slots<T>& slots, void* delta, int64_t c) {
    slots.write_table(static_cast<T*>(delta) + c * slots.table_rows * slots.width);
  }

  void write(int64_t c) const {
    if (a.table) write_rows(table.slots, c, a.d_table);
    if (a.A) {
      write_rows(lora.A.slots, c, a.d_A);
      write_dense(lora.B, a.d_B, c);
    }
    if (a.codebooks) write_whole(codewords.slots, a.d_codebooks, c);
    if (a.buckets) write_whole(a.w1 ? senet.table.slots : hashed.slots, a.d_buckets, c);
    if (a.buckets && a.w1) {
      write_dense(senet.w1, a.d_w1, c);
      write_dense(senet.b1, a.d_b1, c);
      write_dense(senet.w2, a.d_w2, c);
      write_dense(senet.b2, a.d_b2, c);
    }
  }
};

template <typename T>
int64_t scratch(const LocalTrainArgs& a, int64_t n) {
  return Trainer<T>(a, n, nullptr).scratch();
}

int64_t draws_room(const LocalTrainArgs& a, int64_t n) {
  return Draws::lay_out(a, n, nullptr, nullptr);
}

void draw(const LocalTrainArgs& a, int64_t c, void* room) {
  Draws* draws;
  Draws::lay_out(a, items_of(a, c), room, &draws);
  draws->make(a, c);
}

void ask(const LocalTrainArgs& a, int64_t c) {
  const int64_t client = a.clients[c], first = a.indptr[client], last = a.indptr[client + 1];
  const IndexArray* const read[] = {&a.items, &a.positives};
  for (const IndexArray* index : read) {
    const char* const data = static_cast<const char*>(index->data);
    for (int64_t at = first * index->bytes; at < last * index->bytes; at += 64)
      __builtin_prefetch(data + at, 0, 2);
  }
}

template <typename T>
void train(const LocalTrainArgs& a, int64_t c, const void* draws, const void* ahead, void* scratch,
           LocalSums* sums, double weight) {
  const Draws& mine = *static_cast<const Draws*>(draws);
  Trainer<T>(a, mine.size, scratch).train(c, mine, static_cast<const Draws*>(ahead), sums, weight);
}

}  // namespace

const LocalTrainKernels local_train_kernels = {
    {scratch<float>, scratch<double>}, draws_room, ask, draw, {train<float>, train<double>},
};

}  // namespace fedpeft::FEDPEFT_ISA
