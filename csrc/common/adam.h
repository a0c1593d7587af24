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

  // The parameter and the moments after a gradient.
  FEDPEFT_INLINE void step(vec_t<A> g, vec_t<A>& parameter, vec_t<A>& first,
                           vec_t<A>& second) const {
    first = multiply_add(rest1, g - first, first);
    second = multiply_add(beta2, second, rest2 * g * g);
    const vec_t<A> size = multiply_add(denominator_scale, square_root(second), eps - vec_t<A>{});
    parameter = multiply_add(-step_size, first / size, parameter);
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
