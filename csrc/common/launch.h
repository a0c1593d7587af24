// Kernel launches, for .cu files alone: by nvcc on a GPU, by g++ in the emulator (csrc/emulator).
// Device code that differs between the two is here.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#else
#include <bit>
#include <cstring>

#include "emulator/emulator.h"
#endif

#include "common/gpu.h"
#include "common/types.h"

#if defined(__CUDACC__)
#define FEDPEFT_SHARED(Type, name, count) __shared__ Type name[count]
// 32-byte aligned shared memory of the size given at the launch.
#define FEDPEFT_DYNAMIC_SHARED(name) extern __shared__ __align__(32) unsigned char name[]
#else
#define FEDPEFT_SHARED(Type, name, count) \
  static const char name##_key = 0;       \
  Type* const name = static_cast<Type*>(  \
      ::fedpeft::emulator::static_shared(&name##_key, sizeof(Type) * size_t(count)))
#define FEDPEFT_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(::fedpeft::emulator::dynamic_shared())
#endif

namespace fedpeft::gpu {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The largest grid.x; kernels loop where there is more work.
inline int64_t max_grid() {
#if defined(FEDPEFT_EMULATOR)
  return emulator::grid_limit();
#else
  return 0x7fffffff;
#endif
}

// Blocks for one of two kinds of work that share a launch.
inline int64_t grid_half(int64_t work) { return work < max_grid() / 2 ? work : max_grid() / 2; }
inline unsigned grid_for(int64_t work) { return unsigned(work < max_grid() ? work : max_grid()); }

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // which the next launch would report again
  throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

struct Limits {
  int64_t shared_bytes;  // of a block, after opting in
  int64_t multiprocessors;
};

inline Limits limits() {
  int device = 0, shared = 0, multiprocessors = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared memory limit");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "multiprocessors");
  return {shared, multiprocessors};
}

// Lets a kernel be launched with so much dynamic shared memory; without asking it has 48 KiB less
// its own arrays, which take a few KiB. What was allowed stays so: another thread or a graph may be
// about to launch with it.
inline void allow_shared(const void* kernel, int64_t bytes) {
  if (bytes <= 32 * 1024) return;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  cudaFuncAttributes now;
  check(cudaFuncGetAttributes(&now, kernel), "cudaFuncGetAttributes");
  if (now.maxDynamicSharedSizeBytes >= bytes) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, unsigned block, int64_t shared, Stream stream,
            Args&&... args) {
  if (grid <= 0) return;
  allow_shared(reinterpret_cast<const void*>(kernel), shared);
  kernel<<<grid_for(grid), block, size_t(shared), static_cast<cudaStream_t>(stream.handle)>>>(
      static_cast<Params>(args)...);
  check(cudaGetLastError(), "launch");
}

// Waits for what is under way on the stream.
inline void copy_to_host(void* to, const void* from, int64_t bytes, Stream stream) {
  const auto on = static_cast<cudaStream_t>(stream.handle);
  check(cudaMemcpyAsync(to, from, size_t(bytes), cudaMemcpyDeviceToHost, on), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(on), "cudaStreamSynchronize");
}

#else

struct Limits {
  int64_t shared_bytes;
  int64_t multiprocessors;
};

inline void copy_to_host(void* to, const void* from, int64_t bytes, Stream) {
  std::memcpy(to, from, size_t(bytes));
}

inline Limits limits() {
  return {int64_t(emulator::shared_limit()), int64_t(emulator::multiprocessors())};
}

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t grid, unsigned block, int64_t shared, Stream,
            Args&&... args) {
  if (grid <= 0) return;
  const std::tuple<Params...> values(static_cast<Params>(args)...);
  emulator::run({grid_for(grid)}, {block}, size_t(shared), [&] { std::apply(kernel, values); });
}

#endif

// Of `total` positions, how many a block takes that first copies what they share: `least`, to pay
// for the copy, or more, as long as there are sixteen blocks a multiprocessor.
inline int64_t span_for(int64_t total, int64_t least) {
  const int64_t blocks = 16 * limits().multiprocessors;
  const int64_t even = (total + blocks - 1) / blocks;
  return even > least ? even : least;
}

// Index `index` at `position` of argument `name` is outside [0, size): a device-side assertion, as
// in torch's embedding.
#if defined(__CUDACC__)
// Defined once here, since <cassert> is empty under NDEBUG.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line,
                                        const char* function, size_t char_size)
    __attribute__((noreturn));
#define FEDPEFT_BAD_VALUE(message, ...) \
  __assertfail(message, __FILE__, __LINE__, __func__, sizeof(char))
#define FEDPEFT_BAD_INDEX(name, index, position, size) \
  __assertfail(name ": index out of range", __FILE__, __LINE__, __func__, sizeof(char))
#else
// What follows the message is a text with the values, which a device cannot put together.
#define FEDPEFT_BAD_VALUE(message, ...) \
  throw std::invalid_argument(emulator::fuller(message __VA_OPT__(, ) __VA_ARGS__))
#define FEDPEFT_BAD_INDEX(name, index, position, size)                                       \
  throw std::out_of_range(                                                                   \
      name ": index " + std::to_string(index) + " at position " + std::to_string(position) + \
      " is out of range: expected -1 (padding) or 0 to " + std::to_string((size) - 1))
#endif

}  // namespace fedpeft::gpu
