// What a step of Adam (Kingma and Ba, 2015) multiplies by. Included by *_cpu.cpp files only.
#pragma once

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

template <typename A>
struct AdamRates {
  A beta1, beta2, rest1, rest2, step_size, denominator_scale, eps;  // rest = 1 - beta

  // Of the `number`-th step (from 1); `a` has lr, beta1, beta2 and eps in double.
  template <typename Args>
  AdamRates(const Args& a, int64_t number) {
    const double correction1 = 1 - __builtin_pow(a.beta1, double(number));
    const double correction2 = 1 - __builtin_pow(a.beta2, double(number));
    beta1 = A(a.beta1);
    beta2 = A(a.beta2);
    rest1 = A(1 - a.beta1);
    rest2 = A(1 - a.beta2);
    step_size = A(a.lr / correction1);
    denominator_scale = A(1 / __builtin_sqrt(correction2));
    eps = A(a.eps);
  }

  // The moments after a gradient, and what to take from the parameter.
  FEDPEFT_INLINE vec_t<A> step(vec_t<A> g, vec_t<A>& first, vec_t<A>& second) const {
    first = first + rest1 * (g - first);
    second = beta2 * second + rest2 * g * g;
    return step_size * (first / (square_root(second) * denominator_scale + eps));
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
