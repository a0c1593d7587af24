// Softplus and sigmoid on the device, without overflow.
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

FEDPEFT_DEVICE float exp_of(float x) { return expf(x); }
FEDPEFT_DEVICE double exp_of(double x) { return exp(x); }
FEDPEFT_DEVICE float log1p_of(float x) { return log1pf(x); }
FEDPEFT_DEVICE double log1p_of(double x) { return log1p(x); }

// log(1 + exp(x))
template <typename A>
FEDPEFT_DEVICE A softplus(A x) {
  return (x > A(0) ? x : A(0)) + log1p_of(exp_of(x > A(0) ? -x : x));
}

// 1 / (1 + exp(-x))
template <typename A>
FEDPEFT_DEVICE A sigmoid(A x) {
  const A e = exp_of(x > A(0) ? -x : x);
  return (x < A(0) ? e : A(1)) / (A(1) + e);
}

}  // namespace fedpeft::gpu
