// CPU kernels of hash_lookup. Buckets are computed in the kernel; the weighted rows are summed in
// registers.
#include "hash_lookup/hash_lookup_cpu.h"

#include <math.h>

#include "common/hash.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kHashes = 32;  // more are not pipelined

// One client's SENet and the scratch of one position.
template <typename T>
struct SENet {
  using A = acc_t<T>;
  const T *w1 = nullptr, *b1 = nullptr, *w2 = nullptr, *b2 = nullptr;
  int64_t H, S;
  int64_t* buckets;  // [H]
  A* squeezed;       // [H]
  A* hidden;         // [S], after ReLU
  A* gate;           // [H]
  A* grad_gate;      // [H], before the sigmoid
  A* grad_squeezed;  // [H]
  A* grad_hidden;    // [S], before the ReLU

  FEDPEFT_INLINE SENet(const HashLookupArgs& a, void* scratch) : H(a.H), S(a.S) {
    buckets = static_cast<int64_t*>(scratch);
    squeezed = reinterpret_cast<A*>(buckets + H);
    gate = squeezed + H;
    grad_gate = gate + H;
    grad_squeezed = grad_gate + H;
    hidden = grad_squeezed + H;
    grad_hidden = hidden + S;
  }

  FEDPEFT_INLINE void select(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    w1 = static_cast<const T*>(a.w1) + c * S * H;
    b1 = static_cast<const T*>(a.b1) + c * S;
    w2 = static_cast<const T*>(a.w2) + c * H * S;
    b2 = static_cast<const T*>(a.b2) + c * H;
  }

  FEDPEFT_INLINE void forward(const T* table, int64_t D) {
    for (int64_t h = 0; h < H; ++h) squeezed[h] = row_sum(table + buckets[h] * D, D) / A(D);
    for (int64_t s = 0; s < S; ++s) {
      A sum = to_acc(b1[s]);
      for (int64_t h = 0; h < H; ++h) sum = multiply_add(to_acc(w1[s * H + h]), squeezed[h], sum);
      hidden[s] = sum > A(0) ? sum : A(0);
    }
    for (int64_t h = 0; h < H; ++h) {
      A sum = dot(w2 + h * S, hidden, S) + to_acc(b2[h]);
      gate[h] = A(1) / (A(1) + exp_of(-sum));
    }
  }

  // Adds to the gradients of the weights; leaves those of the gates and the squeezed values.
  FEDPEFT_INLINE void backward(const T* table, const T* grad, int64_t D, A* into) {
    A* grad_w1 = into;
    A* grad_b1 = grad_w1 + S * H;
    A* grad_w2 = grad_b1 + S;
    A* grad_b2 = grad_w2 + H * S;
    for (int64_t s = 0; s < S; ++s) grad_hidden[s] = A(0);
    for (int64_t h = 0; h < H; ++h) {
      const A g = dot(table + buckets[h] * D, grad, D) * gate[h] * (A(1) - gate[h]);
      grad_gate[h] = g;
      grad_b2[h] += g;
      add_scaled(grad_w2 + h * S, g, hidden, S);
      add_scaled(grad_hidden, g, w2 + h * S, S);
      grad_squeezed[h] = A(0);
    }
    for (int64_t s = 0; s < S; ++s) {
      if (!(hidden[s] > A(0))) continue;
      const A g = grad_hidden[s];
      grad_b1[s] += g;
      for (int64_t h = 0; h < H; ++h) {
        grad_w1[s * H + h] = multiply_add(g, squeezed[h], grad_w1[s * H + h]);
        grad_squeezed[h] = multiply_add(g, to_acc(w1[s * H + h]), grad_squeezed[h]);
      }
    }
    for (int64_t h = 0; h < H; ++h) grad_squeezed[h] /= A(D);
  }

  static FEDPEFT_INLINE float exp_of(float x) { return expf(x); }
  static FEDPEFT_INLINE double exp_of(double x) { return exp(x); }

  static FEDPEFT_INLINE A row_sum(const T* row, int64_t D) {
    constexpr int64_t N = kLanes<A>;
    vec_t<A> sum = {};
    int64_t d = 0;
    for (; d + N <= D; d += N) sum += load(row + d);
    A total = lane_sum<A>(sum);
    for (; d < D; ++d) total += to_acc(row[d]);
    return total;
  }
};

template <typename A>
FEDPEFT_INLINE A plain_weight(const HashLookupArgs& a) {
  return a.mean ? A(1) / A(a.H) : A(1);
}

// Values below 2^61 modulo M without a division: with R = floor((2^64 - 1) / M) the product's high
// word is the quotient or one less.
struct Modulus {
  uint64_t M, reciprocal;
  explicit FEDPEFT_INLINE Modulus(int64_t m)
      : M(uint64_t(m)), reciprocal(~uint64_t{0} / uint64_t(m)) {}
  FEDPEFT_INLINE int64_t operator()(uint64_t value) const {
    __extension__ typedef unsigned __int128 uint128;
    const uint64_t rest = value - uint64_t(uint128(value) * reciprocal >> 64) * M;
    return int64_t(rest >= M ? rest - M : rest);
  }
};

FEDPEFT_INLINE void fill_buckets(const HashLookupArgs& a, const Modulus& modulus, int64_t item,
                                 int64_t* buckets) {
  for (int64_t h = 0; h < a.H; ++h) {
    buckets[h] = modulus(
        hash_value(uint64_t(a.hashes[2 * h]), uint64_t(a.hashes[2 * h + 1]), uint64_t(item)));
  }
}

// Arguments come by value, see rq_lookup.
template <typename T, bool senet, int64_t width>
FEDPEFT_INLINE void forward_as(HashLookupArgs a, Fixed<width>, int64_t begin, int64_t end,
                               void* scratch) {
  using A = acc_t<T>;
  const T* base = static_cast<const T*>(a.base);
  const int64_t D = Fixed<width>::or_else(a.D), table_size = a.per_client ? a.M * D : 0;
  const bool ahead = a.H <= kHashes;
  const A plain = plain_weight<A>(a);
  const Modulus modulus(a.M);
  SENet<T> net(a, scratch);
  ClientCursor resolving(a.positions, begin), combining(a.positions, begin);
  if (senet) net.select(a, combining.client);
  // Slots: the item, then its buckets.
  const auto resolve = [&](int64_t n, int64_t* slots) {
    resolving.advance(n);
    const int64_t item = a.items[n];
    const Position kind = classify(item, a.num_items);
    if (kind == Position::bad) a.bad_item->report(n);
    slots[0] = kind == Position::item ? item : -1;
    if (kind != Position::item || !ahead) return;
    const T* table = static_cast<const T*>(a.table) + resolving.client * table_size;
    fill_buckets(a, modulus, item, slots + 1);
    for (int64_t h = 0; h < a.H; ++h) prefetch_row(table + slots[1 + h] * D, D);
    if (base) prefetch_row(base + item * D, D);
  };
  const auto combine = [&](int64_t n, const int64_t* slots) {
    if (combining.advance(n) && senet) net.select(a, combining.client);
    T* out = static_cast<T*>(a.out) + n * D;
    const int64_t item = slots[0];
    if (item < 0) return zero_row(out, D);
    const T* table = static_cast<const T*>(a.table) + combining.client * table_size;
    const T* start = base ? base + item * D : nullptr;
    if (!ahead) fill_buckets(a, modulus, item, net.buckets);
    const int64_t* buckets = ahead ? slots + 1 : net.buckets;
    const auto row = [&](int64_t h) { return table + buckets[h] * D; };
    if constexpr (senet) {
      if (ahead) {
        for (int64_t h = 0; h < a.H; ++h) net.buckets[h] = slots[1 + h];
      }
      net.forward(table, D);
      sum_rows<true>(out, start, D, a.H, row, [&](int64_t h) { return net.gate[h]; });
    } else {
      sum_rows<true>(out, start, D, a.H, row, [&](int64_t) { return plain; });
    }
  };
  pipeline<int64_t>(begin, end, ahead ? a.H + 1 : 1, resolve, combine,
                    (a.H + (base ? 1 : 0)) * D * int64_t(sizeof(T)));
}

template <typename T>
void forward(const HashLookupArgs& a, int64_t begin, int64_t end, void* scratch) {
  if (a.w1) return forward_as<T, true>(a, Fixed<0>{}, begin, end, scratch);
  with_fixed_width<T>(a.D,
                      [&](auto width) { forward_as<T, false>(a, width, begin, end, scratch); });
}

// into[d] += scale * grad[d] + shift
template <typename A, typename T>
FEDPEFT_INLINE void add_scaled_shifted(A* into, A scale, A shift, const T* grad, int64_t D) {
  constexpr int64_t N = kLanes<A>;
  int64_t d = 0;
  for (; d + N <= D; d += N)
    store(into + d, load(into + d) + multiply_add(scale, load(grad + d), shift - vec_t<A>{}));
  for (; d < D; ++d) into[d] += multiply_add(scale, to_acc(grad[d]), shift);
}

// A mean's 1 / H multiplies the finished sum, not its terms: contributions that cancel then cancel
// to zero, where fused multiply-adds of rounded terms would leave a residue for Adam to blow up.
template <typename A>
FEDPEFT_INLINE void apply_mean(const HashLookupArgs& a, A* into, int64_t n) {
  if (a.w1 || !a.mean) return;
  const A factor = A(1) / A(a.H);
  for (int64_t i = 0; i < n; ++i) into[i] *= factor;
}

// False where there is nothing to do.
FEDPEFT_INLINE bool valid_position(const HashLookupArgs& a, int64_t n) {
  const Position kind = classify(a.items[n], a.num_items);
  if (kind == Position::bad) a.bad_item->report(n);
  return kind == Position::item;
}

// Adds the gradients of a client's positions to its table, whose rows are asked for ahead.
template <typename T, int64_t width>
FEDPEFT_INLINE void backward_plain(HashLookupArgs a, Fixed<width>, int64_t client, int64_t* room) {
  using A = acc_t<T>;
  const int64_t D = Fixed<width>::or_else(a.D);
  const bool ahead = a.H <= kHashes;
  const Modulus modulus(a.M);
  const T* grad = static_cast<const T*>(a.grad);
  A* into = static_cast<A*>(a.grad_table) + client * a.M * D;
  // Slots: whether there is an item, then its buckets.
  const auto resolve = [&](int64_t n, int64_t* slots) {
    slots[0] = valid_position(a, n);
    if (!slots[0] || !ahead) return;
    fill_buckets(a, modulus, a.items[n], slots + 1);
    for (int64_t h = 0; h < a.H; ++h) prefetch_row(into + slots[1 + h] * D, D);
  };
  const auto combine = [&](int64_t n, const int64_t* slots) {
    if (!slots[0]) return;
    if (!ahead) fill_buckets(a, modulus, a.items[n], room);
    const int64_t* buckets = ahead ? slots + 1 : room;
    for (int64_t h = 0; h < a.H; ++h) add_row(into + buckets[h] * D, grad + n * D, D);
  };
  pipeline<int64_t>(client * a.positions, (client + 1) * a.positions, ahead ? a.H + 1 : 1, resolve,
                    combine, a.H * D * int64_t(sizeof(A)));
}

template <typename T>
void backward(const HashLookupArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<T>;
  const int64_t D = a.D;
  const bool senet = a.w1 != nullptr;
  const Modulus modulus(a.M);
  SENet<T> net(a, scratch);
  for (int64_t c = begin; c < end; ++c) {
    A* into = static_cast<A*>(a.grad_table) + c * a.M * D;
    zero_row(into, a.M * D);
    if (!senet) {
      with_fixed_width<T>(D, [&](auto width) { backward_plain<T>(a, width, c, net.buckets); });
      apply_mean(a, into, a.M * D);
      continue;
    }
    const T* table = static_cast<const T*>(a.table) + c * a.M * D;
    A* grad_senet = static_cast<A*>(a.grad_senet) + c * a.senet_size();
    net.select(a, c);
    zero_row(grad_senet, a.senet_size());
    for (int64_t n = c * a.positions; n < (c + 1) * a.positions; ++n) {
      if (!valid_position(a, n)) continue;
      const T* grad = static_cast<const T*>(a.grad) + n * D;
      fill_buckets(a, modulus, a.items[n], net.buckets);
      net.forward(table, D);
      net.backward(table, grad, D, grad_senet);
      for (int64_t h = 0; h < a.H; ++h) {
        add_scaled_shifted(into + net.buckets[h] * D, net.gate[h], net.grad_squeezed[h], grad, D);
      }
    }
  }
}

template <typename T>
void backward_senet(const HashLookupArgs& a, int64_t begin, int64_t end, void* into,
                    void* scratch) {
  using A = acc_t<T>;
  const Modulus modulus(a.M);
  SENet<T> net(a, scratch);
  net.select(a, 0);
  zero_row(static_cast<A*>(into), a.senet_size());
  const T* table = static_cast<const T*>(a.table);
  for (int64_t n = begin; n < end; ++n) {
    if (!valid_position(a, n)) continue;
    fill_buckets(a, modulus, a.items[n], net.buckets);
    net.forward(table, a.D);
    net.backward(table, static_cast<const T*>(a.grad) + n * a.D, a.D, static_cast<A*>(into));
    A* coefficients = static_cast<A*>(a.coefficients) + n * a.H * 2;
    for (int64_t h = 0; h < a.H; ++h) {
      coefficients[2 * h] = net.gate[h];
      coefficients[2 * h + 1] = net.grad_squeezed[h];
    }
  }
}

template <typename T>
void backward_entries(const HashLookupArgs& a, const int64_t* entries, int64_t count) {
  using A = acc_t<T>;
  const bool senet = a.w1 != nullptr;
  const Modulus modulus(a.M);
  const T* grads = static_cast<const T*>(a.grad);
  const auto soon = [&](int64_t entry) {
    if (entries) prefetch_row(grads + entry / a.H * a.D, a.D);
  };
  for_entries(entries, count, kEntriesAhead, soon, [&](int64_t entry) {
    const int64_t n = entry / a.H, h = entry % a.H;
    if (!valid_position(a, n)) return;
    const int64_t bucket = modulus(
        hash_value(uint64_t(a.hashes[2 * h]), uint64_t(a.hashes[2 * h + 1]), uint64_t(a.items[n])));
    A* into = static_cast<A*>(a.grad_table) + bucket * a.D;
    const T* grad = grads + n * a.D;
    if (senet) {
      const A* coefficients = static_cast<const A*>(a.coefficients) + entry * 2;
      add_scaled_shifted(into, coefficients[0], coefficients[1], grad, a.D);
    } else {
      add_row(into, grad, a.D);
    }
  });
}

template <typename T>
void finish(const HashLookupArgs& a, int64_t begin, int64_t end) {
  apply_mean(a, static_cast<acc_t<T>*>(a.grad_table) + begin * a.D, (end - begin) * a.D);
}

}  // namespace

const HashLookupKernels hash_lookup_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_senet<float>, backward_senet<double>, backward_senet<Half>, backward_senet<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
    {finish<float>, finish<double>, finish<Half>, finish<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
