// CUDA kernels of rq_lookup. Forward: a group of lanes takes several positions at once, 16
// bytes of columns a lane; codebooks from shared memory where a block serves one client, or all
// clients share codebooks larger than L1, with positions enough to pay for the copy, else through
// the caches. Backward: a scatter (common/scatter.cuh).
#include "common/scatter.cuh"
#include "common/staged_rows.cuh"
#include "common/streaming.cuh"
#include "rq_lookup/rq_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256, kSharedThreads = 512;
constexpr int64_t kStagedBytes = 48 * 1024;  // more are looked up by lanes in less time

// The item at position n, -1 at padding.
FEDPEFT_DEVICE int64_t item_at(const RqLookupArgs& a, int64_t n) {
  const int64_t item = a.items[n];
  if (classify(item, a.num_items) == Position::bad)
    FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
  return item;
}

FEDPEFT_DEVICE int64_t code_at(const RqLookupArgs& a, int64_t item, int64_t level) {
  const int64_t at = item * a.L + level, code = a.codes[at];
  if (uint64_t(code) >= uint64_t(a.K)) FEDPEFT_BAD_INDEX("codes", code, at, a.K);
  return code;
}

// The same for several positions at once, -1 where there is none or at padding.
template <int N>
FEDPEFT_DEVICE void items_at(const RqLookupArgs& a, const int64_t (&at)[N], int64_t (&item)[N]) {
  gather(a.items, at, item);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (at[u] >= 0 && classify(item[u], a.num_items) == Position::bad)
      FEDPEFT_BAD_INDEX("items", item[u], at[u], a.num_items);
  }
}

// Codes of a level; -1 at padding.
template <int N>
FEDPEFT_DEVICE void codes_at(const RqLookupArgs& a, const int64_t (&item)[N], int64_t level,
                             int64_t (&code)[N]) {
  int64_t place[N];
#pragma unroll
  for (int u = 0; u < N; ++u) place[u] = item[u] >= 0 ? item[u] * a.L + level : -1;
  gather(a.codes, place, code);
#pragma unroll
  for (int u = 0; u < N; ++u) {
    if (item[u] >= 0 && uint64_t(code[u]) >= uint64_t(a.K))
      FEDPEFT_BAD_INDEX("codes", code[u], place[u], a.K);
  }
}

// Columns [first_column, first_column + columns) of the codebooks, `stride` elements a row.
struct Slice {
  int64_t first_column, columns, stride;
};

// Positions first, first + step, ... before `end`, of these items, their loads of one kind under
// way together, the codes of the next level with the rows of this one; codebooks(n) is where those
// of a position begin.
template <typename T, int V, int N, typename Codebooks>
FEDPEFT_DEVICE void look_up(const RqLookupArgs& a, const Codebooks& codebooks, const Slice& slice,
                            const int64_t (&item)[N], int64_t first, int64_t step, int64_t end,
                            int lane, int lanes) {
  const T* books[N];
#pragma unroll
  for (int u = 0; u < N; ++u)
    books[u] = codebooks(first + u * step < end ? first + u * step : first);
  for (int64_t column = lane * V; column < slice.columns; column += lanes * V) {
    Sum<acc_t<T>, V> sum[N];
    int64_t code[N], next[N];
    if (a.L > 0) codes_at(a, item, 0, code);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      sum[u].clear();
      if (a.base && item[u] >= 0)
        sum[u].set(static_cast<const T*>(a.base) + item[u] * a.D + slice.first_column + column);
    }
#pragma unroll 1
    for (int64_t l = 0; l < a.L; ++l) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        pack[u] = zero_pack<V, T>();
        if (item[u] >= 0)
          pack[u] = load_pack<V>(books[u] + (l * a.K + code[u]) * slice.stride + column);
      }
      if (l + 1 < a.L) codes_at(a, item, l + 1, next);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        sum[u].add(pack[u]);
        code[u] = next[u];
      }
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (first + u * step < end) {
        sum[u].store_once(static_cast<T*>(a.out) + (first + u * step) * a.D + slice.first_column +
                          column);
      }
    }
  }
}

// The items of positions first, first + step, ... before `end`.
template <int N>
FEDPEFT_DEVICE void items_from(const RqLookupArgs& a, int64_t first, int64_t step, int64_t end,
                               int64_t (&item)[N]) {
  int64_t at[N];
#pragma unroll
  for (int u = 0; u < N; ++u) at[u] = first + u * step < end ? first + u * step : -1;
  items_at(a, at, item);
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, FEDPEFT_TWO_OR_THREE)
    forward(RqLookupArgs a, int64_t total) {
  const int64_t table = a.per_client ? a.L * a.K * a.D : 0;
  const auto codebooks = [&](int64_t n) {
    return static_cast<const T*>(a.codebooks) + divide(n, a.positions) * table;
  };
  for_row_batches<kAtOnce<T, V>>(total, a.D / V, [&](int64_t first, int step, int lane, int lanes) {
    int64_t item[kAtOnce<T, V>];
    items_from(a, first, step, total, item);
    look_up<T, V>(a, codebooks, {0, a.D, a.D}, item, first, step, total, lane, lanes);
  });
}

// Where the lanes of a group find the rows of several positions at once, codes a turn ahead and
// items two.
template <typename T, int V, int N>
__global__ void __launch_bounds__(kLaneThreads, FEDPEFT_TWO_OR_THREE + 2)
    forward_lanes(RqLookupArgs a, LaneTurns turns, int lanes) {
  const int L = int(a.L), step = turns.step();
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int own = lane / L, level = lane - own * L;
  const int64_t table = a.per_client ? a.L * a.K * a.D : 0;
  for (int64_t task = blockIdx.x; task < turns.tasks; task += gridDim.x) {
    const int64_t begin = turns.first(task), end = turns.end(begin);
    // Of the lane's own position and level.
    Late item_come, code_come;
    int64_t next = -1;
    const auto load_item = [&](int64_t n) {
      item_come.load(a.items, n + own, own < N && n + own < end);
    };
    const auto load_code = [&](int64_t n) {
      next = item_come.come(a.items.bytes);
      if (classify(next, a.num_items) == Position::bad)
        FEDPEFT_BAD_INDEX("items", next, n + own, a.num_items);
      code_come.load_any(a.codes, next * L + level, next >= 0);
    };
    load_item(begin + group * N);
    load_code(begin + group * N);
    load_item(begin + group * N + step);
    // All lanes of a warp take as many turns, since they exchange rows.
    for (int64_t first = begin; first < end; first += step) {
      const int64_t n = first + group * N, item = next;
      int row = 0;
      if (item >= 0) {
        const int64_t code = code_come.come(a.codes.bytes);
        if (uint64_t(code) >= uint64_t(a.K))
          FEDPEFT_BAD_INDEX("codes", code, item * L + level, a.K);
        const int64_t client = table == 0 ? 0 : divide(n + own, a.positions);
        row = int(uint64_t(client * table + (level * a.K + code) * a.D) / V);
      }
      load_code(n + step);
      load_item(n + 2 * step);
      sum_lane_rows<V, N>(static_cast<const T*>(a.codebooks), static_cast<const T*>(a.base),
                          static_cast<T*>(a.out), n, end, a.D, L, acc_t<T>(1), item, row, lane,
                          lanes);
    }
  }
}

// Rows of a client's codebooks that its positions read.
template <typename T>
struct CodeEntries {
  const RqLookupArgs& a;

  FEDPEFT_DEVICE void start(int64_t) const {}
  FEDPEFT_DEVICE void find(int64_t n, int count, int* row) const {
    constexpr int N = 4;
    const int L = int(a.L), entries = count * L, threads = int(blockDim.x);
    for (int start = int(threadIdx.x); start < entries; start += N * threads) {
      int64_t at[N], item[N], code[N];
      int level[N];
#pragma unroll
      for (int k = 0; k < N; ++k) {
        const int e = start + k * threads, p = int(unsigned(e) / unsigned(L));
        at[k] = e < entries ? n + p : -1;
        level[k] = e - p * L;
      }
      items_at(a, at, item);
#pragma unroll
      for (int k = 0; k < N; ++k) at[k] = item[k] >= 0 ? item[k] * a.L + level[k] : -1;
      gather(a.codes, at, code);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (item[k] >= 0 && uint64_t(code[k]) >= uint64_t(a.K))
          FEDPEFT_BAD_INDEX("codes", code[k], at[k], a.K);
        const int e = start + k * threads;
        if (e < entries) row[e] = item[k] >= 0 ? level[k] * int(a.K) + int(code[k]) : -1;
      }
    }
  }
  FEDPEFT_DEVICE void ready(const T*, const int*, int, bool) const {}
  FEDPEFT_DEVICE acc_t<T> scale(int) const { return 1; }
};

template <typename T, int V>
__global__ void __launch_bounds__(kStagedThreads, FEDPEFT_TWO_OR_THREE)
    forward_staged(RqLookupArgs a, StagedPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  CodeEntries<T> source{a};
  const RowSums sums{a.codebooks, a.base, a.out,          a.items, a.num_items,
                     a.positions, a.D,    int(a.L * a.K), int(a.L)};
  sum_staged_rows<V, kLanePositions<V>, T>(sums, plan, source, shared);
}

// The word of 2 or 4 bytes at p, 0 unless `there`; as late.
FEDPEFT_DEVICE uint32_t load_word(const char* p, int bytes, bool there) {
  uint32_t word = 0;
#if defined(__CUDACC__)
  asm volatile(
      "{\n\t.reg .pred two, four;\n\tsetp.eq.s32 two, %2, 2;\n\tsetp.eq.s32 four, %2, 4;\n\t"
      "mov.b32 %0, 0;\n\t@two ld.global.u16 %0, [%1];\n\t@four ld.global.u32 %0, [%1];\n\t}"
      : "=&r"(word)
      : "l"(__cvta_generic_to_global(p)), "r"(there ? bytes : 0));
#else
  if (!there) return word;
  emulator::check_global(p);
  std::memcpy(&word, p, size_t(bytes));  // little-endian
#endif
  return word;
}

// Whether all codes of an item are one word of bytes.
bool codes_in_words(const RqLookupArgs& a) {
  return a.codes.bytes == 1 && (a.L == 2 || a.L == 4) &&
         reinterpret_cast<uintptr_t>(a.codes.data) % uintptr_t(a.L) == 0;
}

// Shared codebooks, more than L1 holds beside what passes through it: a block a multiprocessor
// keeps some of the columns in shared memory and takes every so many-th batch of positions. Where
// an item's codes are a word, those of the next batch are on their way, and the items of the one
// behind it.
template <typename T, int V, bool Words>
__global__ void __launch_bounds__(kSharedThreads, 1)
    forward_shared(RqLookupArgs a, int64_t total, int slice, int slices) {
  constexpr int N = kAtOnce<T, V>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* codebooks = reinterpret_cast<T*>(shared);
  const int64_t first_column = int64_t(blockIdx.x) % slices * slice;
  const int64_t columns = a.D - first_column < slice ? a.D - first_column : slice;
  const int lanes = lanes_for(slice / V), groups = kSharedThreads / lanes;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const T* from = static_cast<const T*>(a.codebooks) + first_column;
  for (int64_t row = group; row < a.L * a.K; row += groups) {
    for (int column = lane * V; column < columns; column += lanes * V)
      copy_to_shared<V>(codebooks + row * slice + column, from + row * a.D + column);
  }
  const int64_t step = int64_t(gridDim.x) / slices * groups * N;
  int64_t n = int64_t(blockIdx.x) / slices * groups * N + group;
  if constexpr (!Words) {
    copies_done();
    __syncthreads();
    for (; n < total; n += step) {
      int64_t item[N];
      items_from(a, n, groups, total, item);
      look_up<T, V>(
          a, [&](int64_t) { return codebooks; }, {first_column, columns, slice}, item, n, groups,
          total, lane, lanes);
    }
    return;
  }
  const int L = int(a.L), level_rows = int(a.K), bytes = a.items.bytes;
  const char* items = static_cast<const char*>(a.items.data) + n * bytes;
  const char* codes = static_cast<const char*>(a.codes.data);
  T* out = static_cast<T*>(a.out) + n * a.D + first_column;
  const int64_t turn_items = step * bytes, turn_out = step * a.D, row_out = groups * a.D;
  // Of a batch's positions from `at` on, how many are there.
  const auto left = [&](int64_t at) {
    const int64_t rest = total - at;
    return int(rest < 0 ? 0 : rest < groups * N ? rest : groups * N);
  };
  Late come[N];
  int64_t item[N], next[N];
  uint32_t word[N], next_word[N];
  const auto load_items = [&](int64_t at) {
    const int there = left(at);
#pragma unroll
    for (int u = 0; u < N; ++u) come[u].load(items + u * groups * bytes, bytes, u * groups < there);
    items += turn_items;
  };
  const auto load_words = [&](int64_t at) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      next[u] = come[u].come(bytes);
      if (classify(next[u], a.num_items) == Position::bad)
        FEDPEFT_BAD_INDEX("items", next[u], at + u * groups, a.num_items);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) next_word[u] = load_word(codes + next[u] * L, L, next[u] >= 0);
  };
  load_items(n);
  load_words(n);
  load_items(n + step);
  copies_done();
  __syncthreads();
  for (; n < total; n += step) {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      item[u] = next[u];
      word[u] = next_word[u];
    }
    load_words(n + step);
    load_items(n + 2 * step);
    const int there = left(n);
    for (int column = lane * V; column < columns; column += lanes * V) {
      Sum<acc_t<T>, V> sum[N];
      uint32_t rest[N];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        sum[u].clear();
        rest[u] = word[u];
      }
      if (a.base) {
        const T* base = static_cast<const T*>(a.base) + first_column + column;
#pragma unroll
        for (int u = 0; u < N; ++u)
          sum[u].set(load_pack<V>(item[u] < 0 ? from : base + item[u] * a.D));
      }
      const T* level = codebooks + column;
#pragma unroll 1
      for (int l = 0; l < L; ++l) {
        // At padding the first row, whose sum is not stored.
        int code[N];
        bool bad = false;
#pragma unroll
        for (int u = 0; u < N; ++u) {
          code[u] = int(rest[u] & 0xff);
          rest[u] >>= 8;
          bad |= code[u] >= level_rows;
        }
        if (bad) {
#pragma unroll
          for (int u = 0; u < N; ++u) {
            if (code[u] >= level_rows)
              FEDPEFT_BAD_INDEX("codes", code[u], item[u] * L + l, level_rows);
          }
        }
#pragma unroll
        for (int u = 0; u < N; ++u) sum[u].add(load_pack<V>(level + code[u] * slice));
        level += level_rows * slice;
      }
      T* to = out + column;
#pragma unroll
      for (int u = 0; u < N; ++u) {
        if (item[u] < 0) sum[u].clear();
        if (u * groups < there) sum[u].store_once(to);
        to += row_out;
      }
    }
    out += turn_out;
  }
}

// How many slices of columns let shared memory hold one of all codebooks, for lookups of which each
// block reads most rows several times; 0 where that does not pay.
int64_t shared_slices(const RqLookupArgs& a, int64_t total, int64_t bytes, int64_t wide) {
  const Limits device = limits();
  const int64_t rows = a.L * a.K;
  if (a.per_client || 2 * rows * a.D * bytes <= device.shared_bytes) return 0;
  for (int64_t slices = 1;; slices *= 2) {
    const int64_t slice = ((a.D + slices - 1) / slices + wide - 1) / wide * wide;
    if (slices > 1 && slice * bytes < 32) return 0;  // a sector
    if (rows * slice * bytes > device.shared_bytes) continue;
    return total * slices >= 8 * device.multiprocessors * rows ? slices : 0;
  }
}

template <typename T>
struct Source {
  RqLookupArgs a;
  bool words;  // codes_in_words

  FEDPEFT_HD const T* values() const { return static_cast<const T*>(a.grad); }
  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t slot) const {
    const int64_t item = item_at(a, n);
    return item < 0 ? -1 : slot * a.K + code_at(a, item, slot);
  }
  template <int N>
  struct At {
    int64_t item[N];
    uint32_t word[N];  // of the item's codes, where they are one
  };
  template <int N>
  FEDPEFT_DEVICE At<N> at(const int64_t (&n)[N]) const {
    At<N> at;
    items_at(a, n, at.item);
    const char* const codes = static_cast<const char*>(a.codes.data);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      at.word[u] = 0;
      if (words) at.word[u] = load_word(codes + at.item[u] * a.L, int(a.L), at.item[u] >= 0);
    }
    return at;
  }
  template <int N>
  FEDPEFT_DEVICE void rows(const At<N>& at, int slot, int (&row)[N]) const {
    int64_t code[N];
    if (words) {
#pragma unroll
      for (int u = 0; u < N; ++u) {
        code[u] = at.word[u] >> (8 * slot) & 255;
        if (code[u] >= a.K) FEDPEFT_BAD_INDEX("codes", code[u], at.item[u] * a.L + slot, a.K);
      }
    } else {
      codes_at(a, at.item, slot, code);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) row[u] = at.item[u] < 0 ? -1 : slot * int(a.K) + int(code[u]);
  }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.set(values() + n * a.D + column);
    return v;
  }
};

}  // namespace

void rq_lookup(const RqLookupArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if (const int64_t slices = shared_slices(a, total, sizeof(T), V); slices > 0) {
            const int64_t slice = ((a.D + slices - 1) / slices + V - 1) / V * V;
            const int64_t used = (a.D + slice - 1) / slice, sms = limits().multiprocessors;
            launch(codes_in_words(a) ? forward_shared<T, V, true> : forward_shared<T, V, false>,
                   sms / used > 0 ? sms / used * used : used, kSharedThreads,
                   a.L * a.K * slice * int64_t(sizeof(T)), stream, a, total, int(slice), int(used));
            return;
          }
          const int lanes = lanes_for(a.D / V);
          const auto by_lanes = [&](const auto& call) {
            return with_lane_positions<V>(a.L, (a.per_client ? clients : 1) * a.L * a.K * a.D,
                                          lanes, call);
          };
          if (StagedPlan plan{}; a.per_client && a.L > 0 &&
                                 plan.make<T, V>(clients, a.positions, a.L * a.K, a.L, a.D, 128) &&
                                 plan.bytes <= kStagedBytes &&
                                 (plan.beats_lanes<V>() || !by_lanes([](auto) {}))) {
            launch(forward_staged<T, V>, plan.blocks, plan.threads, plan.bytes, stream, a, plan);
            return;
          }
          const bool done = by_lanes([&](auto at_once) {
            constexpr int N = decltype(at_once)::value;
            const LaneTurns turns(total, kLaneThreads / lanes * N);
            launch(forward_lanes<T, V, N>, turns.tasks, kLaneThreads, 0, stream, a, turns, lanes);
          });
          if (!done)
            launch_row_batches<kAtOnce<T, V>>(forward<T, V>, total, a.D / V, stream, a, total);
        },
        a.codebooks, a.base, a.out);
  });
}

ScatterShape rq_lookup_shape(const RqLookupArgs& a, DType dtype, int64_t clients) {
  return {clients, a.positions, a.L, a.L * a.K, a.D, true, 1, element_size(dtype)};
}

void rq_lookup_keys(const RqLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream) {
  launch_scatter_keys(Source<float>{a, codes_in_words(a)}, plan, keys, stream);
}

void rq_lookup_backward(const RqLookupArgs& a, DType dtype, const ScatterPlan& plan,
                        const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          launch_scatter<T, decltype(width)::value>(Source<T>{a, codes_in_words(a)}, plan, sorted,
                                                    out, stream);
        },
        a.grad, out, sorted.partial);
  });
}

}  // namespace fedpeft::gpu
