// Softplus and sigmoid of one element in branch-free code, so that the compiler vectorizes loops
// over them. Included by *_cpu.cpp files only.
#pragma once

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

// exp(x) for x <= 0, to about 1 ulp. x = n log 2 + r; the polynomial is a minimax fit of (exp(r) -
// 1 - r) / r^2.
FEDPEFT_INLINE float exp_nonpositive(float x) {
  x = x < -110.0f ? -110.0f : x;  // below, even the smallest subnormal is too large
  const float shifted =
      x * 1.44269504f + 0x1.8p23f;  // the sum's last bits hold n, rounded to nearest
  const float n = shifted - 0x1.8p23f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 0.00139261761f;
  q = q * r + 0.00836317307f;
  q = q * r + 0.0416665547f;
  q = q * r + 0.16666577f;
  q = q * r + 0.5f;
  const float e = 1.0f + (r + r * r * q);
  // In two factors, so that results below 2^-126 round to subnormals.
  const int32_t exponent = int32_t(float_to_bits(shifted)) - 0x4b400000, half = exponent >> 1;
  const float scale0 = bits_to_float(uint32_t(half + 127) << 23);
  const float scale1 = bits_to_float(uint32_t(exponent - half + 127) << 23);
  return e * scale0 * scale1;
}
FEDPEFT_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }

// log(1 + e) for 0 <= e <= 1: 2 atanh(s), s = e / (2 + e); the polynomial is a minimax fit in s^2
// <= 1/9.
FEDPEFT_INLINE float log1p_unit(float e) {
  const float s = e / (2.0f + e);
  const float z = s * s;
  float q = 0.116121646f;
  q = q * z + 0.108532879f;
  q = q * z + 0.14296179f;
  q = q * z + 0.199998532f;
  q = q * z + 0.333333337f;
  return 2.0f * (s + s * z * q);
}
FEDPEFT_INLINE double log1p_unit(double e) { return __builtin_log1p(e); }

FEDPEFT_INLINE float absolute(float x) { return __builtin_fabsf(x); }
FEDPEFT_INLINE double absolute(double x) { return __builtin_fabs(x); }

// log(1 + exp(x))
template <typename A>
FEDPEFT_INLINE A softplus(A x) {
  return (x > 0 ? x : A(0)) + log1p_unit(exp_nonpositive(-absolute(x)));
}

// 1 / (1 + exp(-x))
template <typename A>
FEDPEFT_INLINE A sigmoid(A x) {
  const A e = exp_nonpositive(-absolute(x));
  return (x < 0 ? e : A(1)) / (A(1) + e);
}

}  // namespace fedpeft::FEDPEFT_ISA
