// Copies that pass by: into shared memory without registers, and out without staying in the caches.
#pragma once

#include "common/device.cuh"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#endif

namespace fedpeft::gpu {

// V elements to shared memory, in the background where they are 16 bytes; copies_done waits for the
// calling thread's.
template <int V, typename T>
FEDPEFT_DEVICE void copy_to_shared(T* to, const T* from) {
#if defined(__CUDACC__)
  if constexpr (sizeof(Pack<T, V>) == 16) {
    __pipeline_memcpy_async(to, from, 16);
    return;
  }
#endif
  store_pack<V>(to, load_pack<V>(from));
}
FEDPEFT_DEVICE void copies_done() {
#if defined(__CUDACC__)
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// Stores a sum that nothing reads soon.
template <typename T, typename A, int V>
FEDPEFT_DEVICE void store_streaming(T* p, const Sum<A, V>& sum) {
#if defined(__CUDACC__)
  if constexpr (sizeof(Pack<T, V>) == 16) {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(sum.at[v]);
    __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&pack));
    return;
  }
#endif
  sum.store(p);
}

}  // namespace fedpeft::gpu
