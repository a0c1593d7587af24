// CPU kernels of client_adam_ and client_sgd_: element loops that the compiler vectorizes.
#include "client_optim/client_optim_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kChunk = 64;  // elements of a buffer on the stack, and of a test for zeros

FEDPEFT_INLINE int32_t nonzero(float x) { return x != 0; }
FEDPEFT_INLINE int64_t nonzero(double x) { return x != 0; }
FEDPEFT_INLINE int32_t nonzero(Half x) { return x.bits & 0x7fff; }
FEDPEFT_INLINE int32_t nonzero(BFloat16 x) { return x.bits & 0x7fff; }

template <typename T>
FEDPEFT_INLINE bool any_nonzero(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kChunk) {
    const int64_t end = i + kChunk < n ? i + kChunk : n;
    auto any = nonzero(x[i]);
    for (int64_t j = i; j < end; ++j) any |= nonzero(x[j]);
    if (any) return true;
  }
  return false;
}

FEDPEFT_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
FEDPEFT_INLINE double square_root(double x) { return __builtin_sqrt(x); }

// Calls step(param, grad, first, count) for a row, with `param` and `grad` in the accumulator type;
// 16-bit rows pass through a buffer.
template <typename T, typename Step>
FEDPEFT_INLINE void convert_row(T* param, const T* grad, int64_t n, const Step& step) {
  using A = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    step(param, grad, int64_t{0}, n);
  } else {
    A p[kChunk], g[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t count = n - i < kChunk ? n - i : kChunk;
      for (int64_t j = 0; j < count; ++j) p[j] = to_acc(param[i + j]);
      for (int64_t j = 0; j < count; ++j) g[j] = to_acc(grad[i + j]);
      step(p, g, i, count);
      for (int64_t j = 0; j < count; ++j) from_acc(p[j], param + i + j);
    }
  }
}

// Calls run(client, first, last) for the part of a client's elements that is work item `item`.
template <typename Run>
FEDPEFT_INLINE void for_items(const ClientOptimArgs& a, int64_t begin, int64_t end,
                              const Run& run) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t client = item / a.blocks;
    const int64_t first = (item % a.blocks) * a.rows * a.row;
    const int64_t last = first + a.rows * a.row < a.size ? first + a.rows * a.row : a.size;
    run(client, first, last);
  }
}

template <typename A>
struct AdamStep {
  A beta1, beta2, rest1, rest2, step_size, denominator_scale, eps;  // rest = 1 - beta

  AdamStep(const ClientOptimArgs& a, int64_t step) {
    const double correction1 = 1 - __builtin_pow(a.beta1, double(step));
    const double correction2 = 1 - __builtin_pow(a.beta2, double(step));
    beta1 = A(a.beta1);
    beta2 = A(a.beta2);
    rest1 = A(1 - a.beta1);
    rest2 = A(1 - a.beta2);
    step_size = A(a.lr / correction1);
    denominator_scale = A(1 / __builtin_sqrt(correction2));
    eps = A(a.eps);
  }

  FEDPEFT_INLINE void run(A* __restrict param, const A* __restrict grad, A* __restrict exp_avg,
                          A* __restrict exp_avg_sq, int64_t n, A l2) const {
    for (int64_t i = 0; i < n; ++i) {
      const A g = grad[i] + l2 * param[i];
      const A m = exp_avg[i] + rest1 * (g - exp_avg[i]);
      const A v = beta2 * exp_avg_sq[i] + rest2 * g * g;
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      param[i] -= step_size * (m / (square_root(v) * denominator_scale + eps));
    }
  }
};

template <typename T>
void adam(const ClientOptimArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    const int64_t step = a.steps[client];
    if (step < 1) return;
    const AdamStep<A> adam_step(a, step);
    T* param = static_cast<T*>(a.param) + client * a.size;
    const T* grad = static_cast<const T*>(a.grad) + client * a.size;
    A* exp_avg = static_cast<A*>(a.exp_avg) + client * a.size;
    A* exp_avg_sq = static_cast<A*>(a.exp_avg_sq) + client * a.size;
    for (int64_t i = first; i < last; i += a.row) {
      const int64_t n = last - i < a.row ? last - i : a.row;
      const bool touched = any_nonzero(grad + i, n);
      // Nothing moves where gradient and moments are zero: most padding rows of a batch of clients.
      if (!touched && !any_nonzero(exp_avg + i, n) && !any_nonzero(exp_avg_sq + i, n)) continue;
      const A l2 = touched ? A(a.l2) : A(0);
      convert_row(param + i, grad + i, n, [&](A* p, const A* g, int64_t at, int64_t count) {
        adam_step.run(p, g, exp_avg + i + at, exp_avg_sq + i + at, count, l2);
      });
    }
  });
}

template <typename A>
FEDPEFT_INLINE void sgd_run(A* __restrict param, const A* __restrict grad, int64_t n, A lr, A l2) {
  for (int64_t i = 0; i < n; ++i) param[i] -= lr * (grad[i] + l2 * param[i]);
}

template <typename A>
FEDPEFT_INLINE void momentum_run(A* __restrict param, const A* __restrict grad,
                                 A* __restrict buffer, int64_t n, A lr, A momentum, A l2) {
  for (int64_t i = 0; i < n; ++i) {
    buffer[i] = momentum * buffer[i] + (grad[i] + l2 * param[i]);
    param[i] -= lr * buffer[i];
  }
}

template <typename T>
void sgd(const ClientOptimArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    T* param = static_cast<T*>(a.param) + client * a.size;
    const T* grad = static_cast<const T*>(a.grad) + client * a.size;
    A* buffer = a.momentum_buffer ? static_cast<A*>(a.momentum_buffer) + client * a.size : nullptr;
    for (int64_t i = first; i < last; i += a.row) {
      const int64_t n = last - i < a.row ? last - i : a.row;
      const bool touched = any_nonzero(grad + i, n);
      if (!touched && (!buffer || !any_nonzero(buffer + i, n))) continue;
      const A l2 = touched ? A(a.l2) : A(0);
      convert_row(param + i, grad + i, n, [&](A* p, const A* g, int64_t at, int64_t count) {
        if (buffer) {
          momentum_run(p, g, buffer + i + at, count, A(a.lr), A(a.momentum), l2);
        } else {
          sgd_run(p, g, count, A(a.lr), l2);
        }
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
