// torch's parallel_for on threads that ThreadSanitizer sees: torch's own run in an OpenMP library
// without instrumentation, where every fork and join would look like a race. Part of builds with
// FEDPEFT_SANITIZE=thread alone.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kThreads = 4;
thread_local bool inside = false;

}  // namespace

AOTITorchError torch_get_num_threads(uint32_t* out_num_threads) {
  *out_num_threads = kThreads;
  return AOTI_TORCH_SUCCESS;
}

// As at::parallel_for: at most one range a thread, none shorter than the grain but the last, and
// calls from inside a range run there.
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func,
                                  void* ctx) {
  if (begin >= end) return AOTI_TORCH_SUCCESS;
  const int64_t n = end - begin;
  const int64_t ranges = inside ? 1
                                : std::min(kThreads, (n + std::max<int64_t>(1, grain_size) - 1) /
                                                         std::max<int64_t>(1, grain_size));
  const int64_t size = (n + ranges - 1) / ranges;
  std::atomic<bool> failed{false};
  const auto run = [&](int64_t first) {
    const bool before = inside;
    inside = true;
    try {
      if (first < end) func(first, std::min(end, first + size), ctx);
    } catch (...) {
      failed = true;
    }
    inside = before;
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < ranges; ++i) threads.emplace_back(run, begin + i * size);
  run(begin);
  for (std::thread& thread : threads) thread.join();
  return failed ? AOTI_TORCH_FAILURE : AOTI_TORCH_SUCCESS;
}
