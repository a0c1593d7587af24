// CUDA kernels of bpr_loss and bce_loss: a block a client and 4096 positions; a client of one block
// needs one launch.
#include "common/block.cuh"
#include "common/logistic.cuh"
#include "losses/losses_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// Positions of a thread whose loads are under way together.
template <typename A>
constexpr int kBatch = sizeof(A) == 8 ? 4 : 8;
constexpr int kItemBatch = 8;
static_assert(kLossBlock <= 32 * kThreads && kLossBlock % (kItemBatch * kThreads) == 0);

struct Range {
  int64_t client, begin, end;  // flat positions
};

FEDPEFT_DEVICE Range range_of(const LossArgs& a, int64_t task) {
  const int64_t client = divide(task, a.blocks), first = (task - client * a.blocks) * kLossBlock;
  const int64_t last = first + kLossBlock < a.positions ? first + kLossBlock : a.positions;
  return {client, client * a.positions + first, client * a.positions + last};
}

// The thread's positions that hold an item, a bit each: bit k is its k-th position.
FEDPEFT_DEVICE uint32_t held_positions(const LossArgs& a, const Range& range) {
  uint32_t held = 0, bit = 1;
  for (int64_t first = range.begin + threadIdx.x; first < range.end;
       first += kThreads * kItemBatch) {
    int64_t at[kItemBatch], item[kItemBatch];
#pragma unroll
    for (int i = 0; i < kItemBatch; ++i)
      at[i] = first + i * kThreads < range.end ? first + i * kThreads : -1;
    gather(a.items, at, item);
#pragma unroll
    for (int i = 0; i < kItemBatch; ++i, bit <<= 1)
      if (at[i] >= 0 && item[i] != -1) held |= bit;
  }
  return held;
}

FEDPEFT_DEVICE int64_t count_bits(uint32_t bits) {
#if defined(__CUDACC__)
  return __popc(bits);
#else
  return std::popcount(bits);
#endif
}

// f(position, positive score, negative score, held) for the thread's positions, whose loads are
// under way several at a time.
template <typename T, typename F>
FEDPEFT_DEVICE void for_scores(const LossArgs& a, const Range& range, uint32_t held, const F& f) {
  using A = acc_t<T>;
  constexpr int N = kBatch<A>;
  const T *positive = static_cast<const T*>(a.positive),
          *negative = static_cast<const T*>(a.negative);
  for (int64_t first = range.begin + threadIdx.x; first < range.end; first += kThreads * N) {
    A x[N], y[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const bool there = held >> i & 1;
      x[i] = there ? to_acc(positive[first + i * kThreads]) : A(0);
      y[i] = there ? to_acc(negative[first + i * kThreads]) : A(0);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i * kThreads < range.end)
        f(first + i * kThreads, x[i], y[i], bool(held >> i & 1));
    }
    held >>= N;
  }
}

template <typename T, bool Bpr>
FEDPEFT_DEVICE T mean_of(double sum, int64_t count) {
  return from_acc<T>(acc_t<T>(count == 0 ? 0.0 : sum / double(Bpr ? count : 2 * count)));
}

template <typename T, bool Bpr>
__global__ void __launch_bounds__(kThreads, 4) forward(LossArgs a, int64_t clients, T* out) {
  using A = acc_t<T>;
  FEDPEFT_SHARED(double, sums, kWarps);
  FEDPEFT_SHARED(int64_t, counts, kWarps);
  for (int64_t task = blockIdx.x; task < clients * a.blocks; task += gridDim.x) {
    const Range range = range_of(a, task);
    const uint32_t held = held_positions(a, range);
    double sum = 0;
    for_scores<T>(a, range, held, [&](int64_t, A x, A y, bool there) {
      if (there) sum += double(Bpr ? softplus(y - x) : softplus(-x) + softplus(y));
    });
    sum = block_sum(sum, sums);
    const int64_t count = block_sum(count_bits(held), counts);
    if (threadIdx.x != 0) continue;
    if (a.blocks == 1) {
      out[range.client] = mean_of<T, Bpr>(sum, count);
    } else {
      a.sums[task] = sum;
      a.counts[task] = count;
    }
  }
}

template <typename T, bool Bpr>
__global__ void __launch_bounds__(kThreads, 4) join(LossArgs a, int64_t clients, T* out) {
  for (int64_t c = int64_t(blockIdx.x) * kThreads + threadIdx.x; c < clients;
       c += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    int64_t count = 0;
    for (int64_t b = c * a.blocks; b < (c + 1) * a.blocks; ++b) {
      sum += a.sums[b];
      count += a.counts[b];
    }
    out[c] = mean_of<T, Bpr>(sum, count);
  }
}

__global__ void __launch_bounds__(kThreads, 4) count(LossArgs a, int64_t clients) {
  FEDPEFT_SHARED(int64_t, counts, kWarps);
  for (int64_t task = blockIdx.x; task < clients * a.blocks; task += gridDim.x) {
    const int64_t found = block_sum(count_bits(held_positions(a, range_of(a, task))), counts);
    if (threadIdx.x == 0) a.counts[task] = found;
  }
}

template <typename T, bool Bpr>
__global__ void __launch_bounds__(kThreads, 3)
    backward(LossArgs a, int64_t clients, const T* grad) {
  using A = acc_t<T>;
  FEDPEFT_SHARED(int64_t, counts, kWarps);
  for (int64_t task = blockIdx.x; task < clients * a.blocks; task += gridDim.x) {
    const Range range = range_of(a, task);
    const uint32_t held = held_positions(a, range);
    int64_t found = 0;
    if (a.blocks == 1) {
      found = block_sum(count_bits(held), counts);
    } else {
      for (int64_t b = threadIdx.x; b < a.blocks; b += kThreads)
        found += a.counts[range.client * a.blocks + b];
      found = block_sum(found, counts);
    }
    const A scale =
        A(found == 0 ? 0.0 : double(to_acc(grad[range.client])) / double(Bpr ? found : 2 * found));
    for_scores<T>(a, range, held, [&](int64_t n, A x, A y, bool there) {
      A at_positive = 0, at_negative = 0;
      if (there) {
        at_negative = scale * sigmoid(Bpr ? y - x : y);
        at_positive = Bpr ? -at_negative : -scale * sigmoid(-x);
      }
      static_cast<T*>(a.grad_positive)[n] = from_acc<T>(at_positive);
      static_cast<T*>(a.grad_negative)[n] = from_acc<T>(at_negative);
    });
  }
}

template <typename T, bool Bpr>
void launch_forward(const LossArgs& a, int64_t clients, void* out, Stream stream) {
  launch(forward<T, Bpr>, clients * a.blocks, kThreads, 0, stream, a, clients,
         static_cast<T*>(out));
  if (a.blocks > 1)
    launch(join<T, Bpr>, (clients + kThreads - 1) / kThreads, kThreads, 0, stream, a, clients,
           static_cast<T*>(out));
}

}  // namespace

void ranking_loss(const LossArgs& a, DType dtype, bool bpr, int64_t clients, void* out,
                  Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    bpr ? launch_forward<T, true>(a, clients, out, stream)
        : launch_forward<T, false>(a, clients, out, stream);
  });
}

void ranking_loss_backward(const LossArgs& a, DType dtype, bool bpr, int64_t clients,
                           const void* grad, Stream stream) {
  if (a.blocks > 1) launch(count, clients * a.blocks, kThreads, 0, stream, a, clients);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(bpr ? backward<T, true> : backward<T, false>, clients * a.blocks, kThreads, 0, stream, a,
           clients, static_cast<const T*>(grad));
  });
}

}  // namespace fedpeft::gpu
