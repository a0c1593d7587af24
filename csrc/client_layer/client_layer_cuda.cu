// CUDA kernels of client_layer: a thread an element of the result, each one chain in the order of
// the summed index.
#include "client_layer/client_layer_cuda.h"
#include "common/device.cuh"
#include "common/philox.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) forward(ClientLayerArgs a, int64_t total) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width;
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < total;
       e += int64_t(gridDim.x) * kThreads) {
    const int64_t n = divide(e, O), o = e - n * O, c = divide(n, a.positions);
    const int64_t client = a.clients[c];
    if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, c, int64_t{1} << 32);
    A sum = 0;
    if (a.items[n] >= 0) {
      sum = to_acc(static_cast<const T*>(a.bias)[c * O + o]);
      const T* x = static_cast<const T*>(a.x) + n * I;
      const T* weight = static_cast<const T*>(a.weight) + (c * O + o) * I;
      for (int64_t i = 0; i < I; ++i) sum += to_acc(x[i]) * to_acc(weight[i]);
      sum = sum < A(0) ? A(0) : sum;
      if (a.drop) {
        const int64_t element = e - c * a.positions * O;
        const PhiloxBlock words =
            philox(uint32_t(element / 4), uint32_t(client), a.round, a.stream, a.seed);
        // Chosen, not indexed: an index known only at run time would move the words to memory.
        const int at = int(element % 4);
        const uint32_t low = at & 1 ? words.word[1] : words.word[0];
        const uint32_t high = at & 1 ? words.word[3] : words.word[2];
        sum = (at & 2 ? high : low) >= a.threshold ? sum * A(a.scale) : A(0);
      }
    }
    static_cast<T*>(a.out)[e] = from_acc<T>(sum);
  }
}

// Gradient before ReLU and dropout.
template <typename T>
FEDPEFT_DEVICE acc_t<T> before(const ClientLayerArgs& a, int64_t n, int64_t o) {
  using A = acc_t<T>;
  const int64_t e = n * a.out_width + o;
  return to_acc(static_cast<const T*>(a.kept)[e]) > A(0)
             ? to_acc(static_cast<const T*>(a.grad)[e]) * A(a.scale)
             : A(0);
}

template <typename T>
FEDPEFT_DEVICE void backward_x(const ClientLayerArgs& a, int64_t e) {
  using A = acc_t<T>;
  const int64_t n = divide(e, a.in), i = e - n * a.in, c = divide(n, a.positions);
  const T* weight = static_cast<const T*>(a.weight) + c * a.out_width * a.in + i;
  A sum = 0;
  if (a.items[n] >= 0) {
    for (int64_t o = 0; o < a.out_width; ++o) sum += before<T>(a, n, o) * to_acc(weight[o * a.in]);
  }
  static_cast<T*>(a.grad_x)[e] = from_acc<T>(sum);
}

// Weights and, as one more column, the bias.
template <typename T>
FEDPEFT_DEVICE void backward_weight(const ClientLayerArgs& a, int64_t e) {
  using A = acc_t<T>;
  const int64_t columns = a.in + 1, row = divide(e, columns), i = e - row * columns;
  const int64_t c = divide(row, a.out_width), o = row - c * a.out_width;
  A sum = 0;
  for (int64_t n = c * a.positions; n < (c + 1) * a.positions; ++n) {
    if (a.items[n] < 0) continue;
    const A g = before<T>(a, n, o);
    sum += i < a.in ? g * to_acc(static_cast<const T*>(a.x)[n * a.in + i]) : g;
  }
  if (i < a.in) {
    static_cast<T*>(a.grad_weight)[row * a.in + i] = from_acc<T>(sum);
  } else {
    static_cast<T*>(a.grad_bias)[row] = from_acc<T>(sum);
  }
}

// `weights` elements of the weights' gradients, which are the longest sums, then `inputs` of x's.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    backward(ClientLayerArgs a, int64_t weights, int64_t inputs) {
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < weights + inputs;
       e += int64_t(gridDim.x) * kThreads) {
    if (e < weights) {
      backward_weight<T>(a, e);
    } else {
      backward_x<T>(a, e - weights);
    }
  }
}

int64_t grid_of(int64_t total) { return (total + kThreads - 1) / kThreads; }

}  // namespace

void client_layer(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t total = clients * a.positions * a.out_width;
  with_dtype(dtype, [&](auto zero) {
    launch(forward<decltype(zero)>, grid_of(total), kThreads, 0, stream, a, total);
  });
}

void client_layer_backward(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t inputs = clients * a.positions * a.in;
  const int64_t weights = clients * a.out_width * (a.in + 1);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(backward<T>, grid_of(weights + inputs), kThreads, 0, stream, a, weights, inputs);
  });
}

}  // namespace fedpeft::gpu
