// CUDA kernels of sample_negatives (a thread a draw) and client_dropout (a thread a Philox block,
// four elements).
#include "common/negatives.cuh"
#include "sampling/sampling_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

struct Positives {
  int64_t user, first, count;
};

// The positives of a client, which lie in memory and leave an item to draw.
FEDPEFT_DEVICE Positives positives_of(const SampleNegativesArgs& a, int64_t c, int64_t users,
                                      int64_t nnz) {
  const int64_t user = a.clients[c];
  if (uint64_t(user) >= uint64_t(users)) FEDPEFT_BAD_INDEX("clients", user, c, users);
  const int64_t first = a.indptr[user], last = a.indptr[user + 1];
  if (first < 0 || last < first || last > nnz)
    FEDPEFT_BAD_VALUE("indptr: expected ascending offsets");
  if (last - first >= a.num_items)
    FEDPEFT_BAD_VALUE("clients: a client has met all items: there is no negative to draw",
                      "clients: client " + std::to_string(user) + " has met all " +
                          std::to_string(a.num_items) + " items: there is no negative to draw");
  return {user, first, last - first};
}

// The first `checks` blocks see that the positives of each client ascend; the others draw.
template <typename Item>
__global__ void __launch_bounds__(kThreads, 4)
    negatives(SampleNegativesArgs a, int64_t clients, int64_t users, int64_t nnz, int64_t checks) {
  if (blockIdx.x < checks) {
    for (int64_t c = blockIdx.x; c < clients; c += checks) {
      const Positives met = positives_of(a, c, users, nnz);
      for (int64_t i = met.first + threadIdx.x; i < met.first + met.count; i += kThreads) {
        const int64_t item = a.indices[i];
        if (uint64_t(item) >= uint64_t(a.num_items))
          FEDPEFT_BAD_INDEX("indices", item, i, a.num_items);
        if (i > met.first && item <= a.indices[i - 1])
          FEDPEFT_BAD_VALUE("indices: expected distinct items in ascending order within a client");
      }
    }
    return;
  }
  const int64_t draws = a.epochs * a.positions, total = clients * draws;
  for (int64_t e = (blockIdx.x - checks) * kThreads + threadIdx.x; e < total;
       e += (gridDim.x - checks) * kThreads) {
    const int64_t c = divide(e, draws), epoch = divide(e - c * draws, a.positions);
    const int64_t p = e - c * draws - epoch * a.positions, n = c * a.positions + p;
    const int64_t item = a.items[n];
    const Position kind = classify(item, a.num_items);
    if (kind == Position::bad) FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
    int64_t negative = -1;
    if (kind == Position::item) {
      const Positives met = positives_of(a, c, users, nnz);
      negative = draw_negative(a.indices, met.first, met.count, a.num_items, uint32_t(p),
                               uint32_t(met.user), a.round, uint32_t(epoch), a.seed);
    }
    static_cast<Item*>(a.out)[e] = Item(negative);
  }
}

// Whole: the elements of a client are a multiple of four and aligned to four.
template <typename T, bool Whole>
__global__ void __launch_bounds__(kThreads, 4) dropout(ClientDropoutArgs a, int64_t clients) {
  using A = acc_t<T>;
  const int64_t blocks = (a.size + 3) / 4, total = clients * blocks;
  const A scale = A(a.scale);
  for (int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x; b < total;
       b += int64_t(gridDim.x) * kThreads) {
    const int64_t c = divide(b, blocks), block = b - c * blocks, client = a.clients[c];
    if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, c, int64_t{1} << 32);
    const PhiloxBlock words = philox(uint32_t(block), uint32_t(client), a.round,
                                     philox_stream(Purpose::dropout, a.layer, a.epoch), a.seed);
    const int64_t at = c * a.size + block * 4;
    const T* x = static_cast<const T*>(a.x) + at;
    T* out = static_cast<T*>(a.out) + at;
    if constexpr (Whole) {
      Sum<A, 4> v;
      v.set(x);
#pragma unroll
      for (int i = 0; i < 4; ++i) v.at[i] = words.word[i] >= a.threshold ? v.at[i] * scale : A(0);
      v.store(out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (block * 4 + i < a.size)
          out[i] = from_acc<T>(words.word[i] >= a.threshold ? to_acc(x[i]) * scale : A(0));
      }
    }
  }
}

}  // namespace

void sample_negatives(const SampleNegativesArgs& a, int64_t clients, int64_t users, int64_t nnz,
                      Stream stream) {
  const int64_t checks = grid_half(clients);
  const int64_t grid =
      checks + grid_half((clients * a.epochs * a.positions + kThreads - 1) / kThreads);
  launch(a.items.bytes == 8 ? negatives<int64_t> : negatives<int32_t>, grid, kThreads, 0, stream, a,
         clients, users, nnz, checks);
}

void client_dropout(const ClientDropoutArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t grid = (clients * ((a.size + 3) / 4) + kThreads - 1) / kThreads;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto aligned = [](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, 4>) == 0;
    };
    if (a.size % 4 == 0 && aligned(a.x) && aligned(a.out)) {
      launch(dropout<T, true>, grid, kThreads, 0, stream, a, clients);
    } else {
      launch(dropout<T, false>, grid, kThreads, 0, stream, a, clients);
    }
  });
}

}  // namespace fedpeft::gpu
