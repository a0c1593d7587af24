// The rows of a table that one client touches, copied beside their optimizer state, and the passes
// over them.
//
// With a dot-product score every gradient of a row is a number times a vector that all rows share
// (the user's, or what LoRA's B makes of it), plus, for SENet, a number times the vector that takes
// the mean. So a step needs one number a row, `alpha`, and two passes over the rows: their dot
// products with the shared vector before the scores, and afterwards, together, their part in the
// user's gradient and the optimizer's step. Rows that never had a gradient are not here, and a row
// here without one does not move: Adam is exact at the cost of the touched rows alone.
#pragma once

#include "common/adam.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

// Hands out pieces of a buffer; without one it only measures.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <typename T>
  FEDPEFT_INLINE T* take(int64_t count) {
    char* at = memory_ ? memory_ + used_ : nullptr;
    used_ += (count * int64_t(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlign = 64;
  char* memory_;
  int64_t used_ = 0;
};

// A client's memory: what training alone needs, and what remains for the sums over clients.
struct Memory {
  Arena work, kept;
};

template <typename T>
FEDPEFT_INLINE int64_t padded(int64_t width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// One optimizer step of a client, the `number`-th.
template <typename T>
struct LocalStep : AdamRates<T> {
  bool adam, first;
  T lr, prox;

  template <typename Args>
  LocalStep(const Args& a, int64_t number)
      : AdamRates<T>(a, number), adam(a.adam), first(number == 1), lr(T(a.lr)), prox(T(a.prox)) {}
};

// Rows [count, stride] with their gradients alpha[s] * x + beta[s] * y + l2 * p + prox * (p -
// start).
template <typename T>
struct RowGradients {
  int64_t count, stride;
  T *p, *m, *v;
  const T* start;  // null without a proximal term
  const T* alpha;
  const T* x;
  const T* beta;  // null: none
  const T* y;     // with beta
  T l2;           // on rows with a gradient
  bool x_moves;   // x is not all zero
};

template <typename T>
FEDPEFT_INLINE bool differs(const T* a, const T* b, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) any |= a[i] != b[i];
  return any;
}

enum class Rule { sgd, adam_first, adam };

// Adds sum_s alpha[s] * p[s] to `into`, with the rows as they were, and takes the optimizer's step:
// columns [d, d + W vectors).
template <int W, Rule rule, bool Extra, typename T>
FEDPEFT_INLINE void step_columns(const RowGradients<T>& r, const LocalStep<T>& step, int64_t d,
                                 T* into) {
  using V = vec_t<T>;
  constexpr int64_t N = kLanes<T>;
  V x[W], sum[W], y[W];
  for (int w = 0; w < W; ++w) {
    x[w] = load(r.x + d + w * N);
    sum[w] = into ? load(into + d + w * N) : V{};
    if constexpr (Extra) y[w] = r.beta ? load(r.y + d + w * N) : V{};
  }
  for (int64_t s = 0; s < r.count; ++s) {
    const T alpha = r.alpha[s];
    T beta = 0;
    if constexpr (Extra) beta = r.beta ? r.beta[s] : T(0);
    bool pulled = (r.x_moves && alpha != 0) || beta != 0;
    // A row that moved before has the proximal term's gradient.
    if (Extra && r.start && !pulled)
      pulled = differs(r.p + s * r.stride, r.start + s * r.stride, r.stride);
    const T l2 = pulled ? r.l2 : T(0);
    const int64_t at = s * r.stride + d;
    for (int w = 0; w < W; ++w) {
      const int64_t i = at + w * N;
      V p = load(r.p + i);
      sum[w] += alpha * p;
      V g = alpha * x[w] + l2 * p;
      if constexpr (Extra) {
        g += beta * y[w];
        if (r.start) g += step.prox * (p - load(r.start + i));
      }
      if constexpr (rule == Rule::sgd) {
        p -= step.lr * g;
      } else if constexpr (rule == Rule::adam_first) {
        // The bias corrections of the first step cancel: m / c1 = g, sqrt(v / c2) = |g|.
        store(r.m + i, step.rest1 * g);
        store(r.v + i, step.rest2 * g * g);
        const V size = g < 0 ? -g : g;
        p -= step.lr * (g / (size + step.eps));
      } else {
        V m = load(r.m + i), v = load(r.v + i);
        p -= step.step(g, m, v);
        store(r.m + i, m);
        store(r.v + i, v);
      }
      store(r.p + i, p);
    }
  }
  if (into) {
    for (int w = 0; w < W; ++w) store(into + d + w * N, sum[w]);
  }
}

template <Rule rule, bool Extra, typename T>
void step_rows(const RowGradients<T>& r, const LocalStep<T>& step, T* into) {
  constexpr int64_t N = kLanes<T>;
  int64_t d = 0;
  for (; d + 4 * N <= r.stride; d += 4 * N) step_columns<4, rule, Extra>(r, step, d, into);
  for (; d < r.stride; d += N) step_columns<1, rule, Extra>(r, step, d, into);
}

template <typename T>
FEDPEFT_INLINE void step_rows(const RowGradients<T>& r, const LocalStep<T>& step, T* into) {
  const bool extra = r.beta || r.start;
  const Rule rule = !step.adam ? Rule::sgd : step.first ? Rule::adam_first : Rule::adam;
  switch (rule) {
    case Rule::sgd:
      return extra ? step_rows<Rule::sgd, true>(r, step, into)
                   : step_rows<Rule::sgd, false>(r, step, into);
    case Rule::adam_first:
      return extra ? step_rows<Rule::adam_first, true>(r, step, into)
                   : step_rows<Rule::adam_first, false>(r, step, into);
    default:
      return extra ? step_rows<Rule::adam, true>(r, step, into)
                   : step_rows<Rule::adam, false>(r, step, into);
  }
}

// out[s] = x . p[s]. The order of a sum depends on the stride alone.
template <typename T>
FEDPEFT_INLINE void dot_rows(const T* p, int64_t count, int64_t stride, const T* x, T* out) {
  constexpr int64_t N = kLanes<T>;
  for (int64_t s = 0; s < count; ++s) {
    const T* row = p + s * stride;
    vec_t<T> even = {}, odd = {};
    int64_t d = 0;
    for (; d + 2 * N <= stride; d += 2 * N) {
      even += load(row + d) * load(x + d);
      odd += load(row + d + N) * load(x + d + N);
    }
    if (d < stride) even += load(row + d) * load(x + d);
    out[s] = lane_sum<T>(even + odd);
  }
}

// How updates are added to sums: weight * update, rounded to a grid by adding and taking away
// 1.5 * 2^52 times its step.
struct Addition {
  double weight, shift;
};

// Makes p [n] what it changed by, rounded as an upload of it would be.
template <typename T>
FEDPEFT_INLINE void settle_row(T* __restrict p, const T* __restrict start, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] -= start[i];
}

// Adds updates to `total`, and gathers in `broken` whether any was NaN or infinite.
template <typename T>
FEDPEFT_INLINE void add_update(double* __restrict total, const T* __restrict update, int64_t n,
                               Addition by, vec_t<double>& broken) {
  constexpr int64_t N = kLanes<double>;
  typedef T Part __attribute__((vector_size(N * sizeof(T))));
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    Part part;
    memcpy(&part, update + i, sizeof(part));
    const vec_t<double> x = __builtin_convertvector(part, vec_t<double>);
    store(total + i, load(total + i) + ((by.weight * x + by.shift) - by.shift));
    broken += x - x;
  }
  for (; i < n; ++i) {
    const double x = double(update[i]);
    total[i] += (by.weight * x + by.shift) - by.shift;
    broken[0] += x - x;
  }
}

// Whether a NaN was gathered; what else is gathered is 0.
FEDPEFT_INLINE bool is_broken(vec_t<double> broken) {
  const double sum = lane_sum<double>(broken);
  return sum != sum;
}

// Touched rows of a table [rows, width], in order of first touch.
template <typename T>
struct Slots {
  int64_t table_rows = 0, width = 0, stride = 0, capacity = 0;
  const T* source = nullptr;
  // Row -> slot: an array over the table where that is small, else a hash table with linear
  // probing.
  bool direct = true;
  int64_t map_size = 0;
  int64_t* keys = nullptr;
  int32_t* slot_of = nullptr;

  int64_t* rows = nullptr;  // [capacity]
  // For sums over clients: slots grouped by the task that adds their rows, and where each task's
  // begin.
  int32_t *by_task = nullptr, *first_of = nullptr;  // [capacity], [tasks + 1]
  int64_t tasks = 0;
  T *p = nullptr, *m = nullptr, *v = nullptr, *start = nullptr;
  T *alpha = nullptr, *beta = nullptr, *dots = nullptr;
  int64_t count = 0;

  void lay_out(Memory& memory, const void* table, int64_t table_rows_, int64_t width_,
               int64_t touches, bool adam, bool prox, bool with_beta, int64_t tasks_) {
    Arena &arena = memory.work, &kept = memory.kept;
    source = static_cast<const T*>(table);
    table_rows = table_rows_;
    width = width_;
    stride = padded<T>(width);
    capacity = touches < table_rows ? touches : table_rows;
    map_size = 16;
    while (map_size < 2 * capacity) map_size *= 2;
    direct = table_rows <= 4 * map_size;  // clearing more would cost more than probing
    if (direct) map_size = table_rows;
    keys = direct ? nullptr : arena.take<int64_t>(map_size);
    slot_of = arena.take<int32_t>(map_size);
    rows = kept.take<int64_t>(capacity);
    tasks = tasks_;
    if (tasks > 0) {
      by_task = kept.take<int32_t>(capacity);
      first_of = kept.take<int32_t>(tasks + 1);
    }
    p = kept.take<T>(capacity * stride);
    if (adam) {
      m = arena.take<T>(capacity * stride);
      v = arena.take<T>(capacity * stride);
    }
    if (prox) start = arena.take<T>(capacity * stride);
    alpha = arena.take<T>(capacity);
    if (with_beta) beta = arena.take<T>(capacity);
    dots = arena.take<T>(capacity);
  }

  void clear() {
    count = 0;
    memset(slot_of, 0xff, sizeof(int32_t) * size_t(map_size));
    zero_row(alpha, capacity);
    if (beta) zero_row(beta, capacity);
  }

  FEDPEFT_INLINE void prefetch(int64_t row) const { prefetch_row(source + row * width, width); }

  // Slot of a row, which is copied at its first touch.
  FEDPEFT_INLINE int32_t touch(int64_t row) {
    int64_t at = row;
    if (direct) {
      if (slot_of[at] >= 0) return slot_of[at];
    } else {
      at = int64_t(uint64_t(row) * 0x9E3779B97F4A7C15u >> 32) & (map_size - 1);
      for (; slot_of[at] >= 0; at = (at + 1) & (map_size - 1)) {
        if (keys[at] == row) return slot_of[at];
      }
      keys[at] = row;
    }
    const int64_t s = count++;
    slot_of[at] = int32_t(s);
    rows[s] = row;
    copy_in(p + s * stride, row);
    if (start) copy_in(start + s * stride, row);
    return int32_t(s);
  }

  FEDPEFT_INLINE void copy_in(T* to, int64_t row) const {
    copy_row(to, source + row * width, width);
    for (int64_t d = width; d < stride; ++d) to[d] = 0;
  }

  // Moments of rows first touched after the first step start at zero.
  void zero_moments(int64_t from, int64_t to) {
    if (!m || from >= to) return;
    zero_row(m + from * stride, (to - from) * stride);
    zero_row(v + from * stride, (to - from) * stride);
  }

  void forget_gradients() {
    zero_row(alpha, count);
    if (beta) zero_row(beta, count);
  }

  FEDPEFT_INLINE void write_delta(T* out, int64_t s) const {
    const T *now = p + s * stride, *then = source + rows[s] * width;
    for (int64_t d = 0; d < width; ++d) out[d] = now[d] - then[d];
  }

  // Rows in groups of 8, whose totals share no cache line with another group's, to tasks.
  FEDPEFT_INLINE int64_t task_of(int64_t row) const {
    const uint32_t mixed = uint32_t(uint64_t(row >> 3) * 0x9E3779B97F4A7C15u >> 32);
    return int64_t(uint64_t(mixed) * uint64_t(tasks) >> 32);
  }

  void group_by_task() {
    for (int64_t t = 0; t <= tasks; ++t) first_of[t] = 0;
    for (int64_t s = 0; s < count; ++s) ++first_of[task_of(rows[s])];
    int32_t begin = 0;
    for (int64_t t = 0; t <= tasks; ++t) {
      const int32_t size = first_of[t];
      first_of[t] = begin;
      begin += size;
    }
    for (int64_t s = 0; s < count; ++s) by_task[first_of[task_of(rows[s])]++] = int32_t(s);
    for (int64_t t = tasks; t > 0; --t)
      first_of[t] = first_of[t - 1];  // where they were filled from
    first_of[0] = 0;
  }

  // Leaves in `p` what each row changed by, for add_to.
  void settle() {
    for (int64_t s = 0; s < count; ++s) settle_row(p + s * stride, source + rows[s] * width, width);
  }

  // Adds a task's rows, settled, to `total` [table_rows, width]. True where one is NaN or infinite.
  bool add_to(double* total, int64_t task, Addition by) const {
    constexpr int64_t kAhead = 32;  // the rows are in no order, and may have to come from memory
    const int32_t *slot = by_task + first_of[task], *stop = by_task + first_of[task + 1];
    for (const int32_t* next = slot; next < stop && next < slot + kAhead; ++next)
      prefetch_row(total + rows[*next] * width, width);
    vec_t<double> broken = {};
    for (; slot < stop; ++slot) {
      if (stop - slot > kAhead) prefetch_row(total + rows[slot[kAhead]] * width, width);
      const int64_t s = *slot;
      add_update(total + rows[s] * width, p + s * stride, width, by, broken);
    }
    return is_broken(broken);
  }

  // [table_rows, width], zero where nothing was touched.
  void write_table(void* delta) const {
    T* out = static_cast<T*>(delta);
    if (!direct) {
      zero_row(out, table_rows * width);
      for (int64_t s = 0; s < count; ++s) write_delta(out + rows[s] * width, s);
      return;
    }
    for (int64_t row = 0; row < table_rows; ++row) {
      if (slot_of[row] < 0) {
        zero_row(out + row * width, width);
      } else {
        write_delta(out + row * width, slot_of[row]);
      }
    }
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
