// The one place where an op meets its device: CPU kernels, CUDA kernels on torch's current stream,
// or, in the test module `_emulator`, CUDA kernels on the CPU. For the binding files.
#pragma once

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/hash.h"
#include "common/scatter.h"
#include "common/torch.h"

// Registers the implementations of an op family for every device that this build has:
// `FEDPEFT_IMPL(m) { ... }`.
#define FEDPEFT_IMPL(m)                                              \
  static void fedpeft_impl(torch::stable::detail::StableLibrary& m); \
  FEDPEFT_IMPL_CPU                                                   \
  FEDPEFT_IMPL_CUDA                                                  \
  static void fedpeft_impl(torch::stable::detail::StableLibrary& m)
#define FEDPEFT_IMPL_CPU \
  STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CPU, library) { fedpeft_impl(library); }
#if defined(FEDPEFT_EMULATOR)
#define FEDPEFT_LIBRARY fedpeft_ext_emulated
#else
#define FEDPEFT_LIBRARY fedpeft_ext
#endif
#if defined(FEDPEFT_WITH_CUDA)
#define FEDPEFT_IMPL_CUDA \
  STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CUDA, library) { fedpeft_impl(library); }
#else
#define FEDPEFT_IMPL_CUDA
#endif

namespace fedpeft {

struct Cpu {};

// Calls cpu(Cpu{}) or gpu(gpu::Stream) by the device of `on`. Both are generic lambdas: a build
// never compiles, and so never links, the kernels of a device that it lacks.
template <typename OnCpu, typename OnGpu>
void run_on([[maybe_unused]] const Tensor& on, [[maybe_unused]] const OnCpu& cpu,
            [[maybe_unused]] const OnGpu& gpu) {
#if defined(FEDPEFT_EMULATOR)
  gpu(gpu::Stream{});
#else
#if defined(FEDPEFT_WITH_CUDA)
  if (on.is_cuda()) {
    const int32_t device = on.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    gpu::Stream stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream.handle));
    gpu(stream);
    return;
  }
#endif
  cpu(Cpu{});
#endif
}

// Whether index values can be checked before the kernels run. On a GPU they assert on the device
// instead.
inline bool host_readable([[maybe_unused]] const Tensor& t) {
#if defined(FEDPEFT_EMULATOR)
  return false;
#else
  return !t.is_cuda();
#endif
}

// Coefficients are below 2^61 - 1, which is seen where the host can read them without waiting.
inline void check_hash_values(const Tensor& dense_hashes) {
  if (!host_readable(dense_hashes)) return;
  const int64_t* values = static_cast<const int64_t*>(dense_hashes.const_data_ptr());
  for (int64_t i = 0; i < dense_hashes.numel(); ++i) {
    check_value(uint64_t(values[i]) < kHashPrime,
                "hashes: expected values from 0 to 2^61 - 2, got ", values[i], " at ", i / 2, ", ",
                i % 2);
  }
}

// Values and their former places along the last dimension, ascending; equal values keep their
// order.
inline std::pair<Tensor, Tensor> sort_stable(const Tensor& keys) {
  // aten::sort.stable(Tensor self, *, bool? stable, int dim=-1, bool descending=False) -> (values,
  // indices)
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(keys), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{-1}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// A scatter into `out` ([clients, rows, width], any shape): write_keys(plan, keys) and run(plan,
// sorted) launch the op's kernels. `out` comes uninitialised.
template <typename WriteKeys, typename Run>
void scatter(const gpu::ScatterPlan& plan, Tensor& out, ScalarType accumulator,
             const WriteKeys& write_keys, const Run& run) {
  gpu::SortedEntries sorted;
  if (plan.way == gpu::ScatterWay::tables) {
    const gpu::ScatterTables& tables = plan.tables;
    Tensor lists = allocate(out, {tables.tiles, int64_t{tables.pairs}, 2}, ScalarType::Short);
    write_keys(plan, lists.mutable_data_ptr());
    Tensor partial = allocate(out, {tables.chunks, int64_t{tables.rows}, plan.width}, accumulator);
    sorted.lists = static_cast<const uint16_t*>(lists.const_data_ptr());
    sorted.partial = partial.mutable_data_ptr();
    run(plan, sorted);
    return;
  }
  if (plan.way != gpu::ScatterWay::sorted) {
    run(plan, sorted);
    return;
  }
  torch::stable::zero_(out);
  Tensor keys =
      allocate(out, {plan.entries()}, plan.wide_keys ? ScalarType::Long : ScalarType::Int);
  write_keys(plan, keys.mutable_data_ptr());
  const auto [values, order] = sort_stable(keys);
  Tensor partial = allocate(out, {plan.tiles(), 2, plan.width}, accumulator);
  sorted.keys = {values.const_data_ptr(), plan.wide_keys ? 8 : 4};
  sorted.order = static_cast<const int64_t*>(order.const_data_ptr());
  sorted.partial = partial.mutable_data_ptr();
  run(plan, sorted);
}

}  // namespace fedpeft
