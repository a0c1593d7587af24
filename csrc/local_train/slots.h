// The rows of a table that one client touches, copied beside their optimizer state, and the passes
// over them.
//
// With a dot-product score every gradient of a row is a number times a vector that all rows share
// (the user's, or what LoRA's B makes of it), plus, for SENet, a number times the vector that takes
// the mean. So a step needs one number a row, `alpha`, and two passes over the rows: their dot
// products with the shared vector before the scores, and afterwards, together, their part in the
// user's gradient and the optimizer's step. Rows that never had a gradient are not here, and a row
// here without one does not move: Adam is exact at the cost of the touched rows alone. For the same
// reason a small table that a client nearly covers is taken whole.
//
// With an MLP (mlp.h) rows have gradients of their own, vectors that lie beside them.
//
// Where rows fill whole vectors, a start is read in the table and never copied, and the last step
// adds what it leaves straight to the sums over clients.
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

template <typename T>
FEDPEFT_INLINE int64_t padded(int64_t width) {
  return (width + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// One optimizer step of a client, the `number`-th.
template <typename T>
struct LocalStep : AdamRates<T> {
  bool adam, first, last;
  T lr, prox;

  template <typename Args>
  LocalStep(const Args& a, int64_t number, int64_t steps)
      : AdamRates<T>(a, number),
        adam(a.adam),
        first(number == 1),
        last(number == steps),
        lr(T(a.lr)),
        prox(T(a.prox)) {}
};

// How updates are added to sums: weight * update, rounded to a grid by adding and taking away
// 1.5 * 2^52 times its step.
struct Addition {
  double weight, shift;
};

// A vector of updates, or as many floats as a vector of doubles has lanes, as doubles.
typedef float FloatPart __attribute__((vector_size(kLanes<double> * sizeof(float))));
FEDPEFT_INLINE vec_t<double> as_double(vec_t<double> v) { return v; }
FEDPEFT_INLINE vec_t<double> as_double(FloatPart v) {
#if FEDPEFT_VEC_BYTES == 32  // the compiler converts in halves, by way of memory
  return (vec_t<double>)_mm256_cvtps_pd((__m128)v);
#elif FEDPEFT_VEC_BYTES == 64
  return (vec_t<double>)_mm512_cvtps_pd((__m256)v);
#else
  return __builtin_convertvector(v, vec_t<double>);
#endif
}

// Adds kLanes<double> updates to `total`.
FEDPEFT_INLINE void add_part(double* total, vec_t<double> x, Addition by) {
  store(total, load(total) + (multiply_add(by.weight, x, by.shift - vec_t<double>{}) - by.shift));
}

// Adds a vector of updates to `total`.
FEDPEFT_INLINE void add_vector(double* total, vec_t<double> update, Addition by) {
  add_part(total, update, by);
}
FEDPEFT_INLINE void add_vector(double* total, vec_t<float> update, Addition by) {
#if FEDPEFT_VEC_BYTES == 32
  const FloatPart low = (FloatPart)_mm256_castps256_ps128((__m256)update),
                  high = (FloatPart)_mm256_extractf128_ps((__m256)update, 1);
#else
  FloatPart low, high;
  memcpy(&low, &update, sizeof(low));
  memcpy(&high, reinterpret_cast<const char*>(&update) + sizeof(low), sizeof(high));
#endif
  add_part(total, as_double(low), by);
  add_part(total + kLanes<double>, as_double(high), by);
}

// Adds now - then [n] to `total`, each difference rounded as an upload of it would be, and gathers
// in `broken` whether any was NaN or infinite.
template <typename T>
FEDPEFT_INLINE void add_difference(double* __restrict total, const T* __restrict now,
                                   const T* __restrict then, int64_t n, Addition by,
                                   vec_t<double>& broken) {
  constexpr int64_t N = kLanes<double>;
  typedef T Part __attribute__((vector_size(N * sizeof(T))));
  int64_t i = 0;
  for (; i + N <= n; i += N) {
    Part a, b;
    memcpy(&a, now + i, sizeof(a));
    memcpy(&b, then + i, sizeof(b));
    const vec_t<double> x = as_double(a - b);
    add_part(total + i, x, by);
    broken += x - x;
  }
  for (; i < n; ++i) {
    const double x = double(T(now[i] - then[i]));
    total[i] += multiply_add(by.weight, x, by.shift) - by.shift;
    broken[0] += x - x;
  }
}

// Whether a NaN was gathered; what else is gathered is 0.
template <typename T>
FEDPEFT_INLINE bool is_broken(vec_t<T> broken) {
  const T sum = lane_sum<T>(broken);
  return sum != sum;
}

// A sum over clients of rows of a table, as one thread adds to it.
struct Total {
  double* rows = nullptr;    // null: uploads are asked for
  uint8_t* locks = nullptr;  // [kTotalLocks]; null: no other thread adds here
  Addition by{};
  bool broken = false;  // an update was NaN or infinite

  // Keeps other threads out of a row.
  FEDPEFT_INLINE uint8_t* lock_of(int64_t row) const {
    return locks + (uint64_t(row) * 0x9E3779B97F4A7C15u >> 32) % kTotalLocks;
  }
  FEDPEFT_INLINE void enter(int64_t row) const {
    if (!locks) return;
    uint8_t* lock = lock_of(row);
    while (__atomic_exchange_n(lock, uint8_t(1), __ATOMIC_ACQUIRE)) {
      while (__atomic_load_n(lock, __ATOMIC_RELAXED)) {
      }
    }
  }
  FEDPEFT_INLINE void leave(int64_t row) const {
    if (locks) __atomic_store_n(lock_of(row), uint8_t(0), __ATOMIC_RELEASE);
  }
  FEDPEFT_INLINE void prefetch(int64_t row, int64_t width) const {
    if (locks) __builtin_prefetch(lock_of(row), 1);
    const char* at = reinterpret_cast<const char*>(rows + row * width);
    const int64_t all = width * int64_t(sizeof(double)), size = all < 512 ? all : 512;
    for (int64_t b = 0; b < size; b += 64) __builtin_prefetch(at + b, 1);
  }
};

// Rows [count, stride] with their gradients alpha[s] * x + beta[s] * y + l2 * p + prox * (p -
// start).
template <typename T>
struct RowGradients {
  int64_t count, stride;
  T *p, *m, *v;
  const T* start = nullptr;       // copied; null: in the table, or no proximal term
  const T* source = nullptr;      // the table, where its rows fill whole vectors; else null
  const int64_t* rows = nullptr;  // of the table; null: slot s is row s
  bool at_source = false;         // p is to be read there
  bool proximal = false;
  const T* alpha;
  const T* x;
  const T* beta = nullptr;  // null: none
  const T* y = nullptr;     // with beta
  T l2;                     // on rows with a gradient
  bool x_moves;             // x is not all zero
  Total* total = nullptr;   // takes the rows' updates, in place of p, m and v
};

template <typename T>
FEDPEFT_INLINE bool differs(const T* a, const T* b, int64_t n) {
  bool any = false;
  for (int64_t i = 0; i < n; ++i) any |= a[i] != b[i];
  return any;
}

enum class Rule { sgd, adam_first, adam };

// Moves p along -g; m and v are the moments, before and after (with adam_first after alone).
template <Rule rule, typename T>
FEDPEFT_INLINE void move(const LocalStep<T>& step, vec_t<T> g, vec_t<T>& p, vec_t<T>& m,
                         vec_t<T>& v) {
  if constexpr (rule == Rule::sgd) {
    p = multiply_add(-step.lr, g, p);
  } else if constexpr (rule == Rule::adam_first) {
    // The bias corrections of the first step cancel: m / c1 = g, sqrt(v / c2) = |g|.
    m = step.rest1 * g;
    v = step.rest2 * g * g;
    const vec_t<T> size = g < 0 ? -g : g;
    p = multiply_add(-step.lr, g / (size + step.eps), p);
  } else {
    step.step(g, p, m, v);
  }
}

// Adds sum_s alpha[s] * p[s] to `into`, with the rows as they were, and takes the optimizer's step:
// columns [d, d + W vectors). By value: what is stored to could else be taken for a part of these.
template <int W, Rule rule, bool Extra, bool Ends, typename T>
FEDPEFT_INLINE void step_columns(const RowGradients<T> r, const LocalStep<T> step, int64_t d,
                                 T* into) {
  using V = vec_t<T>;
  constexpr int64_t N = kLanes<T>;
  constexpr int64_t kAhead = 8;
  V x[W], sum[W], y[W], broken = {};
  for (int w = 0; w < W; ++w) {
    x[w] = load(r.x + d + w * N);
    sum[w] = into ? load(into + d + w * N) : V{};
    if constexpr (Extra) y[w] = r.beta ? load(r.y + d + w * N) : V{};
  }
  double* const total = Ends ? r.total->rows : nullptr;
  const Addition by = Ends ? r.total->by : Addition{};
  for (int64_t s = 0; s < r.count; ++s) {
    const int64_t row = r.rows ? r.rows[s] : s, at = s * r.stride + d;
    const T* const began = r.source  ? r.source + row * r.stride + d
                           : r.start ? r.start + at
                                     : nullptr;
    const T* const now = r.at_source ? began : r.p + at;
    const T alpha = r.alpha[s];
    T beta = 0;
    if constexpr (Extra) beta = r.beta ? r.beta[s] : T(0);
    bool pulled = (r.x_moves && alpha != 0) || beta != 0;
    // A row that moved before has the proximal term's gradient.
    if (Extra && r.proximal && !pulled) pulled = differs(now - d, began - d, r.stride);
    const T l2 = pulled ? r.l2 : T(0);
    if (Ends && r.rows && s + kAhead < r.count) r.total->prefetch(r.rows[s + kAhead], r.stride);
    for (int w = 0; w < W; ++w) {
      const int64_t i = at + w * N;
      V p = load(now + w * N);
      sum[w] = multiply_add(alpha, p, sum[w]);
      V g = multiply_add(alpha, x[w], l2 * p);
      if constexpr (Extra) {
        g = multiply_add(beta, y[w], g);
        if (r.proximal) g = multiply_add(step.prox, p - load(began + w * N), g);
      }
      V m, v;
      if constexpr (rule == Rule::adam) {
        m = load(r.m + i);
        v = load(r.v + i);
      }
      move<rule, T>(step, g, p, m, v);
      if constexpr (Ends) {
        const V update = p - load(began + w * N);
        broken += update - update;
        add_vector(total + row * r.stride + d + w * N, update, by);
      } else {
        store(r.p + i, p);
        if constexpr (rule != Rule::sgd) {
          store(r.m + i, m);
          store(r.v + i, v);
        }
      }
    }
  }
  if (Ends && is_broken<T>(broken)) r.total->broken = true;
  if (into) {
    for (int w = 0; w < W; ++w) store(into + d + w * N, sum[w]);
  }
}

template <Rule rule, bool Extra, bool Ends, typename T>
void step_rows(const RowGradients<T>& r, const LocalStep<T>& step, T* into) {
  constexpr int64_t N = kLanes<T>;
  int64_t d = 0;
  for (; d + 4 * N <= r.stride; d += 4 * N) step_columns<4, rule, Extra, Ends>(r, step, d, into);
  for (; d < r.stride; d += N) step_columns<1, rule, Extra, Ends>(r, step, d, into);
}

template <Rule rule, typename T>
FEDPEFT_INLINE void step_rows(const RowGradients<T>& r, const LocalStep<T>& step, T* into) {
  if (r.beta || r.proximal) {
    r.total ? step_rows<rule, true, true>(r, step, into)
            : step_rows<rule, true, false>(r, step, into);
  } else {
    r.total ? step_rows<rule, false, true>(r, step, into)
            : step_rows<rule, false, false>(r, step, into);
  }
}

template <typename T>
FEDPEFT_INLINE void step_rows(const RowGradients<T>& r, const LocalStep<T>& step, T* into) {
  if (!step.adam) return step_rows<Rule::sgd>(r, step, into);
  step.first ? step_rows<Rule::adam_first>(r, step, into) : step_rows<Rule::adam>(r, step, into);
}

// Rows [count, stride] with gradients of their own; `now(s)` is where row s is, `start(s)` where it
// was at the start, null where no proximal term is to pull it back.
template <typename T>
struct OwnGradients {
  int64_t count, stride;
  T *p, *m, *v, *grad;
  T l2;  // on rows with a gradient
};

// Takes the optimizer's step and makes the gradients zero.
template <Rule rule, bool Last, typename T, typename Now, typename Start>
void step_own(const OwnGradients<T> r, const LocalStep<T> step, const Now& now,
              const Start& start) {
  using V = vec_t<T>;
  constexpr int64_t N = kLanes<T>;
  for (int64_t s = 0; s < r.count; ++s) {
    const T *const from = now(s), *const began = step.prox > 0 ? start(s) : nullptr;
    T *const p = r.p + s * r.stride, *const grad = r.grad + s * r.stride;
    const int64_t moments = rule == Rule::sgd ? 0 : s * r.stride;  // which SGD does not have
    T *const m = r.m + moments, *const v = r.v + moments;
    const bool pulled =
        r.l2 != 0 && (any_nonzero(grad, r.stride) || (began && differs(from, began, r.stride)));
    const T l2 = pulled ? r.l2 : T(0);
    for (int64_t d = 0; d < r.stride; d += N) {
      V x = load(from + d), g = multiply_add(l2, x, load(grad + d));
      if (began) g = multiply_add(step.prox, x - load(began + d), g);
      store(grad + d, V{});
      V first, second;
      if constexpr (rule == Rule::adam) {
        first = load(m + d);
        second = load(v + d);
      }
      move<rule, T>(step, g, x, first, second);
      store(p + d, x);
      if constexpr (rule != Rule::sgd && !Last) {  // nobody reads what the last step would leave
        store(m + d, first);
        store(v + d, second);
      }
    }
  }
}

template <typename T, typename Now, typename Start>
FEDPEFT_INLINE void step_own(const OwnGradients<T>& r, const LocalStep<T>& step, const Now& now,
                             const Start& start) {
  if (!step.adam) return step_own<Rule::sgd, false>(r, step, now, start);
  if (step.first) return step_own<Rule::adam_first, false>(r, step, now, start);
  step.last ? step_own<Rule::adam, true>(r, step, now, start)
            : step_own<Rule::adam, false>(r, step, now, start);
}

// The sum of each of kLanes vectors, in the order of lane_sum.
template <typename T>
FEDPEFT_INLINE vec_t<T> lane_sums(const vec_t<T> (&v)[kLanes<T>]) {
#if FEDPEFT_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    __m256 half[4];  // of rows i and i + 4
    for (int i = 0; i < 4; ++i) {
      const __m256 a = (__m256)v[i], b = (__m256)v[i + 4];
      half[i] =
          _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
    }
    const __m256 first = _mm256_add_ps(_mm256_unpacklo_ps(half[0], half[1]),
                                       _mm256_unpackhi_ps(half[0], half[1])),
                 second = _mm256_add_ps(_mm256_unpacklo_ps(half[2], half[3]),
                                        _mm256_unpackhi_ps(half[2], half[3]));
    return (vec_t<T>)_mm256_add_ps(_mm256_shuffle_ps(first, second, 0x44),
                                   _mm256_shuffle_ps(first, second, 0xee));
  }
#endif
  vec_t<T> sums = {};
  for (int64_t i = 0; i < kLanes<T>; ++i) sums[i] = lane_sum<T>(v[i]);
  return sums;
}

// x . row, lane by lane. The order of a sum depends on the stride alone.
template <typename T, typename Width>
FEDPEFT_INLINE vec_t<T> dot_lanes(const T* row, const T* x, int64_t stride, Width) {
  constexpr int64_t N = kLanes<T>;
  const int64_t all = Width::or_else(stride);
  vec_t<T> even = {}, odd = {};
  int64_t d = 0;
  for (; d + 2 * N <= all; d += 2 * N) {
    even = multiply_add(load(row + d), load(x + d), even);
    odd = multiply_add(load(row + d + N), load(x + d + N), odd);
  }
  if (d < all) even = multiply_add(load(row + d), load(x + d), even);
  return even + odd;
}

// out[s] = x . row(s), rows of whole vectors.
template <typename T, typename Row>
FEDPEFT_INLINE void dot_rows(int64_t count, int64_t stride, const T* x, const Row& row, T* out) {
  constexpr int64_t N = kLanes<T>;
  const auto run = [&](auto width) {
    int64_t s = 0;
    for (; s + N <= count; s += N) {
      vec_t<T> lanes[N];
      for (int64_t i = 0; i < N; ++i) lanes[i] = dot_lanes(row(s + i), x, stride, width);
      store(out + s, lane_sums<T>(lanes));
    }
    for (; s < count; ++s) out[s] = lane_sum<T>(dot_lanes(row(s), x, stride, width));
  };
  if (stride == N) return run(Fixed<N>{});
  with_fixed_width<T>(stride, run);
}

// What a step knows of the gradients of a table's rows: numbers alpha, also beta, or vectors.
enum class GradientKind { alpha, alpha_beta, vectors };

// Touched rows of a table [rows, width], in order of first touch, or the whole table.
template <typename T>
struct Slots {
  int64_t table_rows = 0, width = 0, stride = 0, capacity = 0;
  const T* source = nullptr;
  bool whole = false;       // slot s is row s
  bool in_place = false;    // rows fill vectors: their start is read in the table
  bool moved = false;       // a step was taken: p holds the rows
  bool added = false;       // their updates are in `total`
  bool keeps_beta = false;  // beta is not a gradient of one step
  // Row -> slot: an array over the table where that is small, else a hash table with linear
  // probing.
  bool direct = true;
  int64_t map_size = 0;
  int64_t* keys = nullptr;
  int32_t* slot_of = nullptr;

  int64_t* rows = nullptr;  // [capacity]; null with `whole`
  T *p = nullptr, *m = nullptr, *v = nullptr, *start = nullptr;
  T *alpha = nullptr, *beta = nullptr, *dots = nullptr;
  T* grad = nullptr;  // [capacity, stride]
  int64_t count = 0;
  Total total;

  // `small`: untouched rows may be here too.
  void lay_out(Arena& arena, const void* table, int64_t table_rows_, int64_t width_,
               int64_t touches, bool adam, bool prox, GradientKind kind, bool small) {
    source = static_cast<const T*>(table);
    table_rows = table_rows_;
    width = width_;
    stride = padded<T>(width);
    in_place = width == stride;
    whole = small && touches >= table_rows;
    capacity = touches < table_rows ? touches : table_rows;
    if (!whole) {
      map_size = 16;
      while (map_size < 2 * capacity) map_size *= 2;
      direct = table_rows <= 4 * map_size;  // clearing more would cost more than probing
      if (direct) map_size = table_rows;
      keys = direct ? nullptr : arena.take<int64_t>(map_size);
      slot_of = arena.take<int32_t>(map_size);
      rows = arena.take<int64_t>(capacity);
    }
    p = arena.take<T>(capacity * stride);
    if (adam) {
      m = arena.take<T>(capacity * stride);
      v = arena.take<T>(capacity * stride);
    }
    if (prox && !in_place) start = arena.take<T>(capacity * stride);
    if (kind == GradientKind::vectors) {
      grad = arena.take<T>(capacity * stride);
      return;
    }
    alpha = arena.take<T>(capacity);
    if (kind == GradientKind::alpha_beta) beta = arena.take<T>(capacity);
    dots = arena.take<T>(capacity);
  }

  void clear() {
    moved = added = false;
    count = whole ? table_rows : 0;
    if (!whole) memset(slot_of, 0xff, sizeof(int32_t) * size_t(map_size));
    for (int64_t s = 0; s < count && !in_place; ++s) copy_in(s, s);
    if (alpha) zero_row(alpha, capacity);
    if (beta) zero_row(beta, capacity);
    if (grad) zero_row(grad, capacity * stride);
  }

  FEDPEFT_INLINE void prefetch(int64_t row) const { prefetch_row(source + row * width, width); }

  // Slot of a row, which is copied at its first touch where it has to be.
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
    if (!in_place || moved) copy_in(s, row);
    return int32_t(s);
  }

  FEDPEFT_INLINE void copy_in(int64_t s, int64_t row) const {
    pad_row(p + s * stride, row);
    if (start) pad_row(start + s * stride, row);
    if (m && moved) {  // the first step makes the moments of the rows that it finds
      zero_row(m + s * stride, stride);
      zero_row(v + s * stride, stride);
    }
  }

  FEDPEFT_INLINE void pad_row(T* to, int64_t row) const {
    constexpr int64_t N = kLanes<T>, half = N / 2;
    const T* const from = source + row * width;
    if (!in_place) store(to + stride - N, vec_t<T>{});
    int64_t d = 0;
    for (; d + N <= width; d += N) store(to + d, load(from + d));
    if (d + half <= width) {
      memcpy(to + d, from + d, sizeof(T) * size_t(half));
      d += half;
    }
    for (; d < width; ++d) to[d] = from[d];
  }

  FEDPEFT_INLINE int64_t row_of(int64_t s) const { return rows ? rows[s] : s; }

  // Where the row of a slot is.
  FEDPEFT_INLINE const T* now(int64_t s) const {
    return moved || !in_place ? p + s * stride : source + row_of(s) * stride;
  }

  // The optimizer's step along `grad`.
  void step_vectors(const LocalStep<T>& step, T l2) {
    step_own(
        OwnGradients<T>{count, stride, p, m, v, grad, l2}, step, [&](int64_t s) { return now(s); },
        [&](int64_t s) { return start ? start + s * stride : source + row_of(s) * stride; });
    moved = true;
  }

  // out[s] = x . row of slot s.
  void dot_all(const T* x, T* out) const {
    const T* const now = moved || !in_place ? p : source;
    const int64_t step = stride;
    if (now == p || whole) {
      dot_rows(count, stride, x, [=](int64_t s) { return now + s * step; }, out);
    } else {
      const int64_t* const at = rows;
      dot_rows(count, stride, x, [=](int64_t s) { return now + at[s] * step; }, out);
    }
  }

  // Columns [d, d + W vectors) of weigh_all; `at`: rows of the slots, null where slot s is row s.
  template <int W>
  FEDPEFT_INLINE void weigh_columns(const T* now, const int64_t* at, const T* weights, int64_t d,
                                    T* into) const {
    constexpr int64_t N = kLanes<T>;
    vec_t<T> sum[W];
    for (int w = 0; w < W; ++w) sum[w] = load(into + d + w * N);
    for (int64_t s = 0; s < count; ++s) {
      const T* const row = now + (at ? at[s] : s) * stride + d;
      for (int w = 0; w < W; ++w) sum[w] = multiply_add(weights[s], load(row + w * N), sum[w]);
    }
    for (int w = 0; w < W; ++w) store(into + d + w * N, sum[w]);
  }

  // into += sum_s weights[s] * row of slot s.
  void weigh_all(const T* weights, T* into) const {
    const T* const now = moved || !in_place ? p : source;
    const int64_t* const at = now == p ? nullptr : rows;
    constexpr int64_t N = kLanes<T>;
    int64_t d = 0;
    for (; d + 4 * N <= stride; d += 4 * N) weigh_columns<4>(now, at, weights, d, into);
    for (; d < stride; d += N) weigh_columns<1>(now, at, weights, d, into);
  }

  void forget_gradients() {
    zero_row(alpha, count);
    if (beta && !keeps_beta) zero_row(beta, count);
  }

  FEDPEFT_INLINE void write_delta(T* out, int64_t s) const {
    const T *now = p + s * stride, *then = source + row_of(s) * width;
    for (int64_t d = 0; d < width; ++d) out[d] = now[d] - then[d];
  }

  // Adds to `total` what the rows changed by, unless the last step did.
  void add_up() {
    if (added || !moved || !total.rows) return;
    constexpr int64_t kAhead = 8;  // the rows are in no order, and may have to come from memory
    for (int64_t s = 0; s < count && s < kAhead; ++s) total.prefetch(row_of(s), width);
    vec_t<double> broken = {};
    for (int64_t s = 0; s < count; ++s) {
      if (s + kAhead < count) total.prefetch(row_of(s + kAhead), width);
      const int64_t row = row_of(s);
      total.enter(row);
      add_difference(total.rows + row * width, p + s * stride, source + row * width, width,
                     total.by, broken);
      total.leave(row);
    }
    if (is_broken<double>(broken)) total.broken = true;
  }

  // [table_rows, width], zero where nothing was touched.
  void write_table(void* delta) const {
    T* out = static_cast<T*>(delta);
    if (!moved) return zero_row(out, table_rows * width);
    if (!whole && !direct) {
      zero_row(out, table_rows * width);
      for (int64_t s = 0; s < count; ++s) write_delta(out + rows[s] * width, s);
      return;
    }
    for (int64_t row = 0; row < table_rows; ++row) {
      const int64_t s = whole ? row : slot_of[row];
      if (s < 0) {
        zero_row(out + row * width, width);
      } else {
        write_delta(out + row * width, s);
      }
    }
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
