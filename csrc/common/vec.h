// One native vector register of accumulators, and the row primitives built on it: the only place
// that knows about register width. Included by *_cpu.cpp files only; everything is inlined into the
// including set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/half.h"
#include "common/types.h"

// FEDPEFT_WIDE: AVX-512 registers at their full width. Work on rows of a few lines, as training by
// dot products does, is faster with the halves.
#if defined(__AVX512F__) && defined(FEDPEFT_WIDE)
#define FEDPEFT_VEC_BYTES 64
#elif defined(__AVX2__)
#define FEDPEFT_VEC_BYTES 32
#else
#define FEDPEFT_VEC_BYTES 16
#endif

namespace fedpeft::FEDPEFT_ISA {

// Accumulator type of a storage type: 16-bit types accumulate in float.
template <typename T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <typename T>
using acc_t = typename AccOf<T>::type;

template <typename A>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
};
template <typename A>
using vec_t = typename VecOf<A>::type;
template <typename A>
constexpr int64_t kLanes = FEDPEFT_VEC_BYTES / sizeof(A);

FEDPEFT_INLINE float to_acc(float x) { return x; }
FEDPEFT_INLINE double to_acc(double x) { return x; }
FEDPEFT_INLINE float to_acc(BFloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
FEDPEFT_INLINE float to_acc(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &x, sizeof(half));
  return half;
#else
  return half_to_float(x.bits);
#endif
}

FEDPEFT_INLINE void from_acc(float x, float* out) { *out = x; }
FEDPEFT_INLINE void from_acc(double x, double* out) { *out = x; }
FEDPEFT_INLINE void from_acc(float x, BFloat16* out) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = uint16_t(x != x ? 0x7fc0u : rounded);
}
FEDPEFT_INLINE void from_acc(float x, Half* out) {
#if defined(__F16C__)
  out->bits = uint16_t(_cvtss_sh(x, 0));
#elif defined(__aarch64__)
  const __fp16 half = __fp16(x);
  memcpy(out, &half, sizeof(half));
#else
  out->bits = float_to_half(x);
#endif
}

template <typename T>
FEDPEFT_INLINE vec_t<acc_t<T>> load(const T* p) {
  using A = acc_t<T>;
  vec_t<A> v;
  if constexpr (sizeof(T) == sizeof(A)) {
    memcpy(&v, p, sizeof(v));
  } else {
    for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = to_acc(p[i]);
  }
  return v;
}

template <typename T>
FEDPEFT_INLINE void store(T* p, vec_t<acc_t<T>> v) {
  using A = acc_t<T>;
  if constexpr (sizeof(T) == sizeof(A)) {
    memcpy(p, &v, sizeof(v));
  } else {
    for (int64_t i = 0; i < kLanes<A>; ++i) from_acc(v[i], p + i);
  }
}

#if FEDPEFT_VEC_BYTES == 32
// Intrinsics, since the compiler turns conversions of whole vectors into many more instructions.
typedef uint32_t u32x8 __attribute__((vector_size(32)));
template <>
FEDPEFT_INLINE vec_t<float> load<BFloat16>(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vec_t<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
template <>
FEDPEFT_INLINE void store<BFloat16>(BFloat16* p, vec_t<float> v) {
  const u32x8 bits = (u32x8)v;
  const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x8 nan = (u32x8)(v != v);
  const __m256i out = (__m256i)((rounded & ~nan) | (nan & 0x7fc0u));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(out), _mm256_extracti128_si256(out, 1)));
}
template <>
FEDPEFT_INLINE vec_t<float> load<Half>(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
template <>
FEDPEFT_INLINE void store<Half>(Half* p, vec_t<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
}
#elif FEDPEFT_VEC_BYTES == 64
typedef uint32_t u32x16 __attribute__((vector_size(64)));
template <>
FEDPEFT_INLINE vec_t<float> load<BFloat16>(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (vec_t<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
template <>
FEDPEFT_INLINE void store<BFloat16>(BFloat16* p, vec_t<float> v) {
  const u32x16 bits = (u32x16)v;
  const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32x16 nan = (u32x16)(v != v);
  const __m512i out = (__m512i)((rounded & ~nan) | (nan & 0x7fc0u));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
template <>
FEDPEFT_INLINE vec_t<float> load<Half>(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <>
FEDPEFT_INLINE void store<Half>(Half* p, vec_t<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
}
#elif defined(__aarch64__)
template <>
FEDPEFT_INLINE vec_t<float> load<Half>(const Half* p) {
  float16x4_t half;
  memcpy(&half, p, sizeof(half));
  return (vec_t<float>)vcvt_f32_f16(half);
}
template <>
FEDPEFT_INLINE void store<Half>(Half* p, vec_t<float> v) {
  const float16x4_t half = vcvt_f16_f32((float32x4_t)v);
  memcpy(static_cast<void*>(p), &half, sizeof(half));
}
#endif

// The first n < kLanes elements; the other lanes are zero.
template <typename T>
FEDPEFT_INLINE vec_t<acc_t<T>> load_part(const T* p, int64_t n) {
#if FEDPEFT_VEC_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    return (vec_t<acc_t<T>>)_mm256_maskload_ps(
        reinterpret_cast<const float*>(p),
        _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  }
#elif FEDPEFT_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    return (vec_t<acc_t<T>>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
  }
#endif
  T part[kLanes<acc_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(static_cast<const T*>(part));
}
template <typename T>
FEDPEFT_INLINE void store_part(T* p, vec_t<acc_t<T>> v, int64_t n) {
  T part[kLanes<acc_t<T>>];
  store(static_cast<T*>(part), v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

FEDPEFT_INLINE vec_t<float> square_root(vec_t<float> v) {
#if FEDPEFT_VEC_BYTES == 64
  return (vec_t<float>)_mm512_sqrt_ps((__m512)v);
#elif FEDPEFT_VEC_BYTES == 32
  return (vec_t<float>)_mm256_sqrt_ps((__m256)v);
#elif defined(__SSE2__)
  return (vec_t<float>)_mm_sqrt_ps((__m128)v);
#elif defined(__aarch64__)
  return (vec_t<float>)vsqrtq_f32((float32x4_t)v);
#else
  for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}
FEDPEFT_INLINE vec_t<double> square_root(vec_t<double> v) {
#if FEDPEFT_VEC_BYTES == 64
  return (vec_t<double>)_mm512_sqrt_pd((__m512d)v);
#elif FEDPEFT_VEC_BYTES == 32
  return (vec_t<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__SSE2__)
  return (vec_t<double>)_mm_sqrt_pd((__m128d)v);
#elif defined(__aarch64__)
  return (vec_t<double>)vsqrtq_f64((float64x2_t)v);
#else
  for (int64_t i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
#endif
}

// a * b + c, rounded once where the processor can. Sums say it so, since a compiler that chooses
// which products it fuses makes their bits hang on how it unrolled them: of a * b + c * d it may
// fuse either, and GCC from 14 on none in a chain of sums over a loop, for an unnamed processor.
FEDPEFT_INLINE float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
FEDPEFT_INLINE double multiply_add(double a, double b, double c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
FEDPEFT_INLINE vec_t<float> multiply_add(vec_t<float> a, vec_t<float> b, vec_t<float> c) {
#if FEDPEFT_VEC_BYTES == 64
  return (vec_t<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif FEDPEFT_VEC_BYTES == 32 && defined(__FMA__)
  return (vec_t<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vec_t<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
FEDPEFT_INLINE vec_t<double> multiply_add(vec_t<double> a, vec_t<double> b, vec_t<double> c) {
#if FEDPEFT_VEC_BYTES == 64
  return (vec_t<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif FEDPEFT_VEC_BYTES == 32 && defined(__FMA__)
  return (vec_t<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (vec_t<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}
// With the same factor in all lanes. (x - 0 is x, where x + 0 would lose the sign of a zero.)
FEDPEFT_INLINE vec_t<float> multiply_add(float a, vec_t<float> b, vec_t<float> c) {
  return multiply_add(a - vec_t<float>{}, b, c);
}
FEDPEFT_INLINE vec_t<double> multiply_add(double a, vec_t<double> b, vec_t<double> c) {
  return multiply_add(a - vec_t<double>{}, b, c);
}

// Sum of the lanes, pairwise: the same order whatever the data.
template <typename A>
FEDPEFT_INLINE A lane_sum(vec_t<A> v) {
#if FEDPEFT_VEC_BYTES == 32
  if constexpr (sizeof(A) == 4) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  } else {
    const __m128d s =
        _mm_add_pd(_mm256_castpd256_pd128((__m256d)v), _mm256_extractf128_pd((__m256d)v, 1));
    return _mm_cvtsd_f64(_mm_add_sd(s, _mm_unpackhi_pd(s, s)));
  }
#else
  for (int64_t width = kLanes<A> / 2; width > 0; width /= 2) {
    for (int64_t i = 0; i < width; ++i) v[i] += v[i + width];
  }
  return v[0];
#endif
}

// sum_d a[d] * b[d]; the order depends on D alone.
template <typename TA, typename TB>
FEDPEFT_INLINE acc_t<TA> dot(const TA* a, const TB* b, int64_t D) {
  using A = acc_t<TA>;
  constexpr int64_t N = kLanes<A>;
  vec_t<A> s0 = {}, s1 = {};
  int64_t d = 0;
  for (; d + 2 * N <= D; d += 2 * N) {
    s0 = multiply_add(load(a + d), load(b + d), s0);
    s1 = multiply_add(load(a + d + N), load(b + d + N), s1);
  }
  if (d + N <= D) {
    s0 = multiply_add(load(a + d), load(b + d), s0);
    d += N;
  }
  A total = lane_sum<A>(s0 + s1);
  for (; d < D; ++d) total = multiply_add(to_acc(a[d]), to_acc(b[d]), total);
  return total;
}

// into[d] += scale * row[d]
template <typename A, typename T>
FEDPEFT_INLINE void add_scaled(A* into, A scale, const T* row, int64_t D) {
  constexpr int64_t N = kLanes<A>;
  int64_t d = 0;
  for (; d + N <= D; d += N) store(into + d, multiply_add(scale, load(row + d), load(into + d)));
  for (; d < D; ++d) into[d] = multiply_add(scale, to_acc(row[d]), into[d]);
}

// into[d] += row[d]
template <typename A, typename T>
FEDPEFT_INLINE void add_row(A* into, const T* row, int64_t D) {
  constexpr int64_t N = kLanes<A>;
  int64_t d = 0;
  for (; d + N <= D; d += N) store(into + d, load(into + d) + load(row + d));
  for (; d < D; ++d) into[d] += to_acc(row[d]);
}

// Asks for the first cache lines of a row before it is needed.
template <typename T>
FEDPEFT_INLINE void prefetch_row(const T* row, int64_t D) {
  const char* bytes = reinterpret_cast<const char*>(row);
  const int64_t all = D * int64_t(sizeof(T)), size = all < 512 ? all : 512;
  for (int64_t b = 0; b < size; b += 64) __builtin_prefetch(bytes + b);
  if (size % 64) __builtin_prefetch(bytes + size - 1);
}

// Runs over positions [begin, end): `resolve(n, slots)` finds the rows of position n and prefetches
// them, `combine(n, slots)` uses them some positions later, when they have arrived. The two take
// turns position by position, so that prefetches never come in bursts beyond what the processor
// tracks. `slots` is room for `width` values; `bytes` is what a position prefetches: as many
// positions are under way as keep a quarter of the first-level cache busy.
constexpr int64_t kPipelineSlots = 256, kPipelineBytes = 8192, kPipelineDepth = 16;
template <typename Slot, typename Resolve, typename Combine>
FEDPEFT_INLINE void pipeline(int64_t begin, int64_t end, int64_t width, const Resolve& resolve,
                             const Combine& combine, int64_t bytes = 1024) {
  Slot slots[kPipelineSlots];
  const int64_t fit = kPipelineSlots / (width > 0 ? width : 1) - 1;
  int64_t depth = kPipelineBytes / (bytes > 0 ? bytes : 1);
  depth = depth < 2 ? 2 : depth > kPipelineDepth ? kPipelineDepth : depth;
  depth = depth > fit ? fit : depth;
  Slot *const stop = slots + (depth + 1) * width, *write = slots;
  const Slot* read = slots;
  for (int64_t n = begin; n < end + depth; ++n) {
    if (n < end) {
      resolve(n, write);
      write += width;
      if (write == stop) write = slots;
    }
    if (n >= begin + depth) {
      combine(n - depth, read);
      read += width;
      if (read == stop) read = slots;
    }
  }
}

// Calls use(entry) for each of `count` entries in order (null: 0 .. count - 1), and soon(entry) for
// it `ahead` entries before, to ask for its rows.
template <typename Soon, typename Use>
FEDPEFT_INLINE void for_entries(const int64_t* entries, int64_t count, int64_t ahead,
                                const Soon& soon, const Use& use) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + ahead < count) soon(entries ? entries[i + ahead] : i + ahead);
    use(entries ? entries[i] : i);
  }
}
constexpr int64_t kEntriesAhead = 8;

// Calls f(Fixed<n>{}) with the common widths and counts as constants, for which the compiler keeps
// whole rows in registers and unrolls; else f(Fixed<0>{}).
template <int64_t n>
struct Fixed {
  static constexpr int64_t value = n;
  // The constant, or what it turned out to be at run time.
  static FEDPEFT_INLINE int64_t or_else(int64_t actual) { return n ? n : actual; }
};
template <typename T, typename F>
FEDPEFT_INLINE void with_fixed_width(int64_t D, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (D == 32) return f(Fixed<32>{});
    if (D == 64) return f(Fixed<64>{});
    if (D == 128) return f(Fixed<128>{});
  }
  f(Fixed<0>{});
}
template <typename T, typename F>
FEDPEFT_INLINE void with_fixed_count(int64_t count, const F& f) {
  if constexpr (sizeof(T) == 4) {
    if (count == 1) return f(Fixed<1>{});
    if (count == 2) return f(Fixed<2>{});
    if (count == 3) return f(Fixed<3>{});
    if (count == 4) return f(Fixed<4>{});
  }
  f(Fixed<0>{});
}

// Client of position n as n grows, without a division a position.
struct ClientCursor {
  int64_t positions, client, next;
  FEDPEFT_INLINE ClientCursor(int64_t P, int64_t begin)
      : positions(P), client(P ? begin / P : 0), next((client + 1) * P) {}
  // True when n is the first position of another client.
  FEDPEFT_INLINE bool advance(int64_t n) {
    if (n < next) return false;
    ++client;
    next += positions;
    return true;
  }
};

constexpr int64_t kZeroTest = 64;  // elements between the branches of any_nonzero
FEDPEFT_INLINE int32_t nonzero(float x) { return x != 0; }
FEDPEFT_INLINE int64_t nonzero(double x) { return x != 0; }
FEDPEFT_INLINE int32_t nonzero(Half x) { return x.bits & 0x7fff; }
FEDPEFT_INLINE int32_t nonzero(BFloat16 x) { return x.bits & 0x7fff; }

template <typename T>
FEDPEFT_INLINE bool any_nonzero(const T* x, int64_t n) {
  if (n > 0 && nonzero(x[0])) return true;  // as in most rows that a client touched
  for (int64_t i = 0; i < n; i += kZeroTest) {
    const int64_t end = i + kZeroTest < n ? i + kZeroTest : n;
    auto any = nonzero(x[i]);
    for (int64_t j = i; j < end; ++j) any |= nonzero(x[j]);
    if (any) return true;
  }
  return false;
}

template <typename T>
FEDPEFT_INLINE void zero_row(T* row, int64_t n) {
  if (n > 0) memset(static_cast<void*>(row), 0, sizeof(T) * size_t(n));
}

// The last vector begins among what is copied already.
template <typename T>
FEDPEFT_INLINE void copy_row(T* out, const T* row, int64_t D) {
  constexpr int64_t N = FEDPEFT_VEC_BYTES / int64_t(sizeof(T));
  const auto copy = [&](int64_t d) {
    memcpy(static_cast<void*>(out + d), row + d, FEDPEFT_VEC_BYTES);
  };
  if (D < N) {
    if (D > 0) memcpy(static_cast<void*>(out), row, sizeof(T) * size_t(D));
    return;
  }
  int64_t d = 0;
  for (; d + N <= D; d += N) copy(d);
  if (d < D) copy(D - N);
}

// out[d] = base[d] + sum_l weight(l) * row(l)[d] over `count` rows, in order of l, kept in
// registers for W vectors of columns at a time. `row(l)` returns a pointer, `weight(l)` a factor
// (ignored unless Weighted).
template <int W, bool Weighted, typename T, typename Row, typename Weight>
FEDPEFT_INLINE void sum_columns(T* out, const T* base, int64_t d, int64_t count, const Row& row,
                                const Weight& weight) {
  using A = acc_t<T>;
  constexpr int64_t N = kLanes<A>;
  vec_t<A> sum[W];
  int64_t first = 0;
  if (base || count == 0) {
    for (int w = 0; w < W; ++w) sum[w] = base ? load(base + d + w * N) : vec_t<A>{};
  } else {
    first = 1;
    const auto* r = row(0) + d;
    if constexpr (Weighted) {
      const A f = weight(0);
      for (int w = 0; w < W; ++w) sum[w] = f * load(r + w * N);
    } else {
      for (int w = 0; w < W; ++w) sum[w] = load(r + w * N);
    }
  }
  for (int64_t l = first; l < count; ++l) {
    const auto* r = row(l) + d;
    if constexpr (Weighted) {
      const A f = weight(l);
      for (int w = 0; w < W; ++w) sum[w] = multiply_add(f, load(r + w * N), sum[w]);
    } else {
      for (int w = 0; w < W; ++w) sum[w] += load(r + w * N);
    }
  }
  for (int w = 0; w < W; ++w) store(out + d + w * N, sum[w]);
}

// `base` may be `out` itself.
template <bool Weighted, typename T, typename Row, typename Weight>
FEDPEFT_INLINE void sum_rows(T* out, const T* base, int64_t D, int64_t count, const Row& row,
                             const Weight& weight) {
  using A = acc_t<T>;
  constexpr int64_t N = kLanes<A>;
  int64_t d = 0;
  for (; d + 8 * N <= D; d += 8 * N) sum_columns<8, Weighted>(out, base, d, count, row, weight);
  if (d + 4 * N <= D) {
    sum_columns<4, Weighted>(out, base, d, count, row, weight);
    d += 4 * N;
  }
  if (d + 2 * N <= D) {
    sum_columns<2, Weighted>(out, base, d, count, row, weight);
    d += 2 * N;
  }
  if (d + N <= D) {
    sum_columns<1, Weighted>(out, base, d, count, row, weight);
    d += N;
  }
  if (d == D) return;
  // The last columns in a vector too, which takes no longer than one of them.
  if (D >= N && out != base) {  // one that begins among the columns that are done
    sum_columns<1, Weighted>(out, base, D - N, count, row, weight);
    return;
  }
  vec_t<A> sum = base ? load_part(base + d, D - d) : vec_t<A>{};
  for (int64_t l = 0; l < count; ++l) {
    const vec_t<A> v = load_part(row(l) + d, D - d);
    if constexpr (Weighted) {
      const A f = weight(l);
      sum = multiply_add(f, v, sum);
    } else {
      sum += v;
    }
  }
  store_part(out + d, sum, D - d);
}

}  // namespace fedpeft::FEDPEFT_ISA
