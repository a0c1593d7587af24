// Copies into shared memory that pass by the registers.
#pragma once

#include "common/device.cuh"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace fedpeft::gpu {

// Copies of V elements that a loop has to keep under way itself, by so many turns at once: those
// that are not made in the background.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <typename T, int V>
constexpr int kCopyTurns = 4;
#else
template <typename T, int V>
constexpr int kCopyTurns = sizeof(T) * V < 4 ? 4 : 1;
#endif

// V elements to shared memory, in the background where they are 4, 8 or 16 bytes; copies_done waits
// for the calling thread's.
template <int V, typename T>
FEDPEFT_DEVICE void copy_to_shared(T* to, const T* from) {
#if defined(__CUDACC__)
  constexpr size_t kBytes = sizeof(Pack<T, V>);
  if constexpr (kBytes == 4 || kBytes == 8 || kBytes == 16) {
    __pipeline_memcpy_async(to, from, kBytes);
    return;
  }
#else
  check_aligned<T, V>(from);
  check_aligned<T, V>(to);
  constexpr size_t kBytes = sizeof(Pack<T, V>);
  if constexpr (kBytes == 4 || kBytes == 8 || kBytes == 16)
    return emulator::copy_later(to, from, kBytes);
#endif
  store_pack<V>(to, load_pack<V>(from));
}
// copy_to_shared of `columns` of each of `rows` rows, so many elements apart: group `group` of
// `groups` takes a row, the calling lane its columns from `first` on, one vector in so many
// `lanes`.
template <int V, typename T>
FEDPEFT_DEVICE void copy_rows(T* to, int to_stride, const T* from, int64_t from_stride, int rows,
                              int columns, int first, int lanes, int group, int groups) {
  constexpr int N = kCopyTurns<T, V>;
  for (int column = first; column < columns; column += lanes * V) {
    T* at = to + group * to_stride + column;
    const T* row = from + group * from_stride + column;
#pragma unroll 1
    for (int r = group; r < rows; r += N * groups) {
      if constexpr (N == 1) {
        copy_to_shared<V>(at, row);
      } else {
        Pack<T, V> pack[N];
#pragma unroll
        for (int u = 0; u < N; ++u)
          pack[u] = load_pack<V>(row + (r + u * groups < rows ? u * groups : 0) * from_stride);
#pragma unroll
        for (int u = 0; u < N; ++u)
          if (r + u * groups < rows) store_pack<V>(at + u * groups * to_stride, pack[u]);
      }
      at += N * groups * to_stride;
      row += N * groups * from_stride;
    }
  }
}
// As copy_to_shared of V floats where `there`, else zeros; `from` is not read then. Without a
// branch.
template <int V>
FEDPEFT_DEVICE void copy_or_clear(float* to, const float* from, bool there) {
  constexpr int kBytes = sizeof(Pack<float, V>);
  static_assert(kBytes == 4 || kBytes == 16);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const auto shared = uint32_t(__cvta_generic_to_shared(to));
  const size_t global = __cvta_generic_to_global(from);
  const int read = there ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
                 "r"(read)
                 : "memory");
  }
#elif defined(__CUDACC__)
  store_pack<V>(to, there ? load_pack<V>(from) : zero_pack<V, float>());
#else
  static constexpr Pack<float, V> zeros{};
  if (there) check_aligned<float, V>(from);
  check_aligned<float, V>(to);
  emulator::copy_later(to, there ? from : zeros.at, kBytes);
#endif
}
// Makes the calling thread's copies since the last call a batch, and waits for all batches but the
// `UnderWay` latest.
FEDPEFT_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  __pipeline_commit();
#else
  emulator::commit_copies();
#endif
}
template <int UnderWay>
#if defined(__CUDACC__)
FEDPEFT_DEVICE void wait_for_copies() {
  __pipeline_wait_prior(UnderWay);
}
FEDPEFT_DEVICE void copies_done() {
  commit_copies();
  wait_for_copies<0>();
}
#else
void wait_for_copies(std::source_location site = std::source_location::current()) {
  emulator::wait_for_copies(UnderWay, site);
}
inline void copies_done(std::source_location site = std::source_location::current()) {
  commit_copies();
  wait_for_copies<0>(site);
}
#endif

}  // namespace fedpeft::gpu
