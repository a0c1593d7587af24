// Binding of rq_lookup: checks, allocation, dispatch.
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "rq_lookup/rq_lookup_cpu.h"
#include "rq_lookup/rq_lookup_cuda.h"

namespace fedpeft {
namespace {

[[maybe_unused]] void raise_errors(const RqLookupArgs& a) {
  raise_bad_index(*a.bad_item, a.items, a.num_items, "items");
  raise_bad_code(*a.bad_code, a.codes, a.L, a.K);
}

Tensor rq_lookup(const Tensor& items, const Tensor& codes, const Tensor& codebooks,
                 const std::optional<Tensor>& base) {
  check_dim(codes, 2, "codes", "[I, L]");
  check_value(codebooks.dim() == 3 || codebooks.dim() == 4,
              "codebooks: expected shape [L, K, D] or [C, L, K, D], got ", shape_text(codebooks));
  const bool per_client = codebooks.dim() == 4;
  const Layout layout = layout_of(items, per_client, codebooks.size(0), "items", "codebooks");
  const int64_t first = per_client ? 1 : 0;
  const int64_t L = codebooks.size(first), K = codebooks.size(first + 1),
                D = codebooks.size(first + 2);
  check_size(codes, 1, L, "codes", "L, the levels of codebooks");
  check_base(base, codes.size(0), D, codebooks, "codebooks");

  const Tensor items_ = dense(items), codes_ = dense(codes), codebooks_ = dense(codebooks);
  const std::optional<Tensor> base_ = dense(base);
  Tensor out = allocate(codebooks, output_shape(items, D));
  FirstError bad_item, bad_code;
  RqLookupArgs a{};
  a.items = indices_of(items_, "items");
  a.codes = codes_of(codes_, "codes");
  a.codebooks = codebooks_.const_data_ptr();
  a.base = base_ ? base_->const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  a.positions = layout.positions;
  a.num_items = codes.size(0);
  a.L = L;
  a.K = K;
  a.D = D;
  a.per_client = per_client;
  a.bad_item = &bad_item;
  a.bad_code = &bad_code;
  const DType dtype = dtype_of(codebooks, "codebooks");
  run_on(
      codebooks,
      [&](auto) {
        const auto kernel = select_wide_rq_lookup_kernels().forward[int(dtype)];
        parallel_ranges(layout.total(), (L + 1) * D,
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
        raise_errors(a);
      },
      [&](auto stream) { gpu::rq_lookup(a, dtype, layout.clients, stream); });
  return out;
}

Tensor rq_lookup_backward(const Tensor& grad, const Tensor& items, const Tensor& codes,
                          int64_t codebook_size, bool per_client) {
  check_dim(codes, 2, "codes", "[I, L]");
  check_grad(grad, items);
  check_value(codebook_size >= 0, "codebook_size: expected at least 0, got ", codebook_size);
  check_value(!per_client || items.dim() == 2, "items: expected shape [C, P], got ",
              shape_text(items));
  const Layout layout =
      layout_of(items, per_client, per_client ? items.size(0) : 1, "items", "grad");
  const int64_t L = codes.size(1), K = codebook_size, D = grad.size(grad.dim() - 1);
  std::vector<int64_t> shape{L, K, D};
  if (per_client) shape.insert(shape.begin(), layout.clients);

  const Tensor grad_ = dense(grad), items_ = dense(items), codes_ = dense(codes);
  FirstError bad_item, bad_code;
  RqLookupArgs a{};
  a.items = indices_of(items_, "items");
  a.codes = codes_of(codes_, "codes");
  a.grad = grad_.const_data_ptr();
  a.positions = layout.positions;
  a.num_items = codes.size(0);
  a.L = L;
  a.K = K;
  a.D = D;
  a.per_client = per_client;
  a.bad_item = &bad_item;
  a.bad_code = &bad_code;
  const DType dtype = dtype_of(grad, "grad");
  const ScalarType accumulator = accumulator_type(grad);
  Tensor out;
  run_on(
      grad,
      [&](auto) {
        const RqLookupKernels& kernels = select_wide_rq_lookup_kernels();
        Tensor sum = per_client ? allocate(grad, shape, accumulator)
                                : torch::stable::new_zeros(grad, shape, accumulator);
        a.grad_codebooks = sum.mutable_data_ptr();
        if (per_client) {
          parallel_ranges(
              layout.clients, (layout.positions + K) * L * D,
              [&](int64_t begin, int64_t end) { kernels.backward[int(dtype)](a, begin, end); });
        } else {
          const auto row_of = [&](int64_t n, int64_t level) -> int64_t {
            const int64_t item = a.items[n];
            if (classify(item, a.num_items) != Position::item) return item == -1 ? -1 : 0;
            const int64_t code = a.codes[item * L + level];
            return level * K + (uint64_t(code) < uint64_t(K) ? code : 0);
          };
          const auto run = [&](const int64_t* entries, int64_t count) {
            entries ? kernels.backward_entries[int(dtype)](a, entries, count)
                    : kernels.backward[int(dtype)](a, 0, 1);
          };
          scatter_by_row(layout.positions, L, L * K, D, row_of, run);
        }
        raise_errors(a);
        out = as_dtype(sum, grad.scalar_type());
      },
      [&](auto stream) {
        out = allocate(grad, shape);
        scatter(
            gpu::plan_scatter(gpu::rq_lookup_shape(a, dtype, layout.clients)), out, accumulator,
            [&](const gpu::ScatterPlan& plan, void* keys) {
              gpu::rq_lookup_keys(a, plan, keys, stream);
            },
            [&](const gpu::ScatterPlan& plan, const gpu::SortedEntries& sorted) {
              gpu::rq_lookup_backward(a, dtype, plan, sorted, out.mutable_data_ptr(), stream);
            });
      });
  return out;
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("rq_lookup", TORCH_BOX(&rq_lookup));
  m.impl("rq_lookup_backward", TORCH_BOX(&rq_lookup_backward));
}

}  // namespace fedpeft
