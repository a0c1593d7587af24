// Copies into shared memory that pass by the registers.
#pragma once

#include "common/device.cuh"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace fedpeft::gpu {

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
#endif
  store_pack<V>(to, load_pack<V>(from));
}
// Makes the calling thread's copies since the last call a batch, and waits for all batches but the
// `UnderWay` latest.
FEDPEFT_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  __pipeline_commit();
#endif
}
template <int UnderWay>
FEDPEFT_DEVICE void wait_for_copies() {
#if defined(__CUDACC__)
  __pipeline_wait_prior(UnderWay);
#endif
}
FEDPEFT_DEVICE void copies_done() {
  commit_copies();
  wait_for_copies<0>();
}

}  // namespace fedpeft::gpu
