// CUDA kernel of rq_encode. A block keeps the residuals of up to 32 rows in shared memory and walks
// the levels; codes pass through shared memory 32 at a time, 32 columns at a time, so that a lane
// scores one code for the rows of its warp. score(k) = r . c_k - |c_k|^2 / 2; ties go to the lowest
// code.
#include "common/device.cuh"
#include "rq_encode/rq_encode_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPerWarp = 4;               // rows of a warp
constexpr int kRows = kWarps * kPerWarp;  // rows of a block
constexpr int kStride = kWarp + 1;        // of a tile's row, against bank conflicts

template <typename A>
FEDPEFT_DEVICE bool finite(A x) {
  return x - x == A(0);
}

FEDPEFT_DEVICE void store_code(const RqEncodeArgs& a, int64_t at, int64_t code) {
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

// `rows` of a block, at most kRows: fewer where D is large. InMemory: residuals are in `memory`,
// where shared memory does not hold a row.
template <typename T, bool InMemory>
__global__ void __launch_bounds__(kThreads, 2)
    encode(RqEncodeArgs a, int rows, [[maybe_unused]] acc_t<T>* memory) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  A* tile = reinterpret_cast<A*>(shared);  // [32 codes, kStride]
  A* residual = tile + kWarp * kStride;    // [rows, D]
  if constexpr (InMemory) residual = memory + blockIdx.x * (rows * a.D);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const int64_t D = a.D, K = a.K, blocks = (a.N + rows - 1) / rows;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first = block * rows;
    const int count = int(a.N - first < rows ? a.N - first : rows);
    for (int64_t i = threadIdx.x; i < rows * D; i += kThreads) {
      const A x = i < count * D ? to_acc(static_cast<const T*>(a.x)[first * D + i]) : A(0);
      if (!finite(x)) FEDPEFT_BAD_VALUE("x: expected finite values, got NaN or infinity");
      residual[i] = x;
    }
    __syncthreads();
    for (int64_t l = 0; l < a.L; ++l) {
      const T* codebook = static_cast<const T*>(a.codebooks) + l * K * D;
      A best[kPerWarp];
      int64_t code[kPerWarp];
#pragma unroll
      for (int r = 0; r < kPerWarp; ++r) {
        best[r] = -A(INFINITY);
        code[r] = INT64_MAX;
      }
      for (int64_t k0 = 0; k0 < K; k0 += kWarp) {
        A dot[kPerWarp], norm = 0;
#pragma unroll
        for (int r = 0; r < kPerWarp; ++r) dot[r] = 0;
        for (int64_t d0 = 0; d0 < D; d0 += kWarp) {
          const int width = int(D - d0 < kWarp ? D - d0 : kWarp);
          for (int j = warp; j < kWarp; j += kWarps) {
            const A c =
                k0 + j < K && lane < width ? to_acc(codebook[(k0 + j) * D + d0 + lane]) : A(0);
            if (!finite(c))
              FEDPEFT_BAD_VALUE("codebooks: expected finite values, got NaN or infinity");
            tile[j * kStride + lane] = c;
          }
          __syncthreads();
#pragma unroll 4
          for (int d = 0; d < width; ++d) {
            const A c = tile[lane * kStride + d];
            norm += c * c;
#pragma unroll
            for (int r = 0; r < kPerWarp; ++r) {
              const int row = warp + r * kWarps;
              if (row < rows) dot[r] += c * residual[row * D + d0 + d];
            }
          }
          __syncthreads();
        }
        if (k0 + lane < K) {
#pragma unroll
          for (int r = 0; r < kPerWarp; ++r) {
            const A score = dot[r] - norm * A(0.5);
            if (score > best[r]) {
              best[r] = score;
              code[r] = k0 + lane;
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kPerWarp; ++r) {
        for (int bits = kWarp / 2; bits > 0; bits /= 2) {
          const A score = __shfl_xor_sync(kFullMask, best[r], bits);
          const int64_t other = __shfl_xor_sync(kFullMask, code[r], bits);
          if (score > best[r] || (score == best[r] && other < code[r])) {
            best[r] = score;
            code[r] = other;
          }
        }
        const int row = warp + r * kWarps;
        if (row >= count) continue;
        // Scores that overflow leave no best code.
        const int64_t nearest = code[r] < K ? code[r] : 0;
        if (lane == 0) store_code(a, (first + row) * a.L + l, nearest);
        for (int64_t d = lane; d < D; d += kWarp)
          residual[row * D + d] -= to_acc(codebook[nearest * D + d]);
      }
      __syncthreads();
    }
    __syncthreads();
  }
}

struct EncodePlan {
  bool in_memory;
  int rows;
  int64_t grid, shared, memory;  // bytes
};

template <typename T>
EncodePlan plan_encode(const RqEncodeArgs& a) {
  constexpr int64_t kStagedBytes = 48 * 1024;  // so that several blocks share a multiprocessor
  const Limits device = limits();
  const int64_t size = int64_t(sizeof(acc_t<T>)), tile = kWarp * kStride * size;
  const auto blocks = [&](int rows) { return (a.N + rows - 1) / rows; };
  int rows = kRows;
  while (rows > 1 && tile + rows * a.D * size > kStagedBytes) rows /= 2;
  const int64_t shared = tile + rows * a.D * size;
  if (shared <= device.shared_bytes) return {false, rows, blocks(rows), shared, 0};
  // A row a warp.
  const int64_t most = 2 * device.multiprocessors, needed = blocks(kWarps);
  const int64_t grid = needed < most ? needed : most;
  return {true, kWarps, grid, tile, grid * kWarps * a.D * size};
}

}  // namespace

int64_t rq_encode_scratch(const RqEncodeArgs& a, DType dtype) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto zero) { bytes = plan_encode<decltype(zero)>(a).memory; });
  return bytes;
}

void rq_encode(const RqEncodeArgs& a, DType dtype, void* scratch, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const EncodePlan plan = plan_encode<T>(a);
    launch(plan.in_memory ? encode<T, true> : encode<T, false>, plan.grid, kThreads, plan.shared,
           stream, a, plan.rows, static_cast<acc_t<T>*>(scratch));
  });
}

}  // namespace fedpeft::gpu
