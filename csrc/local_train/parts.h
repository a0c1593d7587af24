// The parts of an item's vector, each as what it adds to the scores of a batch and what a batch
// adds to it.
//
// Every part has the same five calls: lay_out (its memory), resolve (the rows that new draws
// touch), begin (what is shared by a step's scores), add_scores and add_gradients (a batch,
// positives and negatives alternating), and step (its part in the user's gradient, with the values
// that the scores used, then the optimizer).
#pragma once

#include "common/hash.h"
#include "common/logistic.h"
#include "common/products.h"
#include "local_train/local_train_cpu.h"
#include "local_train/slots.h"

namespace fedpeft::FEDPEFT_ISA {

constexpr int64_t kMlpBlock =
    64;  // scores of an MLP worked on together: whole pairs, bits of a word

// A batch: which draws its scores belong to.
struct Batch {
  const int32_t* draws;  // [size]
  int64_t size;

  // At most `most` scores from the `first` on.
  FEDPEFT_INLINE Batch part(int64_t first, int64_t most) const {
    return {draws + first, size - first < most ? size - first : most};
  }
};

// The frozen full embedding, read in place.
template <typename T>
struct BasePart {
  const T* rows;
  const int64_t* items;
  int64_t D;

  FEDPEFT_INLINE const T* row(int32_t draw) const { return rows + items[draw] * D; }

  // The first to write scores.
  void set_scores(const Batch& batch, const T* user, T* scores) const {
    if (D % kLanes<T> == 0) {
      const BasePart part = *this;
      const int32_t* const draws = batch.draws;
      dot_rows(batch.size, D, user, [=](int64_t k) { return part.row(draws[k]); }, scores);
    } else {
      for (int64_t k = 0; k < batch.size; ++k) scores[k] = dot(row(batch.draws[k]), user, D);
    }
  }

  void step(const Batch& batch, const T* coefficients, T* user_grad) const {
    constexpr int64_t N = kLanes<T>;
    int64_t d = 0;
    for (; d + 4 * N <= D; d += 4 * N) add_columns<4>(batch, coefficients, d, user_grad);
    for (; d + N <= D; d += N) add_columns<1>(batch, coefficients, d, user_grad);
    for (; d < D; ++d) {
      for (int64_t k = 0; k < batch.size; ++k)
        user_grad[d] = multiply_add(coefficients[k], row(batch.draws[k])[d], user_grad[d]);
    }
  }

 private:
  // W vectors of columns, whose sums stay in registers.
  template <int W>
  FEDPEFT_INLINE void add_columns(const Batch& batch, const T* coefficients, int64_t d,
                                  T* user_grad) const {
    constexpr int64_t N = kLanes<T>;
    vec_t<T> sum[W];
    for (int w = 0; w < W; ++w) sum[w] = load(user_grad + d + w * N);
    for (int64_t k = 0; k < batch.size; ++k) {
      const T* r = row(batch.draws[k]) + d;
      for (int w = 0; w < W; ++w) sum[w] = multiply_add(coefficients[k], load(r + w * N), sum[w]);
    }
    for (int w = 0; w < W; ++w) store(user_grad + d + w * N, sum[w]);
  }
};

// Sums of rows of one table: Full (a row an item), RQ (a row a level), hashing (a row a hash).
template <typename T>
struct RowsPart {
  Slots<T> slots;
  int64_t reads = 1;      // rows of an item
  T scale = 1;            // of their sum
  int32_t* at = nullptr;  // [draws, reads]: slots

  void lay_out(Arena& arena, const LocalTrainArgs& a, const void* table, int64_t rows,
               int64_t width, int64_t reads_, int64_t draws, GradientKind kind, bool small) {
    reads = reads_;
    slots.lay_out(arena, table, rows, width, draws * reads, a.adam, a.prox > 0, kind, small);
    at = arena.take<int32_t>(draws * reads);
  }

  template <typename RowOf>
  FEDPEFT_INLINE void resolve(int64_t begin, int64_t end, const RowOf& row_of) {
    int32_t* out = at + begin * reads;
    if (slots.whole) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t j = 0; j < reads; ++j) *out++ = int32_t(row_of(n, j));
      }
    } else {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t j = 0; j < reads; ++j) *out++ = slots.touch(row_of(n, j));
      }
    }
  }

  // Vectors x [batch, stride] plus those of the batch's items, and the gradients of the rows from
  // theirs.
  void add_vectors(const Batch& batch, T* x, int64_t stride) const {
    with_fixed_count<T>(reads, [&](auto count) {
      const int64_t all = count.or_else(reads);
      for (int64_t k = 0; k < batch.size; ++k, x += stride) {
        const int32_t* s = at + batch.draws[k] * all;
        for (int64_t j = 0; j < all; ++j) add_scaled(x, scale, slots.now(s[j]), slots.stride);
      }
    });
  }
  void add_vector_gradients(const Batch& batch, const T* grad, int64_t stride) {
    with_fixed_count<T>(reads, [&](auto count) {
      const int64_t all = count.or_else(reads);
      for (int64_t k = 0; k < batch.size; ++k, grad += stride) {
        const int32_t* s = at + batch.draws[k] * all;
        for (int64_t j = 0; j < all; ++j)
          add_scaled(slots.grad + s[j] * slots.stride, scale, grad, slots.stride);
      }
    });
  }

  void begin(const T* x) { slots.dot_all(x, slots.dots); }

  void add_scores(const Batch& batch, T* scores) const {
    const T *const dots = slots.dots, factor = scale;
    with_fixed_count<T>(reads, [&](auto count) {
      const int64_t all = count.or_else(reads);
      for (int64_t k = 0; k < batch.size; ++k) {
        const int32_t* s = at + batch.draws[k] * all;
        T sum = 0;
        for (int64_t j = 0; j < all; ++j) sum += dots[s[j]];
        scores[k] = multiply_add(factor, sum, scores[k]);
      }
    });
  }

  void add_gradients(const Batch& batch, const T* coefficients) {
    T* const alpha = slots.alpha;
    with_fixed_count<T>(reads, [&](auto count) {
      const int64_t all = count.or_else(reads);
      for (int64_t k = 0; k < batch.size; ++k) {
        const int32_t* s = at + batch.draws[k] * all;
        const T coefficient = coefficients[k];
        for (int64_t j = 0; j < all; ++j) alpha[s[j]] += coefficient;
      }
    });
  }

  // After the sums, so that gradients that cancel do so exactly.
  void end_gradients() {
    if (scale == 1) return;
    for (int64_t s = 0; s < slots.count; ++s) slots.alpha[s] *= scale;
  }

  // Makes beta what draws [0, n) read of each row.
  void count_reads(int64_t n) {
    slots.keeps_beta = true;
    for (int64_t i = 0; i < n * reads; ++i) slots.beta[at[i]] += scale;
  }

  // `x`, `y`: the vectors whose multiples alpha and beta are; `into` receives sum_s alpha[s] * row.
  void step(const T* x, const LocalStep<T>& step, T l2, T* into, const T* y = nullptr) {
    RowGradients<T> r{.count = slots.count,
                      .stride = slots.stride,
                      .p = slots.p,
                      .m = slots.m,
                      .v = slots.v,
                      .start = slots.start,
                      .source = slots.in_place ? slots.source : nullptr,
                      .rows = slots.rows,
                      .at_source = slots.in_place && !slots.moved,
                      .proximal = step.prox > 0,
                      .alpha = slots.alpha,
                      .x = x,
                      .beta = y && any_nonzero(y, slots.stride) ? slots.beta : nullptr,
                      .y = y,
                      .l2 = l2,
                      .x_moves = any_nonzero(x, slots.stride)};
    if (step.last && slots.in_place && slots.total.rows && !slots.total.locks) {
      r.total = &slots.total;
      slots.added = true;
    }
    step_rows(r, step, into);
    slots.moved = true;
    slots.forget_gradients();
  }
};

// A small parameter of rows [rows, width] with a gradient of its own in every element, or columns
// of a larger one, whose rows are `pitch` apart.
template <typename T>
struct DensePart {
  int64_t rows = 0, width = 0, stride = 0, pitch = 0;
  const T* source = nullptr;
  T *p = nullptr, *m = nullptr, *v = nullptr, *start = nullptr, *grad = nullptr;
  Total total;

  void lay_out(Arena& arena, const LocalTrainArgs& a, const void* from, int64_t rows_,
               int64_t width_, bool travels = true, int64_t stride_ = 0) {
    source = static_cast<const T*>(from);
    rows = rows_;
    width = pitch = width_;
    stride = stride_ ? stride_ : padded<T>(width);
    p = arena.take<T>(rows * stride);
    if (a.adam) {
      m = arena.take<T>(rows * stride);
      v = arena.take<T>(rows * stride);
    }
    if (travels && a.prox > 0) start = arena.take<T>(rows * stride);
    grad = arena.take<T>(rows * stride);
  }

  void load_start() {
    for (int64_t r = 0; r < rows; ++r) {
      copy_row(p + r * stride, source + r * pitch, width);
      zero_row(p + r * stride + width, stride - width);
    }
    if (start) memcpy(start, p, sizeof(T) * size_t(rows * stride));
    zero_row(grad, rows * stride);
  }

  void step(const LocalStep<T>& step, T l2) {
    step_own(
        OwnGradients<T>{rows, stride, p, m, v, grad, l2}, step,
        [this](int64_t r) { return p + r * stride; },
        [this](int64_t r) { return start ? start + r * stride : nullptr; });
  }

  void add_up() {
    if (!total.rows) return;
    vec_t<double> broken = {};
    for (int64_t r = 0; r < rows; ++r)
      add_difference(total.rows + r * pitch, p + r * stride, source + r * pitch, width, total.by,
                     broken);
    if (is_broken<double>(broken)) total.broken = true;
  }

  void write(void* delta) const {
    T* out = static_cast<T*>(delta);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < width; ++d)
        out[r * pitch + d] = p[r * stride + d] - source[r * pitch + d];
    }
  }

  // The parameter itself.
  void write_values(void* values) const {
    T* out = static_cast<T*>(values);
    for (int64_t r = 0; r < rows; ++r) copy_row(out + r * pitch, p + r * stride, width);
  }
};

// B a_i. With q = B^T u the score is q . a_i, so that the rows of A have their own shared vector.
template <typename T>
struct LoraPart {
  RowsPart<T> A;
  DensePart<T> B;
  T *q = nullptr, *mixed = nullptr;    // [padded r]: B^T u, sum_s alpha[s] a_s
  T *pull = nullptr, *near = nullptr;  // the same with y and beta, for a graph's neighbours
  // With vectors: B transposed [r, padded D], and in panels; of a block the rows of A, in panels,
  // and what they get.
  T *across = nullptr, *panels = nullptr, *block_rows = nullptr, *block_grads = nullptr;

  void lay_out(Arena& arena, const LocalTrainArgs& a, int64_t draws, GradientKind kind) {
    A.lay_out(arena, a, a.A, a.num_items, a.rank, 1, draws, kind, false);
    B.lay_out(arena, a, a.B, a.D, a.rank);
    if (kind == GradientKind::vectors) {
      across = arena.take<T>(a.rank * padded<T>(a.D));
      panels = arena.take<T>(a.D * whole_panels<T>(a.rank));
      block_rows = arena.take<T>(kMlpBlock * whole_panels<T>(a.rank));
      block_grads = arena.take<T>(kMlpBlock * whole_panels<T>(a.rank));
      return;
    }
    q = arena.take<T>(B.stride);
    mixed = arena.take<T>(B.stride);
    if (!a.graph) return;
    pull = arena.take<T>(B.stride);
    near = arena.take<T>(B.stride);
  }

  void begin(const T* user) {
    through_B(user, q);
    A.begin(q);
  }

  // As of RowsPart.
  void begin_vectors() {
    const int64_t D = padded<T>(B.rows);
    zero_row(across, B.width * D);
    for (int64_t d = 0; d < B.rows; ++d) {
      for (int64_t j = 0; j < B.width; ++j) across[j * D + d] = B.p[d * B.stride + j];
    }
    pack_panels(panels, static_cast<const T*>(B.p), B.rows, B.width, B.stride, int64_t{1});
    zero_row(block_rows, kMlpBlock * whole_panels<T>(B.width));
  }
  void add_vectors(const Batch& batch, T* x, int64_t stride) const {
    const int64_t D = padded<T>(B.rows);
    for (int64_t k = 0; k < batch.size; ++k, x += stride) {
      const T *const a = A.slots.now(A.at[batch.draws[k]]), *const through = across;
      sum_rows<true>(
          x, static_cast<const T*>(x), D, B.width, [=](int64_t j) { return through + j * D; },
          [=](int64_t j) { return a[j]; });
    }
  }
  void add_vector_gradients(const Batch& batch, const T* grad, int64_t stride) {
    constexpr int64_t N = kLanes<T>;
    const int64_t r = B.stride, wide = whole_panels<T>(B.width), n = batch.size;
    product(block_grads, wide, static_cast<const T*>(nullptr), int64_t{0}, grad, stride, int64_t{1},
            static_cast<const T*>(panels), n, B.rows, wide);
    for (int64_t k = 0; k < n; ++k) {
      const int32_t s = A.at[batch.draws[k]];
      const T* const a = A.slots.now(s);
      add_row(A.slots.grad + s * r, block_grads + k * wide, r);
      for (int64_t j = 0; j < r; j += N)
        store(block_rows + j / kPanel<T> * n * kPanel<T> + k * kPanel<T> + j % kPanel<T>,
              load(a + j));
    }
    product(B.grad, r, static_cast<const T*>(B.grad), r, grad, int64_t{1}, stride,
            static_cast<const T*>(block_rows), B.rows, n, r);
  }
  void step_vectors(const LocalStep<T>& step, T l2) {
    A.slots.step_vectors(step, l2);
    B.step(step, l2);
  }

  // B^T u.
  FEDPEFT_INLINE void through_B(const T* user, T* out) const {
    zero_row(out, B.stride);
    for (int64_t d = 0; d < B.rows; ++d) add_scaled(out, user[d], B.p + d * B.stride, B.stride);
  }

  // into += B sum_s weights[s] a_s, where `sum` receives the sum.
  void weigh_all(const T* weights, T* sum, T* into) const {
    zero_row(sum, B.stride);
    A.slots.weigh_all(weights, sum);
    for (int64_t d = 0; d < B.rows; ++d) into[d] += dot(B.p + d * B.stride, sum, B.stride);
  }

  // `mixed` and `near` are there.
  void step_graph(const T* user, const T* y, const LocalStep<T>& step, T l2) {
    through_B(y, pull);
    A.step(q, step, l2, nullptr, pull);
    for (int64_t d = 0; d < B.rows; ++d) {
      add_scaled(B.grad + d * B.stride, user[d], mixed, B.stride);
      add_scaled(B.grad + d * B.stride, y[d], near, B.stride);
    }
    B.step(step, l2);
  }

  void step(const T* user, const LocalStep<T>& step, T l2, T* user_grad) {
    zero_row(mixed, B.stride);
    A.step(q, step, l2, mixed);
    for (int64_t d = 0; d < B.rows; ++d) {
      user_grad[d] += dot(B.p + d * B.stride, mixed, B.stride);
      add_scaled(B.grad + d * B.stride, user[d], mixed, B.stride);
    }
    B.step(step, l2);
  }
};

// Hashed rows weighted by SENet: gates = sigmoid(w2 relu(w1 z + b1) + b2) of the rows' means z. A
// vector holds a batch's scores, not hidden units: so nothing is summed within a vector but the
// weights' gradients, once a step.
template <typename T>
struct SenetPart {
  using V = vec_t<T>;
  static constexpr int64_t N = kLanes<T>;
  static constexpr int64_t kBlocks = 2;  // vectors of scores at a time
  static constexpr int64_t kHashes = 8;  // sums over the hidden layer that are kept in registers

  RowsPart<T> table;
  DensePart<T> w1, b1, w2, b2;
  int64_t H = 0, pitch = 0;
  T *gates = nullptr, *dots_at = nullptr, *means_at = nullptr, *slopes = nullptr,
    *betas = nullptr;                        // [H, pitch] of a batch
  T *means = nullptr, *averaging = nullptr;  // of rows

  void lay_out(Arena& arena, const LocalTrainArgs& a, int64_t draws, int64_t batch) {
    H = a.H;
    table.lay_out(arena, a, a.buckets, a.M, a.D, H, draws, GradientKind::alpha_beta, true);
    w1.lay_out(arena, a, a.w1, a.S, H);
    b1.lay_out(arena, a, a.b1, 1, a.S);
    w2.lay_out(arena, a, a.w2, H, a.S);
    b2.lay_out(arena, a, a.b2, 1, H);
    pitch = in_blocks(batch);
    T** const parts[] = {&gates, &dots_at, &means_at, &slopes, &betas};
    for (T** part : parts) *part = arena.take<T>(H * pitch);
    means = arena.take<T>(table.slots.capacity);
    averaging = arena.take<T>(table.slots.stride);
  }

  void load_start() {
    w1.load_start();
    b1.load_start();
    w2.load_start();
    b2.load_start();
    for (int64_t d = 0; d < table.slots.stride; ++d)
      averaging[d] = d < table.slots.width ? T(1) / T(table.slots.width) : T(0);
  }

  void begin(const T* user) {
    table.begin(user);
    table.slots.dot_all(averaging, means);
  }

  void add_scores(const Batch& batch, T* scores) {
    const int64_t all = in_blocks(batch.size);
    for (int64_t h = 0; h < H; ++h) {
      T *const dot_of = dots_at + h * pitch, *const mean_of = means_at + h * pitch;
      for (int64_t k = 0; k < batch.size; ++k) {
        const int32_t s = table.at[batch.draws[k] * H + h];
        dot_of[k] = table.slots.dots[s];
        mean_of[k] = means[s];
      }
      zero_row(dot_of + batch.size, all - batch.size);
      zero_row(mean_of + batch.size, all - batch.size);
    }
    with_fixed_count<T>(H, [&](auto count) { open_gates(count, all); });
    for (int64_t h = 0; h < H; ++h) {
      T *const gate = gates + h * pitch, *const dot_of = dots_at + h * pitch;
      for (int64_t k = 0; k < all; ++k) gate[k] = sigmoid(gate[k]);
      for (int64_t k = 0; k < batch.size; ++k)
        scores[k] = multiply_add(gate[k], dot_of[k], scores[k]);
    }
  }

  void add_gradients(const Batch& batch, const T* coefficients) {
    const int64_t all = in_blocks(batch.size);
    for (int64_t h = 0; h < H; ++h) {
      const T* const dot_of = dots_at + h * pitch;
      T *const gate = gates + h * pitch, *const slope = slopes + h * pitch;
      // An entry's share of alpha takes its gate's place, rounded: a product that is fused with the
      // sum would leave a residue where a pair cancels.
      for (int64_t k = 0; k < batch.size; ++k) {
        const T share = coefficients[k] * gate[k];
        slope[k] = share * dot_of[k] * (1 - gate[k]);
        gate[k] = share;
      }
      zero_row(slope + batch.size, all - batch.size);
      V sum = {};
      for (int64_t k = 0; k < all; k += N) sum += load(slope + k);
      b2.grad[h] += lane_sum<T>(sum);
      zero_row(betas + h * pitch, all);
    }
    with_fixed_count<T>(H, [&](auto count) { add_weight_gradients(count, all); });
    T *const alpha = table.slots.alpha, *const beta = table.slots.beta;
    with_fixed_count<T>(H, [&](auto count) {
      const int64_t hashes = count.or_else(H), row = pitch;
      const T *const share = gates, *const pull = betas;
      for (int64_t k = 0; k < batch.size; ++k) {
        const int32_t* s = table.at + batch.draws[k] * hashes;
        for (int64_t h = 0; h < hashes; ++h) {
          alpha[s[h]] += share[h * row + k];
          beta[s[h]] += pull[h * row + k];
        }
      }
    });
  }

  void step(const T* user, const LocalStep<T>& step, T l2, T* user_grad) {
    table.step(user, step, l2, user_grad, averaging);
    w1.step(step, l2);
    b1.step(step, l2);
    w2.step(step, l2);
    b2.step(step, l2);
  }

 private:
  static FEDPEFT_INLINE int64_t in_blocks(int64_t scores) {
    return (scores + kBlocks * N - 1) / (kBlocks * N) * (kBlocks * N);
  }

  // Weights of one hidden unit and what it reads, by value, since what is stored to could else be
  // taken for a part of them.
  template <typename Count>
  struct Unit {
    static constexpr int64_t known = Count::value;
    const T *w1, *w2, *means, *slopes;
    int64_t H, pitch, w2_stride;
    V b1, into[known ? known : 1], out[known ? known : 1];

    FEDPEFT_INLINE Unit(const SenetPart& s, int64_t unit)
        : w1(s.w1.p + unit * s.w1.stride),
          w2(s.w2.p + unit),
          means(s.means_at),
          slopes(s.slopes),
          H(s.H),
          pitch(s.pitch),
          w2_stride(s.w2.stride),
          b1(V{} + s.b1.p[unit]) {
      for (int64_t h = 0; h < known; ++h) {
        into[h] = V{} + w1[h];
        out[h] = V{} + w2[h * w2_stride];
      }
    }
    FEDPEFT_INLINE V into_of(int64_t h) const {
      if constexpr (known > 0) return into[h];
      return V{} + w1[h];
    }
    FEDPEFT_INLINE V out_of(int64_t h) const {
      if constexpr (known > 0) return out[h];
      return V{} + w2[h * w2_stride];
    }
    // The unit for the vector of scores from `k` on.
    FEDPEFT_INLINE V value(int64_t k) const {
      V sum = b1;
      for (int64_t h = 0; h < Count::or_else(H); ++h)
        sum = multiply_add(into_of(h), load(means + h * pitch + k), sum);
      return sum > 0 ? sum : V{};
    }
    FEDPEFT_INLINE V gradient(int64_t k, V at) const {
      V sum = {};
      for (int64_t h = 0; h < Count::or_else(H); ++h)
        sum = multiply_add(out_of(h), load(slopes + h * pitch + k), sum);
      return at > 0 ? sum : V{};
    }
  };

  // The gates before the sigmoid.
  template <typename Count>
  FEDPEFT_INLINE void open_gates(Count, int64_t all) {
    const int64_t hashes = Count::or_else(H), S = w1.rows, row = pitch;
    constexpr int64_t most = Count::value ? Count::value : kHashes;
    T* const into = gates;
    for (int64_t from = 0; from < hashes; from += most) {
      const int64_t here = Count::or_else(hashes - from < most ? hashes - from : most);
      for (int64_t k = 0; k < all; k += kBlocks * N) {
        V sum[most][kBlocks];
        for (int64_t h = 0; h < here; ++h) {
          for (int64_t b = 0; b < kBlocks; ++b) sum[h][b] = V{} + b2.p[from + h];
        }
        for (int64_t u = 0; u < S; ++u) {
          const Unit<Count> unit(*this, u);
          V x[kBlocks];
          for (int64_t b = 0; b < kBlocks; ++b) x[b] = unit.value(k + b * N);
          for (int64_t h = 0; h < here; ++h) {
            for (int64_t b = 0; b < kBlocks; ++b)
              sum[h][b] = multiply_add(unit.out_of(from + h), x[b], sum[h][b]);
          }
        }
        for (int64_t h = 0; h < here; ++h) {
          for (int64_t b = 0; b < kBlocks; ++b)
            store(into + (from + h) * row + k + b * N, sum[h][b]);
        }
      }
    }
  }

  // From the gates' slopes, the gradients of w1, b1 and w2 and, in `betas`, of the rows' means.
  template <typename Count>
  FEDPEFT_INLINE void add_weight_gradients(Count, int64_t all) {
    const int64_t hashes = Count::or_else(H), S = w1.rows, row = pitch;
    constexpr int64_t most = Count::value ? Count::value : kHashes;
    T* const beta = betas;
    for (int64_t from = 0; from < hashes; from += most) {
      const int64_t here = Count::or_else(hashes - from < most ? hashes - from : most);
      for (int64_t u = 0; u < S; ++u) {
        const Unit<Count> unit(*this, u);
        V into_w1[most] = {}, into_w2[most] = {}, into_b1 = {};
        for (int64_t k = 0; k < all; k += N) {
          const V x = unit.value(k), grad = unit.gradient(k, x);
          into_b1 += grad;
          for (int64_t h = 0; h < here; ++h) {
            const int64_t i = (from + h) * row + k;
            into_w2[h] = multiply_add(load(unit.slopes + i), x, into_w2[h]);
            into_w1[h] = multiply_add(load(unit.means + i), grad, into_w1[h]);
            store(beta + i, multiply_add(unit.into_of(from + h), grad, load(beta + i)));
          }
        }
        if (from == 0) b1.grad[u] += lane_sum<T>(into_b1);
        for (int64_t h = 0; h < here; ++h) {
          w1.grad[u * w1.stride + from + h] += lane_sum<T>(into_w1[h]);
          w2.grad[(from + h) * w2.stride + u] += lane_sum<T>(into_w2[h]);
        }
      }
    }
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
