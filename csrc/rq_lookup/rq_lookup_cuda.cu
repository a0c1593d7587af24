// CUDA kernels of rq_lookup. Forward: a group of lanes a position, 16 bytes of columns a lane;
// codebooks from shared memory where a block serves one client with positions enough to pay for the
// copy, else through L2. Backward: a scatter (common/scatter.cuh).
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

template <typename T, int V>
FEDPEFT_DEVICE void look_up(const RqLookupArgs& a, const T* codebooks, int64_t n, int lane,
                            int lanes) {
  const int64_t item = item_at(a, n);
  T* out = static_cast<T*>(a.out) + n * a.D;
  for (int64_t column = lane * V; column < a.D; column += lanes * V) {
    Sum<acc_t<T>, V> sum;
    sum.clear();
    if (item >= 0) {
      if (a.base) sum.set(static_cast<const T*>(a.base) + item * a.D + column);
#pragma unroll 4
      for (int64_t l = 0; l < a.L; ++l) {
        sum.add(codebooks + (l * a.K + code_at(a, item, l)) * a.D + column);
      }
    }
    sum.store(out + column);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) forward(RqLookupArgs a, int64_t total) {
  const int64_t table = a.per_client ? a.L * a.K * a.D : 0;
  for_rows(total, a.D / V, [&](int64_t n, int lane, int lanes) {
    const T* codebooks = static_cast<const T*>(a.codebooks) + divide(n, a.positions) * table;
    look_up<T, V>(a, codebooks, n, lane, lanes);
  });
}

// One block a client, its codebooks in shared memory.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) forward_staged(RqLookupArgs a, int64_t clients) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* codebooks = reinterpret_cast<T*>(shared);
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes;
  const int64_t table = a.L * a.K * a.D;
  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* from = static_cast<const T*>(a.codebooks) + client * table;
    for (int64_t i = int64_t(threadIdx.x) * V; i < table; i += kThreads * V)
      store_pack<V>(codebooks + i, load_pack<V>(from + i));
    __syncthreads();
    for (int64_t p = threadIdx.x / lanes; p < a.positions; p += groups)
      look_up<T, V>(a, codebooks, client * a.positions + p, int(threadIdx.x) % lanes, lanes);
    __syncthreads();
  }
}

template <typename T>
struct Source {
  RqLookupArgs a;

  FEDPEFT_DEVICE int64_t row(int64_t n, int64_t slot) const {
    const int64_t item = item_at(a, n);
    return item < 0 ? -1 : slot * a.K + code_at(a, item, slot);
  }
  template <int V>
  FEDPEFT_DEVICE Sum<acc_t<T>, V> value(int64_t n, int64_t, int64_t column) const {
    Sum<acc_t<T>, V> v;
    v.set(static_cast<const T*>(a.grad) + n * a.D + column);
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
            launch_rows(forward<T, V>, total, a.D / V, stream, a, total);
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
