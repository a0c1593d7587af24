// CPU kernels of touched_rows and accumulate_updates_.
#include "aggregate/aggregate_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// touched_rows. A bitmap over the catalogue gives the sorted distinct items by a scan; where the
// catalogue dwarfs the client, a radix sort of its positions does.

constexpr int64_t kRadixBits = 11;
constexpr int64_t kFew = 48;  // up to so many positions are sorted by insertion

struct Keyed {
  uint64_t item;
  int64_t position;
};

FEDPEFT_INLINE int64_t bitmap_words(int64_t N) { return 8 * N + 1024; }

int64_t touched_scratch(const TouchedRowsArgs& a) {
  const int64_t bitmap = bitmap_words(a.N) * int64_t(sizeof(uint64_t) + sizeof(int64_t));
  const int64_t sort = 2 * a.N * int64_t(sizeof(Keyed));
  return bitmap > sort ? bitmap : sort;
}

template <typename Item>
FEDPEFT_INLINE int64_t touched_by_bitmap(const Item* items, int64_t N, int64_t words, void* scratch,
                                         Item* rows, Item* positions) {
  uint64_t* bits = static_cast<uint64_t*>(scratch);
  int64_t* before = reinterpret_cast<int64_t*>(bits + words);  // distinct items in earlier words
  memset(bits, 0, sizeof(uint64_t) * size_t(words));
  for (int64_t n = 0; n < N; ++n) {
    if (items[n] >= 0) bits[items[n] >> 6] |= uint64_t{1} << (items[n] & 63);
  }
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) {
    before[w] = count;
    for (uint64_t left = bits[w]; left; left &= left - 1) {
      rows[count++] = Item(64 * w + __builtin_ctzll(left));
    }
  }
  for (int64_t n = 0; n < N; ++n) {
    const int64_t item = items[n];
    if (item < 0) {
      positions[n] = -1;
    } else {
      const uint64_t smaller = bits[item >> 6] & ((uint64_t{1} << (item & 63)) - 1);
      positions[n] = Item(before[item >> 6] + __builtin_popcountll(smaller));
    }
  }
  return count;
}

template <typename Item>
FEDPEFT_INLINE int64_t touched_by_sort(const Item* items, int64_t N, int64_t largest, void* scratch,
                                       Item* rows, Item* positions) {
  Keyed* from = static_cast<Keyed*>(scratch);
  Keyed* to = from + N;
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    positions[n] = -1;
    if (items[n] >= 0) from[count++] = {uint64_t(items[n]), n};
  }
  for (int64_t shift = 0; shift < 64 && uint64_t(largest) >> shift; shift += kRadixBits) {
    int64_t starts[1 << kRadixBits] = {};
    const uint64_t mask = (1 << kRadixBits) - 1;
    for (int64_t i = 0; i < count; ++i) ++starts[from[i].item >> shift & mask];
    int64_t sum = 0;
    for (int64_t& start : starts) {
      const int64_t size = start;
      start = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) to[starts[from[i].item >> shift & mask]++] = from[i];
    Keyed* sorted = to;
    to = from;
    from = sorted;
  }
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || from[i].item != from[i - 1].item) rows[distinct++] = Item(from[i].item);
    positions[from[i].position] = Item(distinct - 1);
  }
  return distinct;
}

template <typename Item>
FEDPEFT_INLINE int64_t touched_by_insertion(const Item* items, int64_t N, Item* rows,
                                            Item* positions) {
  Item sorted[kFew], from[kFew];
  int64_t count = 0;
  for (int64_t n = 0; n < N; ++n) {
    positions[n] = -1;
    const Item item = items[n];
    if (item < 0) continue;
    int64_t at = count++;
    for (; at > 0 && sorted[at - 1] > item; --at) {
      sorted[at] = sorted[at - 1];
      from[at] = from[at - 1];
    }
    sorted[at] = item;
    from[at] = Item(n);
  }
  int64_t distinct = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (i == 0 || sorted[i] != sorted[i - 1]) rows[distinct++] = sorted[i];
    positions[from[i]] = Item(distinct - 1);
  }
  return distinct;
}

template <typename Item>
void touched(const TouchedRowsArgs& a, int64_t begin, int64_t end, void* scratch) {
  for (int64_t c = begin; c < end; ++c) {
    const Item* items = static_cast<const Item*>(a.items.data) + c * a.N;
    Item* rows = static_cast<Item*>(a.rows) + c * a.N;
    Item* positions = static_cast<Item*>(a.positions) + c * a.N;
    Item largest = -1, smallest = -1;
    for (int64_t n = 0; n < a.N; ++n) {
      largest = items[n] > largest ? items[n] : largest;
      smallest = items[n] < smallest ? items[n] : smallest;
    }
    if (smallest < -1) [[unlikely]] {
      for (int64_t n = 0; n < a.N; ++n) {
        if (items[n] < -1) a.bad_item->report(c * a.N + n);
      }
    }
    const int64_t words = int64_t(largest) / 64 + 1;
    if (a.N <= kFew) {
      a.counts[c] = touched_by_insertion(items, a.N, rows, positions);
    } else if (words <= bitmap_words(a.N)) {
      a.counts[c] = touched_by_bitmap(items, a.N, words, scratch, rows, positions);
    } else {
      a.counts[c] = touched_by_sort(items, a.N, largest, scratch, rows, positions);
    }
  }
}

void touched_any(const TouchedRowsArgs& a, int64_t begin, int64_t end, void* scratch) {
  a.items.bytes == 8 ? touched<int64_t>(a, begin, end, scratch)
                     : touched<int32_t>(a, begin, end, scratch);
}

// accumulate_updates_. A float32 or float64 total takes each client's part in one addition that
// rounds to its type, so that a sum over chunks of clients equals one call. 16-bit totals sum a
// call's clients in float32 and round once.

// total[i] += weight * update[i] for the updates of `K` clients in turn, which lie `stride` apart.
// A grid comes with float64 totals only, whose products are rounded before they are added with or
// without one, as in local_train's sums.
template <int K, typename Total, typename T>
FEDPEFT_INLINE void add_weighted(Total* __restrict total, const T* __restrict update,
                                 int64_t stride, int64_t n, const acc_t<Total>* weight,
                                 acc_t<Total> shift) {
  for (int64_t i = 0; i < n; ++i) {
    acc_t<Total> sum = to_acc(total[i]);
    for (int k = 0; k < K; ++k) {
      const acc_t<Total> x = acc_t<Total>(to_acc(update[k * stride + i]));
      if constexpr (sizeof(Total) == sizeof(double)) {
        sum += multiply_add(weight[k], x, shift) - shift;
      } else {
        sum = multiply_add(weight[k], x, sum);
      }
    }
    from_acc(sum, total + i);
  }
}

template <typename Sum, typename T>
FEDPEFT_INLINE void add_clients(Sum* into, const T* updates, int64_t stride, int64_t n,
                                const double* weights, int64_t clients, Sum shift) {
  constexpr int kTogether = 8;  // streams at once: as many as the processor fetches ahead of
  int64_t c = 0;
  const auto add = [&]<int64_t K>(Fixed<K>) {
    Sum weight[K];
    for (int64_t k = 0; k < K; ++k) weight[k] = Sum(weights[c + k]);
    add_weighted<int(K)>(into, updates + c * stride, stride, n, weight, shift);
    c += K;
  };
  while (c + kTogether <= clients) add(Fixed<kTogether>{});
  if (c + 4 <= clients) add(Fixed<4>{});
  while (c < clients) add(Fixed<1>{});
}

template <typename Total, typename T>
void dense(const AccumulateArgs& a, int64_t begin, int64_t end) {
  using Sum = acc_t<Total>;
  constexpr int64_t kStretch = 16 * kAccumulateBlock;  // memory is fast at long stretches
  const int64_t stop = end * kAccumulateBlock < a.size ? end * kAccumulateBlock : a.size;
  for (int64_t first = begin * kAccumulateBlock; first < stop; first += kStretch) {
    const int64_t n = stop - first < kStretch ? stop - first : kStretch;
    Total* total = static_cast<Total*>(a.total) + first;
    const T* updates = static_cast<const T*>(a.updates) + first;
    if constexpr (sizeof(Sum) == sizeof(Total)) {
      add_clients(total, updates, a.size, n, a.weights, a.clients, Sum(a.shift));
    } else {
      Sum sums[kStretch];
      for (int64_t i = 0; i < n; ++i) sums[i] = to_acc(total[i]);
      add_clients(sums, updates, a.size, n, a.weights, a.clients, Sum(0));
      for (int64_t i = 0; i < n; ++i) from_acc(sums[i], total + i);
    }
  }
}

template <typename Total, typename T>
void rows(const AccumulateArgs& a, const int64_t* entries, int64_t count) {
  Total* total = static_cast<Total*>(a.total);
  const T* updates = static_cast<const T*>(a.updates);
  const auto soon = [&](int64_t entry) {
    const int64_t row = a.rows[entry];
    if (row < 0) return;
    prefetch_row(total + row * a.width, a.width);
    if (entries) prefetch_row(updates + entry * a.width, a.width);
  };
  for_entries(entries, count, kEntriesAhead, soon, [&](int64_t entry) {
    const int64_t row = a.rows[entry];
    if (row < 0) return;
    const acc_t<Total> weight = acc_t<Total>(a.weights[entry / a.R]);
    add_weighted<1>(total + row * a.width, updates + entry * a.width, 0, a.width, &weight,
                    acc_t<Total>(a.shift));
  });
}

void check_rows(const AccumulateArgs& a, int64_t begin, int64_t end, FirstError* bad_row) {
  for (int64_t i = begin; i < end; ++i) {
    if (classify(a.rows[i], a.num_rows) == Position::bad) [[unlikely]]
      bad_row->report(i);
  }
}

// apply_updates_

// parameter += scale * total, rounded to the parameter's type before it is added, and total = 0.
template <typename T, typename Width>
FEDPEFT_INLINE void apply_run(T* __restrict parameter, double* __restrict total, int64_t n,
                              double scale, Width) {
  for (int64_t d = 0; d < Width::or_else(n); ++d) {
    T step;
    from_acc(acc_t<T>(total[d] * scale), &step);
    from_acc(to_acc(parameter[d]) + to_acc(step), parameter + d);
    total[d] = 0;
  }
}

template <typename T>
void apply(const ApplyArgs& a, int64_t begin, int64_t end) {
  constexpr int64_t kAhead = 24;
  T* const parameter = static_cast<T*>(a.parameter);
  double* const total = a.total;
  const int64_t width = a.width;
  const double scale = a.scale;
  if (!a.rows.data) {
    return apply_run(parameter + begin * width, total + begin * width, (end - begin) * width, scale,
                     Fixed<0>{});
  }
  const IndexArray rows = a.rows;
  with_fixed_count<T>(width, [&](auto fixed) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) {
        prefetch_row(parameter + rows[i + kAhead] * width, width);
        prefetch_row(total + rows[i + kAhead] * width, width);
      }
      apply_run(parameter + rows[i] * width, total + rows[i] * width, width, scale, fixed);
    }
  });
}

}  // namespace

const AggregateKernels aggregate_kernels = {
    touched_scratch,
    touched_any,
    {dense<float, float>, dense<double, double>, dense<Half, Half>, dense<BFloat16, BFloat16>},
    {dense<double, float>, dense<double, double>, dense<double, Half>, dense<double, BFloat16>},
    {rows<float, float>, rows<double, double>, rows<Half, Half>, rows<BFloat16, BFloat16>},
    {rows<double, float>, rows<double, double>, rows<double, Half>, rows<double, BFloat16>},
    check_rows,
    {apply<float>, apply<double>, apply<Half>, apply<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
