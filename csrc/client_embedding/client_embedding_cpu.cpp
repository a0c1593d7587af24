// CPU kernels of client_embedding: row copies, and their scatter-add.
#include "client_embedding/client_embedding_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Arguments come by value, see rq_lookup.
template <typename T, int64_t width>
FEDPEFT_INLINE void forward_as(ClientEmbeddingArgs a, Fixed<width>, int64_t begin, int64_t end) {
  const int64_t D = Fixed<width>::or_else(a.D), table = a.per_client ? a.num_rows * D : 0;
  ClientCursor cursor(a.positions, begin);
  const auto resolve = [&](int64_t n, const T** slot) {
    cursor.advance(n);
    const int64_t row = a.rows[n];
    const Position kind = classify(row, a.num_rows);
    if (kind == Position::bad) a.bad_row->report(n);
    *slot = nullptr;
    if (kind != Position::item) return;
    *slot = static_cast<const T*>(a.weight) + cursor.client * table + row * D;
    prefetch_row(*slot, D);
  };
  const auto combine = [&](int64_t n, const T* const* slot) {
    T* out = static_cast<T*>(a.out) + n * D;
    if (*slot) {
      copy_row(out, *slot, D);
    } else {
      zero_row(out, D);
    }
  };
  pipeline<const T*>(begin, end, 1, resolve, combine, D * int64_t(sizeof(T)));
}

template <typename T>
void forward(const ClientEmbeddingArgs& a, int64_t begin, int64_t end) {
  with_fixed_width<T>(a.D, [&](auto width) { forward_as<T>(a, width, begin, end); });
}

template <typename T>
FEDPEFT_INLINE void add_position(const ClientEmbeddingArgs& a, acc_t<T>* into, int64_t n) {
  const int64_t row = a.rows[n];
  const Position kind = classify(row, a.num_rows);
  if (kind == Position::item) {
    add_row(into + row * a.D, static_cast<const T*>(a.grad) + n * a.D, a.D);
  } else if (kind == Position::bad) {
    a.bad_row->report(n);
  }
}

template <typename T>
void backward(const ClientEmbeddingArgs& a, int64_t begin, int64_t end) {
  const int64_t table = a.num_rows * a.D;
  for (int64_t c = begin; c < end; ++c) {
    acc_t<T>* into = static_cast<acc_t<T>*>(a.grad_weight) + c * table;
    zero_row(into, table);
    for (int64_t n = c * a.positions; n < (c + 1) * a.positions; ++n) add_position<T>(a, into, n);
  }
}

template <typename T>
void backward_entries(const ClientEmbeddingArgs& a, const int64_t* positions, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    add_position<T>(a, static_cast<acc_t<T>*>(a.grad_weight), positions ? positions[i] : i);
  }
}

}  // namespace

const ClientEmbeddingKernels client_embedding_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
