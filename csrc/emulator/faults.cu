// Planted faults. Each kernel takes a flag: with it, it makes the mistake that its name says.
#include "common/device.cuh"
#include "common/streaming.cuh"
#include "emulator/faults.h"

namespace fedpeft::emulator {
namespace {

constexpr int kThreads = 64;

// Every thread reads what its neighbour on either side wrote.
__global__ void missing_barrier(int64_t* out, bool planted) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = int(threadIdx.x);
  values[t] = 0;
  __syncthreads();
  values[t] = t + 1;
  if (!planted) __syncthreads();
  out[t] = values[(t + 1) % kThreads] + 100 * values[(t + kThreads - 1) % kThreads];
}

__global__ void write_past_shared(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int, values, kThreads);
  const int t = int(threadIdx.x);
  values[t + (planted ? 1 : 0)] = t;
  __syncthreads();
  out[t] = t;
}

__global__ void write_past_dynamic_shared(int64_t* out, bool planted) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int t = int(threadIdx.x);
  reinterpret_cast<int*>(shared)[t + (planted ? 1 : 0)] = t;
  out[t] = t;
}

__global__ void divergent_barrier(int64_t* out, bool planted) {
  const int t = int(threadIdx.x);
  if (!planted || t < 32) __syncthreads();
  out[t] = t;
}

__global__ void two_barriers(int64_t* out, bool planted) {
  const int t = int(threadIdx.x);
  if (planted && t < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = t;
}
// As above without the planted branch, which is a fault in itself.
__global__ void one_barrier(int64_t* out, bool) {
  __syncthreads();
  out[threadIdx.x] = int64_t(threadIdx.x);
}

__global__ void exited_lane_in_shuffle(int64_t* out, bool planted) {
  const int t = int(threadIdx.x);
  if (planted && t % 32 == 5) return;
  out[t] = gpu::group_sum(float(t), 32) > 0;
}

__global__ void divergent_shuffle(int64_t* out, bool planted) {
  const int t = int(threadIdx.x);
  out[t] = 0;
  if (planted && t % 32 == 5) {
    __syncthreads();
    return;
  }
  out[t] = __shfl_sync(gpu::kFullMask, t, 0);
  __syncthreads();
}

__global__ void uninitialised_shared_read(int64_t* out, bool planted) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  int* values = reinterpret_cast<int*>(shared);
  const int t = int(threadIdx.x);
  if (!planted || t != 7) values[t] = t;
  __syncthreads();
  out[t] = values[kThreads - 1 - t];
}

__global__ void misaligned_vector(int64_t* out, bool planted) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  float* values = reinterpret_cast<float*>(shared);
  const int t = int(threadIdx.x);
  values[t] = float(t);
  __syncthreads();
  out[t] = t < 8 ? int64_t(gpu::load_pack<4>(values + 4 * t + (planted ? 1 : 0)).at[2]) : 0;
}

__global__ void shared_as_global(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int64_t, values, kThreads);
  const int t = int(threadIdx.x);
  gpu::store_pack_once<1>(planted ? values + t : out + t, gpu::Pack<int64_t, 1>{{t}});
}

__global__ void copy_not_waited_for(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int64_t, values, kThreads);
  const int t = int(threadIdx.x);
  values[t] = 0;
  out[t] = t;
  __syncthreads();
  gpu::copy_to_shared<1>(values + t, out + t);
  gpu::commit_copies();
  if (!planted) gpu::wait_for_copies<0>();
  __syncthreads();
  out[t] = values[kThreads - 1 - t];
}

// Races that no order of threads shows here: thread 0 leaves for a while what others must not read.
__global__ void passing_value(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int, value, 1);
  volatile int* const kept = value;
  const int t = int(threadIdx.x);
  if (t == 0) kept[0] = 2;
  __syncthreads();
  if (planted && t == 0) {
    kept[0] = 3;
    kept[0] = 2;
  }
  out[t] = kept[0];
}

__global__ void passing_value_in_warp(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int, values, kThreads / 32);
  volatile int* const kept = values + threadIdx.x / 32;
  const int t = int(threadIdx.x);
  if (t % 32 == 0) {
    kept[0] = 3;
    kept[0] = 2;
  }
  __syncwarp();
  if (planted && t % 32 == 0) {
    kept[0] = 3;
    kept[0] = 2;
  }
  out[t] = kept[0];
}

// A shuffle waits for the other lanes, but orders no memory.
__global__ void shuffle_for_barrier(int64_t* out, bool planted) {
  FEDPEFT_SHARED(int, values, kThreads);
  const int t = int(threadIdx.x);
  values[t] = t;
  out[t] = __shfl_sync(gpu::kFullMask, t, 0);
  if (!planted) __syncwarp();
  out[t] += values[t ^ 1];
}

__global__ void blocks_write_the_same(int64_t* out, bool planted) {
  if (planted || blockIdx.x == 0) out[threadIdx.x] = int64_t(threadIdx.x);
}

struct Planted {
  const char* name;
  void (*kernel)(int64_t*, bool);
  void (*correct)(int64_t*, bool);
  int blocks = 1;
};

constexpr Planted kFaults[] = {
    {"missing_barrier", missing_barrier, missing_barrier},
    {"write_past_shared", write_past_shared, write_past_shared},
    {"write_past_dynamic_shared", write_past_dynamic_shared, write_past_dynamic_shared},
    {"divergent_barrier", divergent_barrier, divergent_barrier},
    {"two_barriers", two_barriers, one_barrier},
    {"exited_lane_in_shuffle", exited_lane_in_shuffle, exited_lane_in_shuffle},
    {"divergent_shuffle", divergent_shuffle, divergent_shuffle},
    {"uninitialised_shared_read", uninitialised_shared_read, uninitialised_shared_read},
    {"misaligned_vector", misaligned_vector, misaligned_vector},
    {"shared_as_global", shared_as_global, shared_as_global},
    {"copy_not_waited_for", copy_not_waited_for, copy_not_waited_for},
    {"passing_value", passing_value, passing_value},
    {"passing_value_in_warp", passing_value_in_warp, passing_value_in_warp},
    {"shuffle_for_barrier", shuffle_for_barrier, shuffle_for_barrier},
    {"blocks_write_the_same", blocks_write_the_same, blocks_write_the_same, 2},
};

}  // namespace

std::vector<std::string> fault_names() {
  std::vector<std::string> names;
  for (const Planted& fault : kFaults) names.emplace_back(fault.name);
  return names;
}

std::vector<int64_t> run_fault(const std::string& name, bool planted) {
  for (const Planted& fault : kFaults) {
    if (name != fault.name) continue;
    std::vector<int64_t> out(kThreads, -1);
    gpu::launch(planted ? fault.kernel : fault.correct, fault.blocks, kThreads,
                kThreads * int64_t(sizeof(int)), {}, out.data(), planted);
    return out;
  }
  throw std::invalid_argument("no fault is called " + name);
}

}  // namespace fedpeft::emulator
