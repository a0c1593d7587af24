// CPU kernels of rq_lookup: a position's rows are summed in registers, level by level.
#include "rq_lookup/rq_lookup_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kLevels = 32;  // levels held at a time
constexpr int64_t kAhead = 16;   // positions between the prefetch of an item's codes and their use

// Codes of `count` levels of an item as offsets of rows in the codebooks; a code past K is reported
// and read as 0.
FEDPEFT_INLINE void code_rows(const RqLookupArgs& a, int64_t item, int64_t level, int64_t count,
                              int64_t* rows) {
  const int64_t first = item * a.L + level;
  for (int64_t l = 0; l < count; ++l) {
    int64_t code = a.codes[first + l];
    if (uint64_t(code) >= uint64_t(a.K)) [[unlikely]] {
      a.bad_code->report(first + l);
      code = 0;
    }
    rows[l] = ((level + l) * a.K + code) * a.D;
  }
}

template <typename T>
void forward(const RqLookupArgs& a, int64_t begin, int64_t end) {
  const T* base = static_cast<const T*>(a.base);
  const int64_t D = a.D, table = a.per_client ? a.L * a.K * D : 0;
  const int64_t count = a.L < kLevels ? a.L : kLevels;
  const auto no_weight = [](int64_t) { return 1; };
  ClientCursor resolving(a.positions, begin), combining(a.positions, begin);
  // Slots: the item, then the offsets of its rows.
  const auto resolve = [&](int64_t n, int64_t* slots) {
    resolving.advance(n);
    if (n + kAhead < end) {
      const int64_t soon = a.items[n + kAhead];
      if (uint64_t(soon) < uint64_t(a.num_items)) a.codes.prefetch(soon * a.L);
    }
    const int64_t item = a.items[n];
    const Position kind = classify(item, a.num_items);
    if (kind == Position::bad) a.bad_item->report(n);
    slots[0] = kind == Position::item ? item : -1;
    if (kind != Position::item) return;
    const T* codebooks = static_cast<const T*>(a.codebooks) + resolving.client * table;
    code_rows(a, item, 0, count, slots + 1);
    for (int64_t l = 0; l < count; ++l) prefetch_row(codebooks + slots[1 + l], D);
    if (base) prefetch_row(base + item * D, D);
  };
  const auto combine = [&](int64_t n, const int64_t* slots) {
    combining.advance(n);
    T* out = static_cast<T*>(a.out) + n * D;
    const int64_t item = slots[0];
    if (item < 0) return zero_row(out, D);
    const T* codebooks = static_cast<const T*>(a.codebooks) + combining.client * table;
    const T* start = base ? base + item * D : nullptr;
    sum_rows<false>(
        out, start, D, count, [&](int64_t l) { return codebooks + slots[1 + l]; }, no_weight);
    for (int64_t level = kLevels; level < a.L; level += kLevels) {
      int64_t rows[kLevels];
      const int64_t more = a.L - level < kLevels ? a.L - level : kLevels;
      code_rows(a, item, level, more, rows);
      sum_rows<false>(
          out, static_cast<const T*>(out), D, more, [&](int64_t l) { return codebooks + rows[l]; },
          no_weight);
    }
  };
  pipeline<int64_t>(begin, end, count + 1, resolve, combine);
}

template <typename T>
FEDPEFT_INLINE void add_levels(const RqLookupArgs& a, acc_t<T>* into, int64_t n, int64_t first,
                               int64_t last) {
  const int64_t item = a.items[n];
  const Position kind = classify(item, a.num_items);
  if (kind != Position::item) {
    if (kind == Position::bad) a.bad_item->report(n);
    return;
  }
  const T* grad = static_cast<const T*>(a.grad) + n * a.D;
  for (int64_t l = first; l < last; ++l) {
    int64_t row;
    code_rows(a, item, l, 1, &row);
    add_row(into + row, grad, a.D);
  }
}

template <typename T>
void backward(const RqLookupArgs& a, int64_t begin, int64_t end) {
  const int64_t table = a.L * a.K * a.D;
  for (int64_t c = begin; c < end; ++c) {
    acc_t<T>* into = static_cast<acc_t<T>*>(a.grad_codebooks) + c * table;
    zero_row(into, table);
    for (int64_t n = c * a.positions; n < (c + 1) * a.positions; ++n)
      add_levels<T>(a, into, n, 0, a.L);
  }
}

template <typename T>
void backward_entries(const RqLookupArgs& a, const int64_t* entries, int64_t count) {
  acc_t<T>* into = static_cast<acc_t<T>*>(a.grad_codebooks);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t level = entries[i] % a.L;
    add_levels<T>(a, into, entries[i] / a.L, level, level + 1);
  }
}

}  // namespace

const RqLookupKernels rq_lookup_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
