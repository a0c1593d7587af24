// CPU kernels of client_embedding: row copies, and their scatter-add.
#include "client_embedding/client_embedding_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Groups of rows: those of the next group are asked for, then those of this one copied, so that a
// row costs little more than its copy. Arguments come by value, see rq_lookup.
template <typename Index, int64_t width>
FEDPEFT_INLINE void forward_as(ClientEmbeddingArgs a, const Index* rows, int64_t row_bytes,
                               Fixed<width>, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = 8;
  const int64_t bytes = Fixed<width>::or_else(row_bytes);
  const int64_t table = a.per_client ? a.num_rows * bytes : 0;
  const char* weight = static_cast<const char*>(a.weight);
  ClientCursor cursor(a.positions, begin);
  const char* from[2][kGroup] = {};  // null: padding
  const auto find = [&](int64_t first, const char** found) {
    const int64_t count = end - first < kGroup ? end - first : kGroup;
    for (int64_t i = 0; i < count; ++i) {
      cursor.advance(first + i);
      const int64_t row = rows[first + i];
      found[i] = nullptr;
      if (uint64_t(row) < uint64_t(a.num_rows)) [[likely]] {
        found[i] = weight + cursor.client * table + row * bytes;
        prefetch_row(found[i], bytes);
      } else if (row != -1) {
        a.bad_row->report(first + i);
      }
    }
    return count;
  };
  int64_t count = find(begin, from[0]);
  for (int64_t first = begin, turn = 0; first < end; first += kGroup, turn ^= 1) {
    const int64_t next = first + kGroup < end ? find(first + kGroup, from[turn ^ 1]) : 0;
    char* out = static_cast<char*>(a.out) + first * bytes;
    for (int64_t i = 0; i < count; ++i, out += bytes) {
      if (const char* row = from[turn][i]) {
        copy_row(out, row, bytes);
      } else {
        zero_row(out, bytes);
      }
    }
    count = next;
  }
}

template <typename Index>
FEDPEFT_INLINE void forward_of(const ClientEmbeddingArgs& a, int64_t bytes, int64_t begin,
                               int64_t end) {
  const auto* rows = static_cast<const Index*>(a.rows.data);
  if (bytes == 128) return forward_as(a, rows, bytes, Fixed<128>{}, begin, end);
  if (bytes == 256) return forward_as(a, rows, bytes, Fixed<256>{}, begin, end);
  forward_as(a, rows, bytes, Fixed<0>{}, begin, end);
}

template <typename T>
void forward(const ClientEmbeddingArgs& a, int64_t begin, int64_t end) {
  const int64_t bytes = a.D * int64_t(sizeof(T));
  a.rows.bytes == 8 ? forward_of<int64_t>(a, bytes, begin, end)
                    : forward_of<int32_t>(a, bytes, begin, end);
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
  acc_t<T>* into = static_cast<acc_t<T>*>(a.grad_weight);
  const auto soon = [&](int64_t position) {
    const int64_t row = a.rows[position];
    if (uint64_t(row) < uint64_t(a.num_rows)) prefetch_row(into + row * a.D, a.D);
    if (positions) prefetch_row(static_cast<const T*>(a.grad) + position * a.D, a.D);
  };
  for_entries(positions, count, kEntriesAhead, soon,
              [&](int64_t position) { add_position<T>(a, into, position); });
}

}  // namespace

const ClientEmbeddingKernels client_embedding_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
