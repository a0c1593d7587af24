// CUDA on the CPU, for tests: the subset of CUDA C++ that the .cu files use, so that g++ compiles
// them and their kernels run without a GPU. A thread is a fiber that runs until it must wait, and
// blocks are spread over OS threads. Reported as errors: barriers that not all threads reach, warp
// operations that a lane has left or that lanes reach at different places, writes outside shared
// memory, misaligned vector accesses, instructions for global memory with a place in shared memory.
// A read of shared memory that nothing wrote, a missing barrier, and a copy that was not waited for
// show as results that differ between the two thread orders (set_backwards), which also fill fresh
// shared memory with different bytes. races.h looks for races that change no result.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "emulator/races.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace fedpeft::emulator {

using Site = std::source_location;

// What went wrong in a kernel.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

void set_backwards(bool backwards);   // run the lanes and warps of a block from last to first
void set_shared_limit(size_t bytes);  // of a block, as a device would have it
size_t shared_limit();
void set_grid_limit(unsigned blocks);  // of a launch: fewer than a device's let kernels loop
unsigned grid_limit();
void set_multiprocessors(unsigned count);  // by which kernels choose how they run
unsigned multiprocessors();
uint64_t launches();  // of kernels, since the start of the process
// For builds that look for races: waits() are the places ("file.cu:12") where kernels have waited
// at a barrier, for a warp's or for copies, and one that is left out is passed as if it were not
// there.
void leave_out(const std::string& place);
std::vector<std::string> waits();

// Runs body once for every thread of every block; throws what the first failing thread threw, or a
// Fault.
void run(dim3 grid, dim3 block, size_t dynamic_shared, const std::function<void()>& body);

// Of the calling thread.
struct Place {
  dim3 thread, block, block_size, grid;
};
const Place& place();
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);  // the same array for all threads of a block
void barrier(Site site);
enum class WarpOp { sync, shuffle, ballot, match };
// Waits for the lanes of `mask`. shuffle: `value` of lane `source`; ballot: lanes with a value
// other than 0; match: lanes with the same value.
uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site);
int lane();
// For instructions that reach global memory alone.
void check_global(const void* p);
// Copies to shared memory in the background, of 4, 8 or 16 bytes. Those since the last commit are a
// batch; waiting for all batches but the `under_way` latest makes them the calling thread's.
void copy_later(void* to, const void* from, size_t bytes);
void commit_copies();
void wait_for_copies(unsigned under_way, Site site);

inline std::string fuller(const char* message) { return message; }
inline std::string fuller(const char*, const std::string& with_values) { return with_values; }

template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp(WarpOp::shuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace fedpeft::emulator

#define threadIdx (::fedpeft::emulator::place().thread)
#define blockIdx (::fedpeft::emulator::place().block)
#define blockDim (::fedpeft::emulator::place().block_size)
#define gridDim (::fedpeft::emulator::place().grid)

inline void __syncthreads(std::source_location site = std::source_location::current()) {
  fedpeft::emulator::barrier(site);
}
inline void __syncwarp(unsigned mask = ~0u,
                       std::source_location site = std::source_location::current()) {
  fedpeft::emulator::warp(fedpeft::emulator::WarpOp::sync, mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              std::source_location site = std::source_location::current()) {
  return unsigned(
      fedpeft::emulator::warp(fedpeft::emulator::WarpOp::ballot, mask, predicate != 0, 0, site));
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value,
                          std::source_location site = std::source_location::current()) {
  return unsigned(
      fedpeft::emulator::warp(fedpeft::emulator::WarpOp::match, mask, uint64_t(value), 0, site));
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              std::source_location site = std::source_location::current()) {
  const int lane = fedpeft::emulator::lane();
  return fedpeft::emulator::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)),
                                    site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  std::source_location site = std::source_location::current()) {
  const int lane = fedpeft::emulator::lane(), source = lane ^ bits;
  return fedpeft::emulator::shuffle(
      mask, value, (source & ~(width - 1)) == (lane & ~(width - 1)) ? source : lane, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32,
                   std::source_location site = std::source_location::current()) {
  const int lane = fedpeft::emulator::lane(), within = lane & (width - 1);
  return fedpeft::emulator::shuffle(mask, value, within + delta < width ? lane + delta : lane,
                                    site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32,
                 std::source_location site = std::source_location::current()) {
  const int lane = fedpeft::emulator::lane(), within = lane & (width - 1);
  return fedpeft::emulator::shuffle(mask, value, within >= delta ? lane - delta : lane, site);
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }

template <typename T>
T atomicAdd(T* p, T value) {
  static_assert(std::is_integral_v<T>, "sums of floats by atomics depend on the order of threads");
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicMin(T* p, T value) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value < seen &&
         !__atomic_compare_exchange_n(p, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <typename T>
T atomicMax(T* p, T value) {
  T seen = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (value > seen &&
         !__atomic_compare_exchange_n(p, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return seen;
}
template <typename T>
T atomicOr(T* p, T value) {
  return __atomic_fetch_or(p, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicCAS(T* p, T compare, T value) {
  __atomic_compare_exchange_n(p, &compare, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return compare;
}
