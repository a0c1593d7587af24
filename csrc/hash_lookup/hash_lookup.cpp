// Binding of hash_lookup and hash_buckets: checks, allocation, dispatch.
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/hash.h"
#include "common/parallel.h"
#include "hash_lookup/hash_lookup_cpu.h"
#include "hash_lookup/hash_lookup_cuda.h"

namespace fedpeft {
namespace {

// Shared SENet weights: partial gradients of blocks of this many positions are added in order.
constexpr int64_t kBlock = 4096;

// Checks the shapes and fills what forward and backward have in common; the tensors keep the data
// alive.
struct Inputs {
  Tensor items, table, hashes;
  std::optional<Tensor> w1, b1, w2, b2;
  Layout layout;
  FirstError bad_item;
  HashLookupArgs args{};

  Inputs(const Tensor& items_, const Tensor& table_, const Tensor& hashes_,
         const std::optional<Tensor>& w1_, const std::optional<Tensor>& b1_,
         const std::optional<Tensor>& w2_, const std::optional<Tensor>& b2_, bool mean)
      : items(dense(items_)), table(dense(table_)), hashes(dense(hashes_)) {
    check_hashes(hashes);
    check_hash_values(hashes);
    check_value(table.dim() == 2 || table.dim() == 3,
                "table: expected shape [M, D] or [C, M, D], got ", shape_text(table));
    const bool per_client = table.dim() == 3;
    layout = layout_of(items, per_client, table.size(0), "items", "table");
    args.M = table.size(table.dim() - 2);
    args.D = table.size(table.dim() - 1);
    args.H = hashes.size(0);
    check_rows(table, "table");
    check_value(w1_.has_value() == b1_.has_value() && w1_.has_value() == w2_.has_value() &&
                    w1_.has_value() == b2_.has_value(),
                "senet: expected all of w1, b1, w2, b2 or none");
    if (w1_.has_value()) {
      w1 = dense(w1_);
      b1 = dense(b1_);
      w2 = dense(w2_);
      b2 = dense(b2_);
      check_value(w1->dim() == (per_client ? 3 : 2), "w1: expected shape ",
                  per_client ? "[C, S, H]" : "[S, H]", ", got ", shape_text(*w1));
      args.S = w1->size(per_client ? 1 : 0);
      check_weight(*w1, "w1", {args.S, args.H});
      check_weight(*b1, "b1", {args.S});
      check_weight(*w2, "w2", {args.H, args.S});
      check_weight(*b2, "b2", {args.H});
      args.w1 = w1->const_data_ptr();
      args.b1 = b1->const_data_ptr();
      args.w2 = w2->const_data_ptr();
      args.b2 = b2->const_data_ptr();
    }
    args.items = indices_of(items, "items");
    args.hashes = static_cast<const int64_t*>(hashes.const_data_ptr());
    args.table = table.const_data_ptr();
    args.positions = layout.positions;
    args.num_items = INT64_MAX;
    args.per_client = per_client;
    args.mean = mean;
    args.bad_item = &bad_item;
  }
  Inputs(const Inputs&) = delete;

  void check_weight(const Tensor& t, const char* name, std::vector<int64_t> shape) const {
    if (layout.per_client) shape.insert(shape.begin(), layout.clients);
    check_value(has_shape(t, shape), name, ": expected shape ", shape_text(shape), ", got ",
                shape_text(t));
    check_same_dtype(t, table, name, "table");
    check_same_device(t, table, name, "table");
  }
};

Tensor hash_lookup(const Tensor& items, const Tensor& table, const Tensor& hashes,
                   const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
                   const std::optional<Tensor>& w2, const std::optional<Tensor>& b2, bool mean,
                   const std::optional<Tensor>& base) {
  Inputs in(items, table, hashes, w1, b1, w2, b2, mean);
  HashLookupArgs& a = in.args;
  check_base(base, -1, a.D, table, "table");
  const std::optional<Tensor> base_ = dense(base);
  if (base_) {
    a.base = base_->const_data_ptr();
    a.num_items = base_->size(0);
  }
  Tensor out = allocate(table, output_shape(items, a.D));
  a.out = out.mutable_data_ptr();
  const DType dtype = dtype_of(table, "table");
  run_on(
      table,
      [&](auto) {
        const auto kernel = hash_lookup_kernels_for(a).forward[int(dtype)];
        parallel_ranges(in.layout.total(), (a.H + 1) * (a.D + 8) + 2 * a.S * a.H,
                        [&](int64_t begin, int64_t end) {
                          std::vector<double> scratch(size_t(a.scratch_size()));
                          kernel(a, begin, end, scratch.data());
                        });
        raise_bad_index(in.bad_item, a.items, a.num_items, "items");
      },
      [&](auto stream) {
        Tensor scratch = allocate(table, {gpu::hash_lookup_scratch(a, dtype)}, ScalarType::Byte);
        gpu::hash_lookup(a, dtype, in.layout.clients, scratch.mutable_data_ptr(), stream);
      });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> hash_lookup_backward(
    const Tensor& grad, const Tensor& items, const Tensor& table, const Tensor& hashes,
    const std::optional<Tensor>& w1, const std::optional<Tensor>& b1,
    const std::optional<Tensor>& w2, const std::optional<Tensor>& b2, bool mean) {
  Inputs in(items, table, hashes, w1, b1, w2, b2, mean);
  HashLookupArgs& a = in.args;
  check_grad(grad, items);
  check_size(grad, grad.dim() - 1, a.D, "grad", "D, the width of table");
  check_same_dtype(grad, table, "grad", "table");
  const Tensor grad_ = dense(grad);
  a.grad = grad_.const_data_ptr();

  const DType dtype = dtype_of(table, "table");
  const ScalarType accumulator = accumulator_type(table), wanted = table.scalar_type();
  const bool senet = in.w1.has_value(), per_client = in.layout.per_client;
  const int64_t clients = in.layout.clients, positions = in.layout.positions;
  const int64_t cost = a.H * (a.D + 8) + 4 * a.S * a.H;

  std::vector<int64_t> shape{a.M, a.D};
  if (per_client) shape.insert(shape.begin(), clients);
  const auto none = [&] { return allocate(table, {0}); };
  Tensor grad_table, grad_w1 = none(), grad_b1 = none(), grad_w2 = none(), grad_b2 = none();
  if (senet && a.D == 0) {  // Rows without an element have no mean; an empty output moves nothing.
    const auto still = [](const Tensor& t) { return torch::stable::fill_(allocate_like(t), 0); };
    return {still(table), still(*in.w1), still(*in.b1), still(*in.w2), still(*in.b2)};
  }
  run_on(
      table,
      [&](auto) {
        const HashLookupKernels& kernels = hash_lookup_kernels_for(a);
        grad_table = per_client ? allocate(table, shape, accumulator)
                                : torch::stable::new_zeros(table, shape, accumulator);
        Tensor grad_senet =
            torch::stable::new_zeros(table, {senet ? clients : 0, a.senet_size()}, accumulator);
        a.grad_table = grad_table.mutable_data_ptr();
        a.grad_senet = grad_senet.mutable_data_ptr();

        if (per_client || positions <= kBlock) {
          parallel_ranges(clients, positions * cost + a.M * a.D, [&](int64_t begin, int64_t end) {
            std::vector<double> scratch(size_t(a.scratch_size()));
            kernels.backward[int(dtype)](a, begin, end, scratch.data());
          });
        } else {
          Tensor coefficients = allocate(table, {senet ? positions : 0, a.H, 2}, accumulator);
          if (senet) {
            a.coefficients = coefficients.mutable_data_ptr();
            const int64_t blocks = (positions + kBlock - 1) / kBlock;
            const Tensor partial = allocate(table, {blocks, a.senet_size()}, accumulator);
            char* into = static_cast<char*>(partial.mutable_data_ptr());
            const int64_t bytes = a.senet_size() * (accumulator == ScalarType::Double ? 8 : 4);
            parallel_ranges(blocks, kBlock * cost, [&](int64_t begin, int64_t end) {
              std::vector<double> scratch(size_t(a.scratch_size()));
              for (int64_t b = begin; b < end; ++b) {
                kernels.backward_senet[int(dtype)](a, b * kBlock,
                                                   std::min((b + 1) * kBlock, positions),
                                                   into + b * bytes, scratch.data());
              }
            });
            add_blocks(partial, grad_senet);
          }
          const auto row_of = [&](int64_t n, int64_t h) -> int64_t {
            const int64_t item = a.items[n];
            if (item < 0) return item == -1 ? -1 : 0;
            return hash_bucket(uint64_t(a.hashes[2 * h]), uint64_t(a.hashes[2 * h + 1]),
                               uint64_t(item), uint64_t(a.M));
          };
          const auto run = [&](const int64_t* entries, int64_t count) {
            kernels.backward_entries[int(dtype)](a, entries, count);
          };
          scatter_by_row(positions, a.H, a.M, a.D, row_of, run);
          parallel_ranges(a.M, a.D, [&](int64_t begin, int64_t end) {
            kernels.finish[int(dtype)](a, begin, end);
          });
        }
        raise_bad_index(in.bad_item, a.items, a.num_items, "items");
        grad_table = as_dtype(grad_table, wanted);

        // The packed gradient of the SENet, cut into its four tensors, which share no storage.
        int64_t offset = 0;
        const auto cut = [&](const Tensor& like) {
          const int64_t size = like.numel() / std::max<int64_t>(clients, 1);
          Tensor part = torch::stable::clone(torch::stable::narrow(grad_senet, 1, offset, size));
          offset += size;
          std::vector<int64_t> sizes;
          for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
          return as_dtype(torch::stable::reshape(part, sizes), wanted);
        };
        if (senet) {
          grad_w1 = cut(*in.w1);
          grad_b1 = cut(*in.b1);
          grad_w2 = cut(*in.w2);
          grad_b2 = cut(*in.b2);
        }
      },
      [&](auto stream) {
        grad_table = allocate(table, shape);
        Tensor coefficients = none();
        if (senet) {
          grad_w1 = allocate_like(*in.w1);
          grad_b1 = allocate_like(*in.b1);
          grad_w2 = allocate_like(*in.w2);
          grad_b2 = allocate_like(*in.b2);
          const gpu::SENetGradients weights{grad_w1.mutable_data_ptr(), grad_b1.mutable_data_ptr(),
                                            grad_w2.mutable_data_ptr(), grad_b2.mutable_data_ptr()};
          if (gpu::hash_lookup_backward_whole(a, dtype, clients, grad_table.mutable_data_ptr(),
                                              weights, stream))
            return;
          coefficients = allocate(table, {clients * positions, a.H, 2}, accumulator);
          a.coefficients = coefficients.mutable_data_ptr();
          Tensor activations =
              allocate(table, {clients * positions, gpu::hash_activations(a)}, accumulator);
          Tensor scratch = allocate(table, {gpu::hash_lookup_scratch(a, dtype)}, ScalarType::Byte);
          gpu::hash_lookup_activations(a, dtype, clients, scratch.mutable_data_ptr(),
                                       activations.mutable_data_ptr(), stream);
          const gpu::PositionSum sum = gpu::hash_lookup_shape_senet(a, clients);
          Tensor partial = allocate(table, {sum.partial_size()}, accumulator);
          gpu::hash_lookup_backward_senet(a, dtype, sum, activations.const_data_ptr(),
                                          partial.mutable_data_ptr(), weights, stream);
        }
        scatter(
            gpu::plan_scatter(gpu::hash_lookup_shape(a, dtype, clients)), grad_table, accumulator,
            [&](const gpu::ScatterPlan& plan, void* keys) {
              gpu::hash_lookup_keys(a, plan, keys, stream);
            },
            [&](const gpu::ScatterPlan& plan, const gpu::SortedEntries& sorted) {
              gpu::hash_lookup_backward(a, dtype, plan, sorted, grad_table.mutable_data_ptr(),
                                        stream);
            });
      });
  return {grad_table, grad_w1, grad_b1, grad_w2, grad_b2};
}

Tensor hash_buckets(const Tensor& items, const Tensor& hashes, int64_t table_size) {
  check_hashes(hashes);
  check_value(table_size > 0, "table_size: expected at least 1, got ", table_size);
  const Tensor items_ = dense(items), hashes_ = dense(hashes);
  check_hash_values(hashes_);
  const int64_t H = hashes.size(0);
  Tensor out = allocate(items, output_shape(items, H), ScalarType::Long);
  const IndexArray indices = indices_of(items_, "items");
  const int64_t* pairs = static_cast<const int64_t*>(hashes_.const_data_ptr());
  int64_t* into = static_cast<int64_t*>(out.mutable_data_ptr());
  run_on(
      items,
      [&](auto) {
        FirstError bad_item;
        parallel_ranges(items.numel(), 8 * H, [&](int64_t begin, int64_t end) {
          for (int64_t n = begin; n < end; ++n) {
            const int64_t item = indices[n];
            if (item < -1) bad_item.report(n);
            for (int64_t h = 0; h < H; ++h) {
              into[n * H + h] =
                  item < 0 ? -1
                           : hash_bucket(uint64_t(pairs[2 * h]), uint64_t(pairs[2 * h + 1]),
                                         uint64_t(item), uint64_t(table_size));
            }
          }
        });
        raise_bad_index(bad_item, indices, INT64_MAX, "items");
      },
      [&](auto stream) {
        gpu::hash_buckets(indices, pairs, into, items.numel(), H, table_size, stream);
      });
  return out;
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("hash_buckets", TORCH_BOX(&hash_buckets));
  m.impl("hash_lookup", TORCH_BOX(&hash_lookup));
  m.impl("hash_lookup_backward", TORCH_BOX(&hash_lookup_backward));
}

}  // namespace fedpeft
