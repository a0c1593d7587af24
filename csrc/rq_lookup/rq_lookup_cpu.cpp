// CPU kernels of rq_lookup: a position's rows are summed in registers, level by level.
#include "rq_lookup/rq_lookup_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kLevels = 32;  // more are not resolved ahead
constexpr int64_t kAhead = 16;   // positions between the prefetch of an item's codes and their use

// The item of a position, -1 where there is nothing to read: at padding, and where the item, or in
// codebooks without rows its codes, are reported.
FEDPEFT_INLINE int64_t readable_item(const RqLookupArgs& a, int64_t n) {
  const int64_t item = a.items[n];
  switch (classify(item, a.num_items)) {
    case Position::padding:
      return -1;
    case Position::bad:
      a.bad_item->report(n);
      return -1;
    default:
      if (a.K > 0 || a.L == 0) return item;
      a.bad_code->report(item * a.L);
      return -1;
  }
}

// Offset of the row of an item's code in the codebooks; a code past K is reported and read as 0.
// `codes` is an IndexArray or a pointer.
template <typename Codes>
FEDPEFT_INLINE int64_t code_row(const RqLookupArgs& a, Codes codes, int64_t at, int64_t level,
                                int64_t D) {
  int64_t code = codes[at];
  if (uint64_t(code) >= uint64_t(a.K)) [[unlikely]] {
    a.bad_code->report(at);
    code = 0;
  }
  return (level * a.K + code) * D;
}

// Arguments come by value: stores into the output could otherwise change them, for all that the
// compiler knows, and they would be read anew at every position.
template <typename T, typename Codes, int64_t width, int64_t levels>
FEDPEFT_INLINE void forward_as(RqLookupArgs a, Codes codes, Fixed<width>, Fixed<levels>,
                               int64_t begin, int64_t end) {
  const int64_t D = Fixed<width>::or_else(a.D), L = Fixed<levels>::or_else(a.L);
  const T* codebooks = static_cast<const T*>(a.codebooks);
  const T* base = static_cast<const T*>(a.base);
  const int64_t table = a.per_client ? L * a.K * D : 0;
  const bool ahead = L <= kLevels;
  const auto no_weight = [](int64_t) { return 1; };
  ClientCursor cursor(a.positions, begin);
  // Slots: the item, then the offsets of its rows, or of the client's codebooks alone.
  const auto resolve = [&](int64_t n, int64_t* slots) {
    cursor.advance(n);
    if (n + kAhead < end) {
      const int64_t soon = a.items[n + kAhead];
      if (uint64_t(soon) < uint64_t(a.num_items)) a.codes.prefetch(soon * L);
    }
    const int64_t item = slots[0] = readable_item(a, n);
    if (item < 0) return;
    const int64_t client = cursor.client * table;
    if (!ahead) {
      slots[1] = client;
      return;
    }
    for (int64_t l = 0; l < L; ++l) {
      slots[1 + l] = client + code_row(a, codes, item * L + l, l, D);
      prefetch_row(codebooks + slots[1 + l], D);
    }
    if (base) prefetch_row(base + item * D, D);
  };
  const auto combine = [&](int64_t n, const int64_t* slots) {
    T* out = static_cast<T*>(a.out) + n * D;
    const int64_t item = slots[0];
    if (item < 0) return zero_row(out, D);
    const T* start = base ? base + item * D : nullptr;
    if (ahead) {
      sum_rows<false>(
          out, start, D, L, [&](int64_t l) { return codebooks + slots[1 + l]; }, no_weight);
    } else {
      const auto row = [&](int64_t l) {
        return codebooks + slots[1] + code_row(a, codes, item * L + l, l, D);
      };
      sum_rows<false>(out, start, D, L, row, no_weight);
    }
  };
  pipeline<int64_t>(begin, end, ahead ? L + 1 : 2, resolve, combine,
                    (L + (base ? 1 : 0)) * D * int64_t(sizeof(T)));
}

template <typename T>
void forward(const RqLookupArgs& a, int64_t begin, int64_t end) {
  if (a.codes.bytes != 1) {
    with_fixed_width<T>(
        a.D, [&](auto width) { forward_as<T>(a, a.codes, width, Fixed<0>{}, begin, end); });
    return;
  }
  const auto* codes = static_cast<const uint8_t*>(a.codes.data);
  with_fixed_width<T>(a.D, [&](auto width) {
    with_fixed_count<T>(a.L,
                        [&](auto levels) { forward_as<T>(a, codes, width, levels, begin, end); });
  });
}

template <typename T>
FEDPEFT_INLINE void add_levels(const RqLookupArgs& a, acc_t<T>* into, int64_t n, int64_t first,
                               int64_t last) {
  const int64_t item = readable_item(a, n);
  if (item < 0) return;
  const T* grad = static_cast<const T*>(a.grad) + n * a.D;
  for (int64_t l = first; l < last; ++l) {
    add_row(into + code_row(a, a.codes, item * a.L + l, l, a.D), grad, a.D);
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
  const T* grad = static_cast<const T*>(a.grad);
  const auto soon = [&](int64_t entry) { prefetch_row(grad + entry / a.L * a.D, a.D); };
  for_entries(entries, count, kAhead, soon, [&](int64_t entry) {
    const int64_t level = entry % a.L;
    add_levels<T>(a, into, entry / a.L, level, level + 1);
  });
}

}  // namespace

const RqLookupKernels rq_lookup_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_entries<float>, backward_entries<double>, backward_entries<Half>,
     backward_entries<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
