// Softplus and sigmoid of one element in branch-free code, so that the compiler vectorizes loops
// over them. Included by *_cpu.cpp files only.
#pragma once

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

FEDPEFT_INLINE double bits_to_double(uint64_t bits) {
  double d;
  memcpy(&d, &bits, 8);
  return d;
}
FEDPEFT_INLINE uint64_t double_to_bits(double d) {
  uint64_t bits;
  memcpy(&bits, &d, 8);
  return bits;
}

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
FEDPEFT_INLINE double exp_nonpositive(double x) {
  x = x < -746.0 ? -746.0 : x;
  const double shifted = x * 0x1.71547652b82fep+0 + 0x1.8p52;
  const double n = shifted - 0x1.8p52;
  const double r = (x - n * 0x1.62e42fefa3800p-1) - n * 0x1.ef35793c76730p-45;
  double q = 2.0914686968086876e-09;
  q = q * r + 2.5105217004720745e-08;
  q = q * r + 2.75572736431103e-07;
  q = q * r + 2.7557255400206422e-06;
  q = q * r + 2.4801587325547743e-05;
  q = q * r + 0.00019841269874820627;
  q = q * r + 0.0013888888888883748;
  q = q * r + 0.008333333333326136;
  q = q * r + 0.04166666666666667;
  q = q * r + 0.1666666666666667;
  q = q * r + 0.5;
  const double e = 1.0 + (r + r * r * q);
  // Kept positive, since only logical shifts of 64-bit lanes are in every instruction set.
  const uint64_t exponent = double_to_bits(shifted) - 0x4338000000000000u + 4096u;
  const uint64_t half = exponent >> 1;
  const double scale0 = bits_to_double((half - 2048u + 1023u) << 52);
  const double scale1 = bits_to_double((exponent - half - 2048u + 1023u) << 52);
  return e * scale0 * scale1;
}

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
FEDPEFT_INLINE double log1p_unit(double e) {
  const double s = e / (2.0 + e);
  const double z = s * s;
  double q = 0.07815767353715612;
  q = q * z + 0.03745819730336633;
  q = q * z + 0.05422645516389906;
  q = q * z + 0.05867132589688297;
  q = q * z + 0.06667589830757856;
  q = q * z + 0.07692271958876583;
  q = q * z + 0.0909090994963398;
  q = q * z + 0.11111111099108056;
  q = q * z + 0.14285714285800133;
  q = q * z + 0.1999999999999976;
  q = q * z + 0.3333333333333333;
  return 2.0 * (s + s * z * q);
}

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
