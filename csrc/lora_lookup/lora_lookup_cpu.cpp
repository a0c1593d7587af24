// CPU kernels of lora_lookup. B is transposed once a client into rows of D, so that B a and B^T g
// are sums of, and products with, contiguous rows.
#include "lora_lookup/lora_lookup_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

template <typename T>
FEDPEFT_INLINE void transpose_B(const LoraLookupArgs& a, int64_t client, acc_t<T>* Bt) {
  const T* B = static_cast<const T*>(a.B) + (a.per_client ? client * a.D * a.rank : 0);
  for (int64_t d = 0; d < a.D; ++d) {
    for (int64_t j = 0; j < a.rank; ++j) Bt[j * a.D + d] = to_acc(B[d * a.rank + j]);
  }
}

template <typename T>
FEDPEFT_INLINE const T* row_of_A(const LoraLookupArgs& a, int64_t client, int64_t row) {
  return static_cast<const T*>(a.A) + ((a.per_client ? client * a.num_rows : 0) + row) * a.rank;
}

// Arguments come by value, see rq_lookup.
template <typename T, int64_t width, int64_t fixed_rank>
FEDPEFT_INLINE void forward_as(LoraLookupArgs a, Fixed<width>, Fixed<fixed_rank>, int64_t begin,
                               int64_t end, void* scratch) {
  using A = acc_t<T>;
  A* Bt = static_cast<A*>(scratch);
  const T* base = static_cast<const T*>(a.base);
  const int64_t D = Fixed<width>::or_else(a.D), rank = Fixed<fixed_rank>::or_else(a.rank);
  ClientCursor resolving(a.positions, begin), combining(a.positions, begin);
  int64_t client_of_Bt = -1;
  // Slots: the row of A (null at padding), the row of base.
  const auto resolve = [&](int64_t n, const T** slots) {
    resolving.advance(n);
    const int64_t item = a.items[n];
    const Position kind = classify(item, a.num_items);
    slots[0] = nullptr;
    if (kind != Position::item) {
      if (kind == Position::bad) a.bad_item->report(n);
      // The backward sees rows alone, so padding must be marked there too.
      if (a.separate_rows && a.rows[n] != -1) a.bad_row->report(n);
      return;
    }
    const int64_t row = a.separate_rows ? a.rows[n] : item;
    if (uint64_t(row) >= uint64_t(a.num_rows)) [[unlikely]] {
      a.bad_row->report(n);
      return;
    }
    slots[0] = row_of_A<T>(a, resolving.client, row);
    slots[1] = base ? base + item * D : nullptr;
    prefetch_row(slots[0], a.rank);
    if (base) prefetch_row(slots[1], D);
  };
  const auto combine = [&](int64_t n, const T* const* slots) {
    combining.advance(n);
    T* out = static_cast<T*>(a.out) + n * D;
    const T* factors = slots[0];
    if (!factors) return zero_row(out, D);
    const int64_t client = a.per_client ? combining.client : 0;
    if (client != client_of_Bt) {
      transpose_B<T>(a, client, Bt);
      client_of_Bt = client;
    }
    sum_rows<true>(
        out, slots[1], D, rank, [&](int64_t j) { return static_cast<const A*>(Bt) + j * D; },
        [&](int64_t j) { return to_acc(factors[j]); });
  };
  pipeline<const T*>(begin, end, 2, resolve, combine, (rank + (base ? D : 0)) * int64_t(sizeof(T)));
}

template <typename T>
void forward(const LoraLookupArgs& a, int64_t begin, int64_t end, void* scratch) {
  with_fixed_width<T>(a.D, [&](auto width) {
    if (a.rank == 4) return forward_as<T>(a, width, Fixed<4>{}, begin, end, scratch);
    forward_as<T>(a, width, Fixed<0>{}, begin, end, scratch);
  });
}

// Gradient of A's row: B^T g.
template <typename T>
FEDPEFT_INLINE void add_to_A(const LoraLookupArgs& a, const acc_t<T>* Bt, const T* grad,
                             acc_t<T>* into) {
  for (int64_t j = 0; j < a.rank; ++j) into[j] += dot(Bt + j * a.D, grad, a.D);
}

// -1: nothing to do at this position.
FEDPEFT_INLINE int64_t checked_row(const LoraLookupArgs& a, int64_t n) {
  const int64_t row = a.rows[n];
  const Position kind = classify(row, a.num_rows);
  if (kind == Position::bad) a.bad_row->report(n);
  return kind == Position::item ? row : -1;
}

template <typename T>
FEDPEFT_INLINE void store_B(const LoraLookupArgs& a, const acc_t<T>* grad_Bt, acc_t<T>* into) {
  for (int64_t d = 0; d < a.D; ++d) {
    for (int64_t j = 0; j < a.rank; ++j) into[d * a.rank + j] = grad_Bt[j * a.D + d];
  }
}

template <typename T>
void backward(const LoraLookupArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<T>;
  A* Bt = static_cast<A*>(scratch);
  A* grad_Bt = Bt + a.rank * a.D;
  for (int64_t c = begin; c < end; ++c) {
    A* grad_A = static_cast<A*>(a.grad_A) + c * a.num_rows * a.rank;
    zero_row(grad_A, a.num_rows * a.rank);
    zero_row(grad_Bt, a.rank * a.D);
    transpose_B<T>(a, c, Bt);
    for (int64_t n = c * a.positions; n < (c + 1) * a.positions; ++n) {
      const int64_t row = checked_row(a, n);
      if (row < 0) continue;
      const T* grad = static_cast<const T*>(a.grad) + n * a.D;
      const T* factors = row_of_A<T>(a, c, row);
      add_to_A(a, Bt, grad, grad_A + row * a.rank);
      for (int64_t j = 0; j < a.rank; ++j)
        add_scaled(grad_Bt + j * a.D, to_acc(factors[j]), grad, a.D);
    }
    store_B<T>(a, grad_Bt, static_cast<A*>(a.grad_B) + c * a.D * a.rank);
  }
}

template <typename T>
void backward_entries(const LoraLookupArgs& a, const int64_t* positions, int64_t count,
                      void* scratch) {
  using A = acc_t<T>;
  A* Bt = static_cast<A*>(scratch);
  transpose_B<T>(a, 0, Bt);
  const T* grads = static_cast<const T*>(a.grad);
  const auto soon = [&](int64_t position) {
    if (positions) prefetch_row(grads + position * a.D, a.D);
  };
  for_entries(positions, count, kEntriesAhead, soon, [&](int64_t position) {
    const int64_t row = checked_row(a, position);
    if (row < 0) return;
    add_to_A(a, Bt, grads + position * a.D, static_cast<A*>(a.grad_A) + row * a.rank);
  });
}

template <typename T>
void backward_B(const LoraLookupArgs& a, int64_t begin, int64_t end, void* into, void* scratch) {
  using A = acc_t<T>;
  A* grad_Bt = static_cast<A*>(scratch);
  zero_row(grad_Bt, a.rank * a.D);
  for (int64_t n = begin; n < end; ++n) {
    const int64_t row = checked_row(a, n);
    if (row < 0) continue;
    const T* grad = static_cast<const T*>(a.grad) + n * a.D;
    const T* factors = row_of_A<T>(a, 0, row);
    for (int64_t j = 0; j < a.rank; ++j)
      add_scaled(grad_Bt + j * a.D, to_acc(factors[j]), grad, a.D);
  }
  store_B<T>(a, grad_Bt, static_cast<A*>(into));
}

}  // namespace

const LoraLookupKernels lora_lookup_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
    {backward_B<float>, backward_B<double>, backward_B<Half>, backward_B<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
