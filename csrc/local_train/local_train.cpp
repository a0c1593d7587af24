// Binding of local_train: allocation, dispatch.
#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "local_train/call.h"
#include "local_train/local_train_cuda.h"

namespace fedpeft {
namespace {

// Trains all clients of the call, the largest first, each as a block taken by whichever
// multiprocessor is free.
[[maybe_unused]] void train_on_gpu(const LocalTrainArgs& a, std::vector<int64_t> sizes, DType dtype,
                                   const Tensor& like, gpu::Stream stream) {
  const int64_t C = int64_t(sizes.size());
  const std::vector<int64_t> order = largest_first(sizes);
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  const gpu::LocalTrainPlan plan = gpu::plan_local_train(a, dtype, sizes);
  const auto bytes = [&](int64_t count) { return allocate(like, {count}, ScalarType::Byte); };
  Tensor scratch = bytes(plan.blocks * plan.scratch_bytes), places = bytes(8 * C),
         state = bytes(sizeof(gpu::LocalTrainState)), lists = bytes(gpu::lists_bytes(a));
  gpu::copy_to_device(places.mutable_data_ptr(), order.data(), 8 * C, stream);
  const gpu::LocalTrainErrors errors = gpu::local_train(
      a, dtype, C, plan, static_cast<const int64_t*>(places.const_data_ptr()),
      scratch.mutable_data_ptr(), static_cast<gpu::LocalTrainState*>(state.mutable_data_ptr()),
      lists.mutable_data_ptr(), stream);
  a.bad_item->report(errors.item);
  a.bad_order->report(errors.order);
  a.bad_code->report(errors.code);
  raise_errors(a, [&](const IndexArray& indices, int64_t at) {
    return gpu::read_index(indices, at, stream);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, std::vector<Tensor>>
local_train(const Tensor& clients, const Tensor& indptr, const Tensor& items,
            const Tensor& positives, int64_t num_items, const Tensor& user, const Optional& base,
            const Optional& table, const Optional& A, const Optional& B, const Optional& codes,
            const Optional& codebooks, const Optional& buckets, const Optional& hashes,
            const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
            std::vector<Tensor> mlp, double dropout, bool mean, bool graph, int64_t epochs,
            int64_t batch_size, bool bpr, bool adam, double lr, double beta1, double beta2,
            double eps, double l2_user, double l2_items, double prox, int64_t seed, int64_t round) {
  Call call;
  prepare(call, clients,
          {indptr,  items,     positives, num_items, user,       base, table, A,  B,
           codes,   codebooks, buckets,   hashes,    w1,         b1,   w2,    b2, mlp,
           dropout, mean,      graph,     epochs,    batch_size, bpr,  adam,  lr, beta1,
           beta2,   eps,       l2_user,   l2_items,  prox,       seed, round});
  LocalTrainArgs& a = call.args;
  const int64_t C = clients.size(0), D = a.D, S = a.S, H = a.H;
  if (table || A) {
    for (const int64_t size : call.sizes)
      a.R = std::max(a.R, std::min(num_items, size * (1 + epochs)));
  }
  const auto result = [&](bool there, std::vector<int64_t> shape) {
    if (!there) return allocate(user, {0});
    shape.insert(shape.begin(), C);
    return allocate(user, shape);
  };
  Tensor new_user = result(true, {a.user_width});
  Tensor losses = allocate(user, {C}, ScalarType::Double);
  Tensor rows = allocate(user, {C, a.R}, ScalarType::Long);
  Tensor d_table = result(table.has_value(), {a.R, D}), d_A = result(A.has_value(), {a.R, a.rank}),
         d_B = result(B.has_value(), {D, a.rank}),
         d_codebooks = result(codebooks.has_value(), {a.L, a.K, D}),
         d_buckets = result(buckets.has_value(), {a.M, D}), d_w1 = result(w1.has_value(), {S, H}),
         d_b1 = result(w1.has_value(), {S}), d_w2 = result(w1.has_value(), {H, S}),
         d_b2 = result(w1.has_value(), {H});
  std::vector<Tensor> d_mlp = call.mlp_updates();
  a.new_user = new_user.mutable_data_ptr();
  a.losses = static_cast<double*>(losses.mutable_data_ptr());
  a.rows = static_cast<int64_t*>(rows.mutable_data_ptr());
  a.d_table = d_table.mutable_data_ptr();
  a.d_A = d_A.mutable_data_ptr();
  a.d_B = d_B.mutable_data_ptr();
  a.d_codebooks = d_codebooks.mutable_data_ptr();
  a.d_buckets = d_buckets.mutable_data_ptr();
  a.d_w1 = d_w1.mutable_data_ptr();
  a.d_b1 = d_b1.mutable_data_ptr();
  a.d_w2 = d_w2.mutable_data_ptr();
  a.d_b2 = d_b2.mutable_data_ptr();
  run_on(
      user,
      [&](auto) {
        const auto train = local_train_kernels_for(call.args).train[int(call.dtype)];
        train_on_cpu(a, call.sizes, largest_first(call.sizes), threads_for(C), call.dtype, user,
                     [&](int64_t, int64_t c, const void* drawn, const void* ahead, void* scratch) {
                       train(a, c, drawn, ahead, scratch, nullptr, 0.0);
                     });
        raise_errors(a);
      },
      [&](auto stream) { train_on_gpu(a, call.sizes, call.dtype, user, stream); });
  return {new_user,  losses, rows, d_table, d_A,  d_B,  d_codebooks,
          d_buckets, d_w1,   d_b1, d_w2,    d_b2, d_mlp};
}

}  // namespace

FEDPEFT_IMPL(m) { m.impl("local_train", TORCH_BOX(&local_train)); }

}  // namespace fedpeft
