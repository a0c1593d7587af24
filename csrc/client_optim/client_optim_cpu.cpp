// CPU kernels of client_adam_ and client_sgd_: one pass over stretches of rows that step alike.
#include "client_optim/client_optim_cpu.h"

#include "common/adam.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// A vector of each of an element's arrays. 16-bit parameters and gradients step in float32.
template <typename T>
struct Element {
  vec_t<acc_t<T>> param, grad, first, second;  // moments: exp_avg and exp_avg_sq, or momentum
};

// Where the arrays of a client are; null: not used.
template <typename T>
struct Arrays {
  T* param;
  const T* grad;
  acc_t<T>*first, *second;

  // Steps elements [begin, end) in vectors, the last one filled up, so that an element's arithmetic
  // does not depend on where a stretch begins. Without moments a cache line at a time, since that
  // little arithmetic would wait for memory in between. No prefetches: they slow down what the
  // processor fetches ahead of streams by itself.
  template <int moments, typename Step>
  FEDPEFT_INLINE void step(int64_t begin, int64_t end, const Step& step_vector) const {
    constexpr int64_t N = kLanes<acc_t<T>>, kLine = 64 / int64_t(sizeof(T));
    int64_t i = begin;
    if constexpr (moments == 0) {
      for (; i + kLine <= end; i += kLine) step_vectors<moments, kLine / N>(i, step_vector);
    }
    for (; i + N <= end; i += N) step_vectors<moments, 1>(i, step_vector);
    const int64_t left = end - i;
    if (left == 0) return;
    Element<T> e{};
    e.param = load_part(static_cast<const T*>(param) + i, left);
    e.grad = load_part(grad + i, left);
    if constexpr (moments > 0) e.first = load_part(static_cast<const acc_t<T>*>(first) + i, left);
    if constexpr (moments > 1) e.second = load_part(static_cast<const acc_t<T>*>(second) + i, left);
    step_vector(e);
    store_part(param + i, e.param, left);
    if constexpr (moments > 0) store_part(first + i, e.first, left);
    if constexpr (moments > 1) store_part(second + i, e.second, left);
  }

  template <int moments, int V, typename Step>
  FEDPEFT_INLINE void step_vectors(int64_t i, const Step& step_vector) const {
    constexpr int64_t N = kLanes<acc_t<T>>;
    Element<T> e[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = i + v * N;
      e[v].param = load(static_cast<const T*>(param) + at);
      e[v].grad = load(grad + at);
      if constexpr (moments > 0) e[v].first = load(static_cast<const acc_t<T>*>(first) + at);
      if constexpr (moments > 1) e[v].second = load(static_cast<const acc_t<T>*>(second) + at);
    }
    for (int v = 0; v < V; ++v) step_vector(e[v]);
    for (int v = 0; v < V; ++v) {
      const int64_t at = i + v * N;
      store(param + at, e[v].param);
      if constexpr (moments > 0) store(first + at, e[v].first);
      if constexpr (moments > 1) store(second + at, e[v].second);
    }
  }

  // touched: the gradient moves the row. coasting: moments alone do. still: nothing does, as in
  // most padding rows of a batch of clients.
  enum class Row { still, coasting, touched };
  template <int moments>
  FEDPEFT_INLINE Row row_kind(int64_t at, int64_t n) const {
    if (any_nonzero(grad + at, n)) return Row::touched;
    if constexpr (moments > 0) {
      if (any_nonzero(first + at, n)) return Row::coasting;
    }
    if constexpr (moments > 1) {
      if (any_nonzero(second + at, n)) return Row::coasting;
    }
    return Row::still;
  }

  // Calls step(begin, end, l2) for all but still rows. Without l2 and with `harmless` steps (a
  // still row stays as it is), only the first element of a long stretch is looked at: to look
  // further ahead would spoil the one pass in order that memory is fastest at.
  template <int moments, typename Step>
  FEDPEFT_INLINE void stretches(int64_t begin, int64_t end, int64_t row, double l2, bool harmless,
                                const Step& step_stretch) const {
    constexpr int64_t kStretch = 16384;
    for (int64_t i = begin; i < end;) {
      const int64_t far = i + kStretch < end ? i + kStretch : end;
      if (l2 == 0 && harmless && nonzero(grad[i])) {
        step_stretch(i, far, acc_t<T>(0));
        i = far;
        continue;
      }
      for (; i < far; i += row) {
        const int64_t n = end - i < row ? end - i : row;
        const Row kind = row_kind<moments>(i, n);
        if (kind != Row::still) step_stretch(i, i + n, acc_t<T>(kind == Row::touched ? l2 : 0));
      }
    }
  }
};

// Calls run(client, first, last) for the part of each client's elements that is in work items
// [begin, end).
template <typename Run>
FEDPEFT_INLINE void for_items(const ClientOptimArgs& a, int64_t begin, int64_t end,
                              const Run& run) {
  const int64_t elements = a.rows * a.row;
  for (int64_t item = begin; item < end;) {
    const int64_t client = item / a.blocks, block = item % a.blocks;
    const int64_t blocks = a.blocks - block < end - item ? a.blocks - block : end - item;
    const int64_t last = (block + blocks) * elements;
    run(client, block * elements, last < a.size ? last : a.size);
    item += blocks;
  }
}

template <typename T>
void adam(const ClientOptimArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    const int64_t step = a.steps[client];
    if (step < 1) return;
    const AdamRates<A> rates(a, step);
    const int64_t at = client * a.size;
    const Arrays<T> arrays{static_cast<T*>(a.param) + at, static_cast<const T*>(a.grad) + at,
                           static_cast<A*>(a.exp_avg) + at, static_cast<A*>(a.exp_avg_sq) + at};
    arrays.template stretches<2>(
        first, last, a.row, a.l2, a.eps > 0, [&](int64_t i, int64_t j, A l2) {
          arrays.template step<2>(i, j, [&](Element<T>& e) {
            rates.step(multiply_add(l2, e.param, e.grad), e.param, e.first, e.second);
          });
        });
  });
}

template <typename T>
void sgd(const ClientOptimArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const A lr = A(a.lr), momentum = A(a.momentum);
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    const int64_t at = client * a.size;
    A* buffer = a.momentum_buffer ? static_cast<A*>(a.momentum_buffer) + at : nullptr;
    const Arrays<T> arrays{static_cast<T*>(a.param) + at, static_cast<const T*>(a.grad) + at,
                           buffer, nullptr};
    if (buffer) {
      arrays.template stretches<1>(first, last, a.row, a.l2, true, [&](int64_t i, int64_t j, A l2) {
        arrays.template step<1>(i, j, [&](Element<T>& e) {
          e.first = multiply_add(momentum, e.first, multiply_add(l2, e.param, e.grad));
          e.param = multiply_add(-lr, e.first, e.param);
        });
      });
    } else {
      arrays.template stretches<0>(first, last, a.row, a.l2, true, [&](int64_t i, int64_t j, A l2) {
        arrays.template step<0>(i, j, [&](Element<T>& e) {
          e.param = multiply_add(-lr, multiply_add(l2, e.param, e.grad), e.param);
        });
      });
    }
  });
}

}  // namespace

const ClientOptimKernels client_optim_kernels = {
    {adam<float>, adam<double>, adam<Half>, adam<BFloat16>},
    {sgd<float>, sgd<double>, sgd<Half>, sgd<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
