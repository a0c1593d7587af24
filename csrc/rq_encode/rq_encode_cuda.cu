// CUDA kernel of rq_encode. A block takes 64 rows through all levels; codes pass through shared
// memory 64 at a time, and a thread scores four codes for eight rows. score(k) = r . c_k -
// |c_k|^2 / 2; ties go to the lowest code.
#include "common/tile.cuh"
#include "rq_encode/rq_encode_cuda.h"

namespace fedpeft::gpu {
namespace {

template <typename A>
FEDPEFT_DEVICE bool finite(A x) {
  return x - x == A(0);
}

FEDPEFT_DEVICE void store_code(const RqEncodeArgs& a, int64_t at, int32_t code) {
  switch (a.code_bytes) {
    case 1:
      static_cast<uint8_t*>(a.codes)[at] = uint8_t(code);
      break;
    case 2:
      static_cast<int16_t*>(a.codes)[at] = int16_t(code);
      break;
    default:
      static_cast<int32_t*>(a.codes)[at] = code;
  }
}
FEDPEFT_DEVICE int32_t load_code(const RqEncodeArgs& a, int64_t at) {
  switch (a.code_bytes) {
    case 1:
      return static_cast<const uint8_t*>(a.codes)[at];
    case 2:
      return static_cast<const int16_t*>(a.codes)[at];
    default:
      return static_cast<const int32_t*>(a.codes)[at];
  }
}

// Residuals [kTile, depth] of level l from column d0: x less the codes of the levels before, in
// their order.
template <typename T, int V>
FEDPEFT_DEVICE void fill_residuals(const RqEncodeArgs& a, acc_t<T>* to, int64_t first, int64_t l,
                                   int64_t d0) {
  using A = acc_t<T>;
  const int64_t D = a.D;
  fill<kTile, kDepth<A>, V, 2>(
      to, kDepthStride<A>, at_most(a.N - first, kTile), at_most(D - d0, kDepth<A>),
      [&](int row, int d) {
        Sum<A, V> x = values_at<V>(static_cast<const T*>(a.x) + (first + row) * D + d0 + d);
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (!finite(x.at[v])) FEDPEFT_BAD_VALUE("x: expected finite values, got NaN or infinity");
        }
        for (int64_t m = 0; m < l; ++m) {
          const int64_t code = m * a.K + load_code(a, (first + row) * a.L + m);
          const Sum<A, V> nearest =
              values_at<V>(static_cast<const T*>(a.codebooks) + code * D + d0 + d);
#pragma unroll
          for (int v = 0; v < V; ++v) x.at[v] -= nearest.at[v];
        }
        return x;
      });
}

// Residuals from column d0 less the codes that were chosen.
template <typename T, int V>
FEDPEFT_DEVICE void subtract(const RqEncodeArgs& a, acc_t<T>* from, const T* codebook,
                             const int32_t* chosen, int rows, int64_t d0) {
  using A = acc_t<T>;
  constexpr int kPacks = kDepth<A> / V;
  copy_tile<kTileThreads, kTile * kPacks / kTileThreads, 4, A, V>(
      rows, at_most(a.D - d0, kDepth<A>), place_in_rows<kPacks, V>,
      [&](int row, int d) { return values_at<V>(codebook + chosen[row] * a.D + d0 + d); },
      [&](int row, int d, const Sum<A, V>& nearest) {
        A* at = from + row * kDepthStride<A> + d;
#pragma unroll
        for (int v = 0; v < V; ++v) at[v] -= nearest.at[v];
      },
      int(threadIdx.x));
}

// Whole residuals are in shared memory where `resident`; else they pass through it with the codes.
template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t<T>>)
    encode(RqEncodeArgs a, bool resident) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(A, norms, kTile);
  FEDPEFT_SHARED(int32_t, chosen, kTile);
  A* codes = reinterpret_cast<A*>(shared);  // [depth, kTile]
  A* residuals = codes + kOperand<A>;       // [kTile, depth] for each depth of D
  const int thread = int(threadIdx.x);
  const int64_t D = a.D, K = a.K, blocks = (a.N + kTile - 1) / kTile;
  if (thread < kTile) norms[thread] = 0;  // they stay so without columns
  __syncthreads();
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block * kTile;
    if (resident) {
      for (int64_t d0 = 0; d0 < D; d0 += kDepth<A>)
        fill_residuals<T, V>(a, residuals + d0 / kDepth<A> * kOperand<A>, first, 0, d0);
    }
    for (int64_t l = 0; l < a.L; ++l) {
      const T* codebook = static_cast<const T*>(a.codebooks) + l * K * D;
      A best[kTileRows];
      int32_t code[kTileRows];
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        best[r] = -A(INFINITY);
        code[r] = INT32_MAX;
      }
      for (int64_t k0 = 0; k0 < K; k0 += kTile) {
        const int count = at_most(K - k0, kTile);
        TileSums<A> dots;
        dots.clear();
        A norm = 0;
        for (int64_t d0 = 0; d0 < D; d0 += kDepth<A>) {
          const int depth = at_most(D - d0, kDepth<A>);
          fill_transposed<kTile, kDepth<A>, V>(codes, kTileStride, count, depth, [&](int k, int d) {
            const Sum<A, V> c = values_at<V>(codebook + (k0 + k) * D + d0 + d);
#pragma unroll
            for (int v = 0; v < V; ++v) {
              if (!finite(c.at[v]))
                FEDPEFT_BAD_VALUE("codebooks: expected finite values, got NaN or infinity");
            }
            return c;
          });
          if (!resident) fill_residuals<T, V>(a, residuals, first, l, d0);
          __syncthreads();
          if (thread < kTile) {
#pragma unroll 8
            for (int d = 0; d < depth; ++d) {
              const A c = codes[d * kTileStride + thread];
              norm += c * c;
            }
            if (d0 + depth == D) norms[thread] = norm;
          }
          multiply(dots, residuals + (resident ? d0 / kDepth<A> * kOperand<A> : 0), codes, depth);
          __syncthreads();
        }
#pragma unroll
        for (int v = 0; v < kTileColumns; ++v) {
          const int k = tile_across() * kTileColumns + v;
          if (k >= count) break;
          const A half = norms[k] * A(0.5);
#pragma unroll
          for (int r = 0; r < kTileRows; ++r) {
            const A score = dots.row[r].at[v] - half;
            if (score > best[r]) {
              best[r] = score;
              code[r] = int32_t(k0) + k;
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        for (int bits = kAcross / 2; bits > 0; bits /= 2) {
          const A score = __shfl_xor_sync(kFullMask, best[r], bits);
          const int32_t other = __shfl_xor_sync(kFullMask, code[r], bits);
          if (score > best[r] || (score == best[r] && other < code[r])) {
            best[r] = score;
            code[r] = other;
          }
        }
        if (tile_across() == 0) {
          // Scores that overflow leave no best code.
          const int32_t nearest = code[r] < K ? code[r] : 0;
          const int row = tile_down() + r * kDown;
          chosen[row] = nearest;
          if (first + row < a.N) store_code(a, (first + row) * a.L + l, nearest);
        }
      }
      __syncthreads();
      if (resident && l + 1 < a.L) {
        for (int64_t d0 = 0; d0 < D; d0 += kDepth<A>)
          subtract<T, V>(a, residuals + d0 / kDepth<A> * kOperand<A>, codebook, chosen,
                         at_most(a.N - first, kTile), d0);
      }
    }
  }
}

}  // namespace

void rq_encode(const RqEncodeArgs& a, DType dtype, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t operand = kOperand<A> * int64_t(sizeof(A)),
                  whole = (a.D + kDepth<A> - 1) / kDepth<A>;
    // Two blocks share a multiprocessor.
    const int64_t most = limits().shared_bytes / 2;
    const bool resident = whole <= 1 || (1 + whole) * operand <= most;
    with_width<T>(
        a.D,
        [&](auto width) {
          launch(encode<T, decltype(width)::value>, (a.N + kTile - 1) / kTile, kTileThreads,
                 (1 + (resident ? whole : 1)) * operand, stream, a, resident);
        },
        a.x, a.codebooks);
  });
}

}  // namespace fedpeft::gpu
