// CPU kernels of rq_encode: a small matrix product with the argmax over codes folded into its
// epilogue, so that no [N, K] matrix of distances is ever stored.
#include "rq_encode/rq_encode_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Register tile: kTile rows times two vectors of codes fill the accumulator registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int64_t kTile = 12;
#else
constexpr int64_t kTile = 6;
#endif
static_assert(kEncodeRows % kTile == 0);

template <typename A>
struct LaneIndex;
template <>
struct LaneIndex<float> {
  using scalar = int32_t;
  typedef int32_t type __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
};
template <>
struct LaneIndex<double> {
  using scalar = int64_t;
  typedef int64_t type __attribute__((vector_size(FEDPEFT_VEC_BYTES)));
};
template <typename A>
using index_t = typename LaneIndex<A>::type;

// Codes of a panel.
template <typename A>
constexpr int64_t kPanel = 2 * kLanes<A>;

FEDPEFT_INLINE int64_t panels(int64_t K, int64_t panel) { return (K + panel - 1) / panel; }

// A panel is its codes' -|c|^2 / 2, then coordinate d of each of its codes for d = 0 .. D - 1.
template <typename A>
FEDPEFT_INLINE int64_t panel_size(int64_t D) {
  return kPanel<A> * (D + 1);
}

template <typename A>
FEDPEFT_INLINE bool finite(A x) {
  return x - x == A(0);
}

template <typename T>
int64_t packed_size(const RqEncodeArgs& a) {
  using A = acc_t<T>;
  return a.L * panels(a.K, kPanel<A>) * panel_size<A>(a.D);
}

template <typename T>
void pack(const RqEncodeArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t count = panels(a.K, kPanel<A>);
  for (int64_t l = begin; l < end; ++l) {
    A* out = static_cast<A*>(a.packed) + l * count * panel_size<A>(a.D);
    for (int64_t p = 0; p < count; ++p, out += panel_size<A>(a.D)) {
      A* coordinates = out + kPanel<A>;
      for (int64_t j = 0; j < kPanel<A>; ++j) {
        const int64_t k = p * kPanel<A> + j;
        if (k >= a.K) {
          out[j] = -A(__builtin_inf());  // never the nearest
          for (int64_t d = 0; d < a.D; ++d) coordinates[d * kPanel<A> + j] = 0;
          continue;
        }
        const int64_t first = (l * a.K + k) * a.D;
        const T* code = static_cast<const T*>(a.codebooks) + first;
        A norm = 0;
        for (int64_t d = 0; d < a.D; ++d) {
          const A c = to_acc(code[d]);
          if (!finite(c)) [[unlikely]]
            a.bad_codebook->report(first + d);
          coordinates[d * kPanel<A> + j] = c;
          norm = multiply_add(c, c, norm);
        }
        out[j] = norm * A(-0.5);
      }
    }
  }
}

// Best code of a row so far in each lane; a lane sees its codes in ascending order.
template <typename A>
struct Best {
  vec_t<A> score;
  index_t<A> code;
};

// Scores of kTile rows (D apart) against one panel. Every row runs the same operations in the same
// order wherever it lies in the tile.
template <typename A>
FEDPEFT_INLINE void score_tile(const A* rows, const A* panel, int64_t D, index_t<A> codes,
                               Best<A>* best) {
  constexpr int64_t N = kLanes<A>;
  vec_t<A> s[kTile][2];
  const vec_t<A> start0 = load(panel), start1 = load(panel + N);
#pragma GCC unroll 12
  for (int64_t r = 0; r < kTile; ++r) {
    s[r][0] = start0;
    s[r][1] = start1;
  }
  const A* p = panel + 2 * N;
  for (int64_t d = 0; d < D; ++d, p += 2 * N) {
    const vec_t<A> p0 = load(p), p1 = load(p + N);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTile; ++r) {
      const A x = rows[r * D + d];
      s[r][0] = multiply_add(x, p0, s[r][0]);
      s[r][1] = multiply_add(x, p1, s[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < kTile; ++r) {
    const index_t<A> second = s[r][1] > s[r][0];
    const vec_t<A> score = second ? s[r][1] : s[r][0];
    const index_t<A> better = score > best[r].score;
    best[r].score = better ? score : best[r].score;
    best[r].code = better ? codes + (second & int(N)) : best[r].code;
  }
}

// Lowest code among the lanes with the highest score; without branches, which would be
// mispredicted.
template <typename A>
FEDPEFT_INLINE int64_t best_code(const Best<A>& best) {
  using Code = typename LaneIndex<A>::scalar;
  A score[kLanes<A>];
  Code code[kLanes<A>];
  memcpy(score, &best.score, sizeof(score));
  memcpy(code, &best.code, sizeof(code));
  A top = score[0];
  for (int64_t j = 1; j < kLanes<A>; ++j) top = score[j] > top ? score[j] : top;
  Code lowest = INT32_MAX;
  for (int64_t j = 0; j < kLanes<A>; ++j) {
    const Code k = score[j] == top ? code[j] : Code(INT32_MAX);
    lowest = k < lowest ? k : lowest;
  }
  return lowest;
}

FEDPEFT_INLINE void store_code(const RqEncodeArgs& a, int64_t at, int64_t code) {
  switch (a.code_bytes) {
    case 1:
      static_cast<uint8_t*>(a.codes)[at] = uint8_t(code);
      break;
    case 2:
      static_cast<int16_t*>(a.codes)[at] = int16_t(code);
      break;
    default:
      static_cast<int32_t*>(a.codes)[at] = int32_t(code);
  }
}

template <typename T>
void encode(const RqEncodeArgs& a, int64_t begin, int64_t end, void* scratch) {
  using A = acc_t<T>;
  constexpr int64_t N = kLanes<A>;
  const int64_t D = a.D, panel_count = panels(a.K, kPanel<A>);
  A* residual = static_cast<A*>(scratch);
  Best<A> best[kEncodeRows];
  index_t<A> lane;
  for (int64_t j = 0; j < N; ++j) lane[j] = typename LaneIndex<A>::scalar(j);

  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kEncodeRows;
    const int64_t count = a.N - first < kEncodeRows ? a.N - first : kEncodeRows;
    const int64_t padded = (count + kTile - 1) / kTile * kTile;
    const T* x = static_cast<const T*>(a.x) + first * D;
    int32_t bad = 0;
    for (int64_t i = 0; i < count * D; ++i) {
      residual[i] = to_acc(x[i]);
      bad |= !finite(residual[i]);
    }
    if (bad) [[unlikely]] {
      for (int64_t i = 0; i < count * D; ++i) {
        if (!finite(residual[i])) a.bad_x->report(first * D + i);
      }
    }
    zero_row(residual + count * D, (padded - count) * D);

    for (int64_t l = 0; l < a.L; ++l) {
      for (int64_t r = 0; r < padded; ++r) {
        best[r].score = vec_t<A>{} - A(__builtin_inf());
        best[r].code = lane;
      }
      const A* panel = static_cast<const A*>(a.packed) + l * panel_count * panel_size<A>(D);
      index_t<A> codes = lane;
      for (int64_t p = 0; p < panel_count; ++p) {
        for (int64_t r = 0; r < padded; r += kTile)
          score_tile<A>(residual + r * D, panel, D, codes, best + r);
        panel += panel_size<A>(D);
        codes += int(kPanel<A>);
      }
      for (int64_t r = 0; r < count; ++r) {
        const int64_t code = best_code(best[r]);
        store_code(a, (first + r) * a.L + l, code);
        if (l + 1 < a.L) {
          const T* nearest = static_cast<const T*>(a.codebooks) + (l * a.K + code) * D;
          add_scaled(residual + r * D, A(-1), nearest, D);
        }
      }
    }
  }
}

}  // namespace

const RqEncodeKernels rq_encode_kernels = {
    {packed_size<float>, packed_size<double>, packed_size<Half>, packed_size<BFloat16>},
    {pack<float>, pack<double>, pack<Half>, pack<BFloat16>},
    {encode<float>, encode<double>, encode<Half>, encode<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
