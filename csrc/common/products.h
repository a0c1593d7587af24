// Register-blocked products of small matrices, also of a factor whose zeros are skipped. Included
// by *_cpu.cpp files only.
//
// Every element of a product is one chain of multiply-adds in the order of the summed index, kept
// in a register or stored and taken up again: its bits depend neither on the tile that it falls
// into nor on how many rows there are.
#pragma once

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {

// Tile of a product: kRows rows of kPanelVectors registers. 16 registers hold 6 x 2 sums, two
// vectors of the right factor and an element of the left one; 32 registers hold 6 x 4.
constexpr int kRows = 6;
constexpr int kPanelVectors = FEDPEFT_VEC_BYTES == 64 ? 4 : 2;
template <typename A>
constexpr int64_t kPanel = kPanelVectors * kLanes<A>;
template <typename A>
FEDPEFT_INLINE int64_t whole_panels(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A>;
}

// The first n elements, at most a register of them; the other lanes are zero, or left alone. With
// AVX-512 by masks: branches of so many lanes in so many registers take compilers long.
#if FEDPEFT_VEC_BYTES == 64
template <typename A>
FEDPEFT_INLINE uint32_t first_lanes(int64_t n) {
  return (1u << (n < 0 ? 0 : n < kLanes<A> ? n : kLanes<A>)) - 1;
}
#endif
template <typename A>
FEDPEFT_INLINE vec_t<A> load_up_to(const A* p, int64_t n) {
#if FEDPEFT_VEC_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    return (vec_t<A>)_mm512_maskz_loadu_ps(__mmask16(first_lanes<A>(n)), p);
  } else {
    return (vec_t<A>)_mm512_maskz_loadu_pd(__mmask8(first_lanes<A>(n)), p);
  }
#else
  if (n >= kLanes<A>) return load(p);
  vec_t<A> v = {};
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    if (i < n) v[i] = p[i];
  }
  return v;
#endif
}
template <typename A>
FEDPEFT_INLINE void store_up_to(A* p, vec_t<A> v, int64_t n) {
#if FEDPEFT_VEC_BYTES == 64
  if constexpr (sizeof(A) == 4) {
    _mm512_mask_storeu_ps(p, __mmask16(first_lanes<A>(n)), (__m512)v);
  } else {
    _mm512_mask_storeu_pd(p, __mmask8(first_lanes<A>(n)), (__m512d)v);
  }
#else
  if (n >= kLanes<A>) return store(p, v);
  for (int64_t i = 0; i < kLanes<A>; ++i) {
    if (i < n) p[i] = v[i];
  }
#endif
}

// [depth, columns] into panels [columns / kPanel][depth][kPanel], zeros behind the last column.
// Along what is contiguous, which may have to come from memory.
template <typename A, typename T>
FEDPEFT_INLINE void pack_panels(A* out, const T* from, int64_t depth, int64_t columns,
                                int64_t depth_stride, int64_t column_stride) {
  const int64_t whole = columns / kPanel<A> * kPanel<A>, panel = depth * kPanel<A>;
  if (column_stride == 1) {
    for (int64_t k = 0; k < depth; ++k) {
      const T* const row = from + k * depth_stride;
      A* to = out + k * kPanel<A>;
      for (int64_t first = 0; first < whole; first += kPanel<A>, to += panel) {
        for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) store(to + j, load(row + first + j));
      }
      if (whole == columns) continue;
      for (int64_t j = 0; j < kPanel<A>; ++j)
        to[j] = j < columns - whole ? to_acc(row[whole + j]) : A(0);
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    const T* const in = from + column * column_stride;
    A* const to = out + column / kPanel<A> * panel + column % kPanel<A>;
    for (int64_t k = 0; k < depth; ++k) to[k * kPanel<A>] = to_acc(in[k * depth_stride]);
  }
  A* const last = out + whole * depth;
  for (int64_t j = columns - whole; whole < columns && j < kPanel<A>; ++j) {
    for (int64_t k = 0; k < depth; ++k) last[k * kPanel<A> + j] = A(0);
  }
}

// out[r, :columns] = start[r, :] + sum_k left(r, k) panel[k, :], for R rows of one panel.
template <int R, typename A, typename T>
FEDPEFT_INLINE void tile(A* out, int64_t out_stride, const A* start, int64_t start_stride,
                         const T* left, int64_t row_stride, int64_t depth_stride, const A* panel,
                         int64_t depth, int64_t columns) {
  constexpr int V = kPanelVectors;
  constexpr int64_t N = kLanes<A>;
  vec_t<A> sum[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v)
      sum[r][v] =
          start ? load_up_to(start + r * start_stride + v * N, columns - v * N) : vec_t<A>{};
  }
  for (int64_t k = 0; k < depth; ++k, panel += kPanel<A>) {
    vec_t<A> right[V];
    for (int v = 0; v < V; ++v) right[v] = load(panel + v * N);
    for (int r = 0; r < R; ++r) {
      const A factor = to_acc(left[r * row_stride + k * depth_stride]);
      for (int v = 0; v < V; ++v) sum[r][v] = multiply_add(factor, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v)
      store_up_to(out + r * out_stride + v * N, sum[r][v], columns - v * N);
  }
}

// out [rows, columns] = start + left [rows, depth] times the packed [depth, columns].
template <typename A, typename T>
FEDPEFT_INLINE void product(A* out, int64_t out_stride, const A* start, int64_t start_stride,
                            const T* left, int64_t row_stride, int64_t depth_stride,
                            const A* packed, int64_t rows, int64_t depth, int64_t columns) {
  for (int64_t first = 0; first < columns; first += kPanel<A>, packed += depth * kPanel<A>) {
    int64_t r = 0;
    const auto run = [&]<int R>() __attribute__((always_inline)) {
      tile<R>(out + r * out_stride + first, out_stride,
              start ? start + r * start_stride + first : start, start_stride, left + r * row_stride,
              row_stride, depth_stride, packed, depth, columns - first);
      r += R;
    };
    while (r + kRows <= rows) run.template operator()<kRows>();
    if (r + 4 <= rows) run.template operator()<4>();
    while (r < rows) run.template operator()<1>();
  }
}

// The places in a group of 8 whose bits are set, in order.
struct SetBits {
  uint8_t places[256][8];
  constexpr SetBits() : places{} {
    for (int bits = 0; bits < 256; ++bits) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if (bits >> bit & 1) places[bits][count++] = uint8_t(bit);
      }
    }
  }
};
[[maybe_unused]] constexpr SetBits kSetBits;

#if defined(__AVX2__)
// Adds the places of 8 lanes whose bits are set, the first of which is `first`, to `count` others.
FEDPEFT_INLINE int64_t add_places(int bits, int64_t first, int32_t* places, int64_t count) {
  const __m256i at = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kSetBits.places[bits])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(places + count),
                      _mm256_add_epi32(at, _mm256_set1_epi32(int(first))));
  return count + __builtin_popcount(unsigned(bits));
}
#endif

// Places of the elements of x [n] that are not zero, in order; there is room for 8 more.
template <typename T>
FEDPEFT_INLINE int64_t nonzero_places(const T* x, int64_t n, int32_t* places) {
  int64_t count = 0, i = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    for (; i + 8 <= n; i += 8) {
      const __m256 differs =
          _mm256_cmp_ps(_mm256_loadu_ps(x + i), _mm256_setzero_ps(), _CMP_NEQ_UQ);
      count = add_places(_mm256_movemask_ps(differs), i, places, count);
    }
  }
#endif
  for (; i < n; ++i) {
    places[count] = int32_t(i);
    count += to_acc(x[i]) != 0;
  }
  return count;
}

// [rows, columns] with zeros behind to whole panels, `padded` a row. Along what is contiguous.
template <typename A, typename T>
FEDPEFT_INLINE void pad_rows(A* out, const T* from, int64_t rows, int64_t columns,
                             int64_t row_stride, int64_t column_stride, int64_t padded) {
  const int64_t behind = (columns + kPanel<A> - 1) / kPanel<A> * kPanel<A> - columns;
  if (column_stride == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) out[r * padded + c] = to_acc(from[r * row_stride + c]);
    }
  } else {
    for (int64_t c = 0; c < columns; ++c) {
      const T* const column = from + c * column_stride;
      for (int64_t r = 0; r < rows; ++r) out[r * padded + c] = to_acc(column[r * row_stride]);
    }
  }
  for (int64_t r = 0; r < rows && behind > 0; ++r) zero_row(out + r * padded + columns, behind);
}

// Places to go through, from a list, or from the bits of a word.
template <typename Place>
struct ListedPlaces {
  const Place *at, *end;

  ListedPlaces(const Place* places, int64_t count) : at(places), end(places + count) {}
  FEDPEFT_INLINE bool more() const { return at != end; }
  FEDPEFT_INLINE int64_t take() { return *at++; }
};
struct MaskedPlaces {
  uint64_t mask;

  FEDPEFT_INLINE bool more() const { return mask != 0; }
  FEDPEFT_INLINE int64_t take() {
    const int64_t place = __builtin_ctzll(mask);
    mask &= mask - 1;
    return place;
  }
};

// The right factor [depth, columns] of a product, whose rows can be read to the end of a panel.
template <typename A>
struct Right {
  const A* from;
  int64_t stride;
};

// A row of a product, whose left factor is not zero at `places`: columns of G panels from `first`
// on.
template <int G, typename A, typename T, typename Places>
FEDPEFT_INLINE void sparse_row(A* out, const A* start, const T* left, int64_t depth_stride,
                               Places places, const Right<A>& right, int64_t first,
                               int64_t columns) {
  constexpr int V = G * kPanelVectors;
  constexpr int64_t N = kLanes<A>;
  const A* const from = right.from + first;
  const int64_t stride = right.stride, left_of = columns - first;
  out += first;
  vec_t<A> sum[V];
  if (!start) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = vec_t<A>{};
  } else if (left_of >= V * N) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = load(start + first + v * N);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = load_up_to(start + first + v * N, left_of - v * N);
  }
  while (places.more()) {
    const int64_t k = places.take();
    const A factor = to_acc(left[k * depth_stride]);
    const A* const row = from + k * stride;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) sum[v] = multiply_add(factor, load(row + v * N), sum[v]);
  }
  if (left_of >= V * N) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store(out + v * N, sum[v]);
  } else {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) store_up_to(out + v * N, sum[v], left_of - v * N);
  }
}

// Calls stretch(Fixed<G>, first) for columns in stretches of G panels, as many as registers hold.
template <typename A, typename Stretch>
FEDPEFT_INLINE void for_stretches(int64_t columns, const Stretch& stretch) {
  int64_t first = 0;
  for (; first + 3 * kPanel<A> < columns; first += 4 * kPanel<A>) stretch(Fixed<4>{}, first);
  for (; first + kPanel<A> < columns; first += 2 * kPanel<A>) stretch(Fixed<2>{}, first);
  for (; first < columns; first += kPanel<A>) stretch(Fixed<1>{}, first);
}

}  // namespace fedpeft::FEDPEFT_ISA
