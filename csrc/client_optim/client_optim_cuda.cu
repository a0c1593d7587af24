// CUDA kernels of client_adam_ and client_sgd_: one pass over memory, 16 bytes of parameters a
// lane. A block serves a range of one client's rows, so that the corrections of Adam are computed
// once a block. With L2 a group of lanes takes a row and first looks for a gradient in it; without,
// rows carry no meaning.
#include "client_optim/client_optim_cuda.h"
#include "common/device.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kItem = 8192;  // elements of a block's range, about

FEDPEFT_DEVICE float square_root(float x) { return sqrtf(x); }
FEDPEFT_DEVICE double square_root(double x) { return sqrt(x); }

template <typename T>
struct Adam {
  using A = acc_t<T>;
  A beta1, beta2, rest1, rest2, step_size, denominator_scale, eps;
  A *exp_avg, *exp_avg_sq;

  // False where the client is left as it is.
  FEDPEFT_DEVICE bool start(const ClientOptimArgs& a, int64_t client) {
    FEDPEFT_SHARED(double, corrected, 2);
    const int64_t step = a.steps[client];
    if (step < 1) return false;
    if (threadIdx.x == 0) {
      corrected[0] = a.lr / (1 - pow(a.beta1, double(step)));
      corrected[1] = 1 / sqrt(1 - pow(a.beta2, double(step)));
    }
    __syncthreads();
    beta1 = A(a.beta1);
    beta2 = A(a.beta2);
    rest1 = A(1 - a.beta1);
    rest2 = A(1 - a.beta2);
    step_size = A(corrected[0]);
    denominator_scale = A(corrected[1]);
    eps = A(a.eps);
    exp_avg = static_cast<A*>(a.exp_avg) + client * a.size;
    exp_avg_sq = static_cast<A*>(a.exp_avg_sq) + client * a.size;
    return true;
  }

  template <int V>
  FEDPEFT_DEVICE void step(T* param, const T* grad, int64_t at, A l2) const {
    Sum<A, V> p, g, m, v;
    p.set(param + at);
    g.set(grad + at);
    m.set(exp_avg + at);
    v.set(exp_avg_sq + at);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const A gradient = g.at[i] + l2 * p.at[i];
      m.at[i] += rest1 * (gradient - m.at[i]);
      v.at[i] = beta2 * v.at[i] + rest2 * gradient * gradient;
      p.at[i] -= step_size * (m.at[i] / (square_root(v.at[i]) * denominator_scale + eps));
    }
    m.store(exp_avg + at);
    v.store(exp_avg_sq + at);
    p.store(param + at);
  }
};

template <typename T>
struct Sgd {
  using A = acc_t<T>;
  A lr, momentum;
  A* buffer;

  FEDPEFT_DEVICE bool start(const ClientOptimArgs& a, int64_t client) {
    lr = A(a.lr);
    momentum = A(a.momentum);
    buffer = a.momentum_buffer ? static_cast<A*>(a.momentum_buffer) + client * a.size : nullptr;
    return true;
  }

  template <int V>
  FEDPEFT_DEVICE void step(T* param, const T* grad, int64_t at, A l2) const {
    Sum<A, V> p, g;
    p.set(param + at);
    g.set(grad + at);
#pragma unroll
    for (int i = 0; i < V; ++i) g.at[i] += l2 * p.at[i];
    if (buffer) {
      Sum<A, V> b;
      b.set(buffer + at);
#pragma unroll
      for (int i = 0; i < V; ++i) g.at[i] += momentum * b.at[i];
      g.store(buffer + at);
    }
#pragma unroll
    for (int i = 0; i < V; ++i) p.at[i] -= lr * g.at[i];
    p.store(param + at);
  }
};

// Block (client, range of `rows` rows of `row` elements).
template <template <typename> class Optimizer, typename T, int V, bool L2>
__global__ void __launch_bounds__(kThreads, 2)
    optimize(ClientOptimArgs a, int64_t clients, int64_t row, int64_t rows) {
  using A = acc_t<T>;
  const int64_t ranges = (a.size + row * rows - 1) / (row * rows), tasks = clients * ranges;
  const int lanes = L2 ? lanes_for(row / V) : 1, lane = int(threadIdx.x) % lanes,
            groups = kThreads / lanes;
  const unsigned group_mask = (lanes == kWarp ? kFullMask : (1u << lanes) - 1)
                              << (int(threadIdx.x) % kWarp / lanes * lanes);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, ranges), begin = (task - client * ranges) * row * rows;
    const int64_t end = begin + row * rows < a.size ? begin + row * rows : a.size;
    Optimizer<T> optimizer;
    __syncthreads();  // the readers of the task before
    if (!optimizer.start(a, client)) continue;
    T* param = static_cast<T*>(a.param) + client * a.size;
    const T* grad = static_cast<const T*>(a.grad) + client * a.size;
    if constexpr (!L2) {
      for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V)
        optimizer.template step<V>(param, grad, i, A(0));
    } else {
      for (int64_t first = begin; first < end; first += groups * row) {
        const int64_t start = first + threadIdx.x / lanes * row;
        bool nonzero = false;
        if (start < end) {
          for (int64_t column = lane * V; column < row; column += lanes * V) {
            Sum<A, V> g;
            g.set(grad + start + column);
#pragma unroll
            for (int i = 0; i < V; ++i) nonzero |= g.at[i] != A(0);
          }
        }
        const bool touched = (__ballot_sync(kFullMask, nonzero) & group_mask) != 0;
        if (start < end) {
          for (int64_t column = lane * V; column < row; column += lanes * V)
            optimizer.template step<V>(param, grad, start + column, touched ? A(a.l2) : A(0));
        }
      }
    }
  }
}

template <template <typename> class Optimizer>
void launch_optimizer(const ClientOptimArgs& a, DType dtype, int64_t clients, Stream stream) {
  if (a.size == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const bool l2 = a.l2 != 0;
    // The state of 16-bit parameters is of twice as many bytes.
    const auto apart = [](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<acc_t<T>, kWide<T>>) == 0;
    };
    const bool whole = apart(a.exp_avg) && apart(a.exp_avg_sq) && apart(a.momentum_buffer);
    with_width<T>(
        whole ? (l2 ? a.row : a.size) : 1,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          const int64_t row = l2 ? a.row : V, rows = row < kItem ? kItem / row : 1;
          const int64_t grid = clients * ((a.size + row * rows - 1) / (row * rows));
          if (l2) {
            launch(optimize<Optimizer, T, V, true>, grid, kThreads, 0, stream, a, clients, row,
                   rows);
          } else {
            launch(optimize<Optimizer, T, V, false>, grid, kThreads, 0, stream, a, clients, row,
                   rows);
          }
        },
        a.param, a.grad);
  });
}

}  // namespace

void client_adam(const ClientOptimArgs& a, DType dtype, int64_t clients, Stream stream) {
  launch_optimizer<Adam>(a, dtype, clients, stream);
}

void client_sgd(const ClientOptimArgs& a, DType dtype, int64_t clients, Stream stream) {
  launch_optimizer<Sgd>(a, dtype, clients, stream);
}

}  // namespace fedpeft::gpu
