// CPU kernel of local_train: one client from its first draw to its upload.
#include "local_train/local_train_cpu.h"

#include "common/draws.h"
#include "common/vec.h"
#include "local_train/parts.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

template <typename T>
class Trainer {
 public:
  Trainer(const LocalTrainArgs& args, int64_t n, void* scratch, void* kept)
      : a(args), size(n), memory{Arena(scratch), Arena(kept)} {
    const int64_t draws = n * (1 + a.epochs), batch = 2 * n;
    Arena& arena = memory.work;
    items = arena.take<int64_t>(draws);
    batch_draws = arena.take<int32_t>(batch);
    scores = arena.take<T>(batch);
    coefficients = arena.take<T>(batch);
    difference = arena.take<T>(2 * n);
    if (a.batch > 0) {
      order = arena.take<int32_t>(n);
      spare = arena.take<int32_t>(n);
      keys = arena.take<uint64_t>(n);
    }
    user.lay_out(memory, a, a.user, 1, a.D, false);
    if (a.table) table.lay_out(memory, a, a.table, a.num_items, a.D, 1, draws, false);
    if (a.A) lora.lay_out(memory, a, draws);
    if (a.codebooks) codewords.lay_out(memory, a, a.codebooks, a.L * a.K, a.D, a.L, draws, false);
    if (a.buckets && a.w1) senet.lay_out(memory, a, draws, batch);
    if (a.buckets && !a.w1) {
      hashed.lay_out(memory, a, a.buckets, a.M, a.D, a.H, draws, false);
      hashed.scale = a.mean ? T(1) / T(a.H) : T(1);
    }
  }

  int64_t scratch() const { return memory.work.used(); }
  int64_t kept() const { return memory.kept.used(); }

  void train(int64_t c) {
    client = a.clients[c];
    first = a.indptr[client];
    if (!start()) return;
    double loss = 0;
    int64_t steps = 0;
    for (int64_t epoch = 0; epoch < a.epochs; ++epoch) {
      if (!draw_negatives(epoch)) return;
      if (a.batch > 0) shuffle(epoch);
      const int64_t most = a.batch > 0 ? a.batch : size;
      for (int64_t at = 0; at < size; at += most) {
        const int64_t count = size - at < most ? size - at : most;
        for (int64_t i = 0; i < count; ++i) {
          const int64_t positive = order ? order[at + i] : at + i;
          batch_draws[2 * i] = int32_t(positive);
          batch_draws[2 * i + 1] = int32_t((1 + epoch) * size + positive);
        }
        loss += take_step(Batch{batch_draws, 2 * count}, ++steps);
      }
    }
    a.losses[c] = steps ? loss / double(steps) : 0.0;
    if (a.sum_tasks == 0) {
      write(c);
      return;
    }
    for_slots([](Slots<T>& slots) {
      slots.settle();
      slots.group_by_task();
    });
    if (a.A) lora.B.settle();
    if (a.buckets && a.w1) {
      senet.w1.settle();
      senet.b1.settle();
      senet.w2.settle();
      senet.b2.settle();
    }
  }

  // Of a client that was trained with the same `kept`.
  int64_t task_rows(int64_t task) {
    const Slots<T>& slots = a.table ? table.slots : lora.A.slots;
    return a.table || a.A ? slots.first_of[task + 1] - slots.first_of[task] : 0;
  }

  uint32_t sum(int64_t c, int64_t task, int64_t*& fresh) {
    const Addition by{a.weights[c], a.shift};
    uint32_t broken = 0;
    const auto add_rows = [&](const Slots<T>& slots, double* total, BrokenPart part) {
      broken |= uint32_t(slots.add_to(total, task, by)) << part;
    };
    const auto add_dense = [&](const DensePart<T>& dense, double* total, BrokenPart part) {
      if (task == 0) broken |= uint32_t(dense.add_to(total, by)) << part;
    };
    if (a.table || a.A) {
      const Slots<T>& slots = a.table ? table.slots : lora.A.slots;
      for (int32_t i = a.touched ? slots.first_of[task] : slots.first_of[task + 1];
           i < slots.first_of[task + 1]; ++i) {
        const int64_t row = slots.rows[slots.by_task[i]];
        *fresh = row;
        fresh += !a.touched[row];
        a.touched[row] = 1;
      }
    }
    if (a.table) add_rows(table.slots, a.sum_table, broken_table);
    if (a.A) {
      add_rows(lora.A.slots, a.sum_A, broken_A);
      add_dense(lora.B, a.sum_B, broken_B);
    }
    if (a.codebooks) add_rows(codewords.slots, a.sum_codebooks, broken_codebooks);
    if (a.buckets) add_rows(a.w1 ? senet.table.slots : hashed.slots, a.sum_buckets, broken_buckets);
    if (a.buckets && a.w1) {
      add_dense(senet.w1, a.sum_w1, broken_w1);
      add_dense(senet.b1, a.sum_b1, broken_b1);
      add_dense(senet.w2, a.sum_w2, broken_w2);
      add_dense(senet.b2, a.sum_b2, broken_b2);
    }
    if (task == 0) copy_row(static_cast<T*>(a.new_user) + c * a.D, user.p, a.D);
    return broken;
  }

 private:
  const LocalTrainArgs& a;
  const int64_t size;
  Memory memory;
  int64_t client = 0, first = 0;
  int64_t* items;        // [draws]: the positives, then each epoch's negatives
  int32_t* batch_draws;  // positives and negatives alternating, so that what cancels in a pair
                         // cancels exactly
  T *scores, *coefficients, *difference;
  int32_t *order = nullptr, *spare = nullptr;
  uint64_t* keys = nullptr;
  DensePart<T> user;
  RowsPart<T> table, codewords, hashed;
  LoraPart<T> lora;
  SenetPart<T> senet;

  bool start() {
    for (int64_t i = 0; i < size; ++i) {
      items[i] = a.items[first + i];
      if (classify(items[i], a.num_items) != Position::item) {
        a.bad_item->report(first + i);
        return false;
      }
      const int64_t at = a.positives[first + i];
      if (at >= a.num_items || at <= (i ? a.positives[first + i - 1] : -1)) {
        a.bad_order->report(first + i);
        return false;
      }
    }
    if (size >= a.num_items) {
      a.no_negative->report(client);
      return false;
    }
    user.source = static_cast<const T*>(a.user) + client * a.D;
    user.load_start();
    for_slots([](Slots<T>& slots) { slots.clear(); });
    if (a.A) lora.B.load_start();
    if (a.buckets && a.w1) senet.load_start();
    prefetch(0, size);
    return resolve(0, size);
  }

  template <typename F>
  FEDPEFT_INLINE void for_slots(const F& f) {
    if (a.table) f(table.slots);
    if (a.A) f(lora.A.slots);
    if (a.codebooks) f(codewords.slots);
    if (a.buckets) f(a.w1 ? senet.table.slots : hashed.slots);
  }

  // Draws of an epoch, as sample_negatives makes them.
  bool draw_negatives(int64_t epoch) {
    const int64_t begin = (1 + epoch) * size;
    const uint64_t choices = uint64_t(a.num_items - size);
    const uint32_t stream = philox_stream(Purpose::negatives, 0, uint32_t(epoch));
    for (int64_t p = 0; p < size; p += kDrawBatch) {
      uint64_t random[kDrawBatch], unused[kDrawBatch];
      philox_batch(uint64_t(p), uint32_t(client), a.round, stream, a.seed, random, unused);
      const int64_t count = size - p < kDrawBatch ? size - p : kDrawBatch;
      int64_t rank[kDrawBatch], drawn[kDrawBatch];
      for (int64_t i = 0; i < kDrawBatch; ++i) rank[i] = int64_t(multiply_high(random[i], choices));
      a.positives.bytes == 8
          ? kth_negatives(static_cast<const int64_t*>(a.positives.data) + first, size, rank, drawn)
          : kth_negatives(static_cast<const int32_t*>(a.positives.data) + first, size, rank, drawn);
      for (int64_t i = 0; i < count; ++i) items[begin + p + i] = drawn[i];
    }
    prefetch(begin, begin + size);
    int64_t settled[5] = {}, i = 0;
    for_slots([&](Slots<T>& slots) { settled[i++] = slots.count; });
    if (!resolve(begin, begin + size)) return false;
    i = 0;
    // The first epoch's rows get their moments from the first step.
    for_slots([&](Slots<T>& slots) {
      if (epoch > 0) slots.zero_moments(settled[i], slots.count);
      ++i;
    });
    return true;
  }

  FEDPEFT_INLINE void prefetch(int64_t begin, int64_t end) const {
    for (int64_t n = begin; n < end; ++n) {
      if (a.codebooks) a.codes.prefetch(items[n] * a.L);
      if (a.base) prefetch_row(static_cast<const T*>(a.base) + items[n] * a.D, a.D);
      if (a.table) table.slots.prefetch(items[n]);
      if (a.A) lora.A.slots.prefetch(items[n]);
    }
  }

  bool resolve(int64_t begin, int64_t end) {
    if (a.table) table.resolve(begin, end, [&](int64_t n, int64_t) { return items[n]; });
    if (a.A) lora.A.resolve(begin, end, [&](int64_t n, int64_t) { return items[n]; });
    bool known = true;
    if (a.codebooks) {
      codewords.resolve(begin, end, [&](int64_t n, int64_t level) {
        int64_t code = a.codes[items[n] * a.L + level];
        if (uint64_t(code) >= uint64_t(a.K)) [[unlikely]] {
          a.bad_code->report(items[n] * a.L + level);
          known = false;
          code = 0;
        }
        return level * a.K + code;
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
  void shuffle(int64_t epoch) {
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

  // Loss of a step, the mean over its positives; leaves its gradient in `coefficients`.
  double loss_of(int64_t pairs) {
    T* other = difference + pairs;
    double total = 0;
    if (a.bpr) {
      const T share = T(1) / T(pairs);
      for (int64_t i = 0; i < pairs; ++i) difference[i] = scores[2 * i + 1] - scores[2 * i];
      for (int64_t i = 0; i < pairs; ++i) other[i] = softplus(difference[i]);
      for (int64_t i = 0; i < pairs; ++i) total += double(other[i]);
      for (int64_t i = 0; i < pairs; ++i) difference[i] = share * sigmoid(difference[i]);
      for (int64_t i = 0; i < pairs; ++i) {
        coefficients[2 * i] = -difference[i];
        coefficients[2 * i + 1] = difference[i];
      }
      return total / double(pairs);
    }
    const T share = T(0.5) / T(pairs);
    for (int64_t i = 0; i < pairs; ++i) {
      difference[2 * i] = -scores[2 * i];
      difference[2 * i + 1] = scores[2 * i + 1];
    }
    for (int64_t i = 0; i < 2 * pairs; ++i) scores[i] = softplus(difference[i]);
    for (int64_t i = 0; i < 2 * pairs; ++i) total += double(scores[i]);
    for (int64_t i = 0; i < 2 * pairs; ++i) coefficients[i] = share * sigmoid(difference[i]);
    for (int64_t i = 0; i < pairs; ++i) coefficients[2 * i] = -coefficients[2 * i];
    return total / double(2 * pairs);
  }

  double take_step(const Batch& batch, int64_t number) {
    const LocalStep<T> step(a, number);
    const BasePart<T> base{static_cast<const T*>(a.base), items, a.D};
    const T* u = user.p;
    const T l2 = T(a.l2_items);
    zero_row(scores, batch.size);
    if (a.base) base.add_scores(batch, u, scores);
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

    const double loss = loss_of(batch.size / 2);
    T* user_grad = user.grad;
    if (a.base) base.step(batch, coefficients, user_grad);
    if (a.table) {
      table.add_gradients(batch, coefficients);
      table.step(u, step, l2, user_grad);
    }
    if (a.A) {
      lora.A.add_gradients(batch, coefficients);
      lora.step(u, step, l2, user_grad);
    }
    if (a.codebooks) {
      codewords.add_gradients(batch, coefficients);
      codewords.step(u, step, l2, user_grad);
    }
    if (a.buckets) {
      if (a.w1) {
        senet.add_gradients(batch, coefficients);
        senet.step(u, step, l2, user_grad);
      } else {
        hashed.add_gradients(batch, coefficients);
        hashed.step(u, step, l2, user_grad);
      }
    }
    user.step(step, T(a.l2_user));
    return loss;
  }

  // Rows of an item table, [R, width] of client c.
  void write_rows(const Slots<T>& slots, int64_t c, void* delta) const {
    T* out = static_cast<T*>(delta) + c * a.R * slots.width;
    for (int64_t s = 0; s < slots.count; ++s) slots.write_delta(out + s * slots.width, s);
    zero_row(out + slots.count * slots.width, (a.R - slots.count) * slots.width);
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
    copy_row(static_cast<T*>(a.new_user) + c * a.D, user.p, a.D);
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

FEDPEFT_INLINE int64_t items_of(const LocalTrainArgs& a, int64_t c) {
  const int64_t client = a.clients[c];
  return a.indptr[client + 1] - a.indptr[client];
}

template <typename T>
int64_t scratch(const LocalTrainArgs& a, int64_t n) {
  return Trainer<T>(a, n, nullptr, nullptr).scratch();
}

template <typename T>
int64_t kept(const LocalTrainArgs& a, int64_t n) {
  return Trainer<T>(a, n, nullptr, nullptr).kept();
}

template <typename T>
void train(const LocalTrainArgs& a, int64_t c, void* scratch, void* kept) {
  Trainer<T>(a, items_of(a, c), scratch, kept).train(c);
}

template <typename T>
uint32_t sum(const LocalTrainArgs& a, int64_t c, int64_t task, void* kept, int64_t*& fresh) {
  return Trainer<T>(a, items_of(a, c), nullptr, kept).sum(c, task, fresh);
}

template <typename T>
int64_t task_rows(const LocalTrainArgs& a, int64_t c, int64_t task, void* kept) {
  return Trainer<T>(a, items_of(a, c), nullptr, kept).task_rows(task);
}

}  // namespace

const LocalTrainKernels local_train_kernels = {
    {scratch<float>, scratch<double>},     {kept<float>, kept<double>},
    {train<float>, train<double>},         {sum<float>, sum<double>},
    {task_rows<float>, task_rows<double>},
};

}  // namespace fedpeft::FEDPEFT_ISA
