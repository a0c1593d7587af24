// CUDA kernels of rq_lookup. Forward: a group of lanes takes several positions at once, 16
// bytes of columns a lane; codebooks from shared memory where a block serves one client with
// positions enough to pay for the copy, else through L2. Backward: a scatter (common/scatter.cuh).
#include "common/scatter.cuh"
#include "rq_lookup/rq_lookup_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor

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

// Positions first, first + step, ... before `end`, their loads of one kind under way together, the
// codes of the next level with the rows of this one; codebooks(n) is where those of a position
// begin.
template <typename T, int V, typename Codebooks>
FEDPEFT_DEVICE void look_up(const RqLookupArgs& a, const Codebooks& codebooks, int64_t first,
                            int step, int64_t end, int lane, int lanes) {
  constexpr int N = kAtOnce<T, V>;
  int64_t item[N];
  const T* books[N];
  {
    int64_t at[N];
#pragma unroll
    for (int u = 0; u < N; ++u) at[u] = first + u * step < end ? first + u * step : -1;
    gather(a.items, at, item);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (at[u] >= 0 && classify(item[u], a.num_items) == Position::bad)
        FEDPEFT_BAD_INDEX("items", item[u], at[u], a.num_items);
      books[u] = codebooks(at[u] >= 0 ? at[u] : first);
    }
  }
  // Of a level; -1 at padding.
  const auto codes_at = [&](int64_t l, int (&code)[N]) {
    int64_t place[N], found[N];
#pragma unroll
    for (int u = 0; u < N; ++u) place[u] = item[u] >= 0 ? item[u] * a.L + l : -1;
    gather(a.codes, place, found);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (item[u] >= 0 && uint64_t(found[u]) >= uint64_t(a.K))
        FEDPEFT_BAD_INDEX("codes", found[u], place[u], a.K);
      code[u] = int(found[u]);
    }
  };
  for (int64_t column = lane * V; column < a.D; column += lanes * V) {
    Sum<acc_t<T>, V> sum[N];
    int code[N], next[N];
    if (a.L > 0) codes_at(0, code);
#pragma unroll
    for (int u = 0; u < N; ++u) {
      sum[u].clear();
      if (a.base && item[u] >= 0)
        sum[u].set(static_cast<const T*>(a.base) + item[u] * a.D + column);
    }
#pragma unroll 1
    for (int64_t l = 0; l < a.L; ++l) {
      Pack<T, V> pack[N];
#pragma unroll
      for (int u = 0; u < N; ++u) {
        pack[u] = zero_pack<V, T>();
        if (item[u] >= 0) pack[u] = load_pack<V>(books[u] + (l * a.K + code[u]) * a.D + column);
      }
      if (l + 1 < a.L) codes_at(l + 1, next);
#pragma unroll
      for (int u = 0; u < N; ++u) {
        sum[u].add(pack[u]);
        code[u] = next[u];
      }
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (first + u * step < end)
        sum[u].store_once(static_cast<T*>(a.out) + (first + u * step) * a.D + column);
    }
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, FEDPEFT_TWO_OR_THREE)
    forward(RqLookupArgs a, int64_t total) {
  const int64_t table = a.per_client ? a.L * a.K * a.D : 0;
  const auto codebooks = [&](int64_t n) {
    return static_cast<const T*>(a.codebooks) + divide(n, a.positions) * table;
  };
  for_row_batches<kAtOnce<T, V>>(total, a.D / V, [&](int64_t first, int step, int lane, int lanes) {
    look_up<T, V>(a, codebooks, first, step, total, lane, lanes);
  });
}

// One block a client, its codebooks in shared memory.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, FEDPEFT_TWO_OR_THREE)
    forward_staged(RqLookupArgs a, int64_t clients) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* codebooks = reinterpret_cast<T*>(shared);
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes;
  const int64_t table = a.L * a.K * a.D;
  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* from = static_cast<const T*>(a.codebooks) + client * table;
    for (int64_t i = int64_t(threadIdx.x) * V; i < table; i += kThreads * V)
      store_pack<V>(codebooks + i, load_pack<V>(from + i));
    __syncthreads();
    const int64_t end = (client + 1) * a.positions;
    for (int64_t n = client * a.positions + threadIdx.x / lanes; n < end;
         n += groups * kAtOnce<T, V>)
      look_up<T, V>(
          a, [&](int64_t) { return codebooks; }, n, groups, end, int(threadIdx.x) % lanes, lanes);
    __syncthreads();
  }
}

template <typename T>
struct Source {
  RqLookupArgs a;

  FEDPEFT_DEVICE const T* values() const { return static_cast<const T*>(a.grad); }
  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t slot) const {
    const int64_t item = item_at(a, n);
    return item < 0 ? -1 : slot * a.K + code_at(a, item, slot);
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
    const int64_t bytes = a.L * a.K * a.D * int64_t(sizeof(T));
    const bool staged = a.per_client && a.positions >= 2 * a.K && bytes > 0 &&
                        bytes <= kStagedBytes && bytes <= limits().shared_bytes;
    with_width<T>(
        a.D,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if (staged) {
            launch(forward_staged<T, V>, clients, kThreads, bytes, stream, a, clients);
          } else {
            launch_row_batches<kAtOnce<T, V>>(forward<T, V>, total, a.D / V, stream, a, total);
          }
        },
        a.codebooks, a.base, a.out);
  });
}

ScatterShape rq_lookup_shape(const RqLookupArgs& a, int64_t clients) {
  return {clients, a.positions, a.L, a.L * a.K, a.D, true};
}

void rq_lookup_keys(const RqLookupArgs& a, const ScatterPlan& plan, void* keys, Stream stream) {
  launch_scatter_keys(Source<float>{a}, plan, keys, stream);
}

void rq_lookup_backward(const RqLookupArgs& a, DType dtype, const ScatterPlan& plan,
                        const SortedEntries& sorted, void* out, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.D,
        [&](auto width) {
          launch_scatter<T, decltype(width)::value>(Source<T>{a}, plan, sorted, out, stream);
        },
        a.grad, out, sorted.partial);
  });
}

}  // namespace fedpeft::gpu
