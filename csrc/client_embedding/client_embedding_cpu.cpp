// CPU kernels of client_embedding: row copies, and their scatter-add.
#include "client_embedding/client_embedding_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kAhead = 8;

template <typename T>
void forward(const ClientEmbeddingArgs& a, int64_t begin, int64_t end) {
  const int64_t D = a.D, table = a.num_rows * D;
  int64_t client = a.positions ? begin / a.positions : 0;
  int64_t next_client = (client + 1) * a.positions;
  for (int64_t n = begin; n < end; ++n) {
    if (n == next_client) {
      ++client;
      next_client += a.positions;
    }
    const T* weight = static_cast<const T*>(a.weight) + (a.per_client ? client * table : 0);
    if (n + kAhead < end) {
      const int64_t ahead = a.rows[n + kAhead];
      if (uint64_t(ahead) < uint64_t(a.num_rows)) prefetch_row(weight, ahead, D);
    }
    T* out = static_cast<T*>(a.out) + n * D;
    const int64_t row = a.rows[n];
    const Position kind = classify(row, a.num_rows);
    if (kind == Position::item) {
      copy_row(out, weight + row * D, D);
    } else {
      if (kind == Position::bad) a.bad_row->report(n);
      zero_row(out, D);
    }
  }
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
    add_position<T>(a, static_cast<acc_t<T>*>(a.grad_weight), positions[i]);
  }
}

}  // namespace

const ClientEmbeddingKernels client_embedding_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>, backward_entries<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
