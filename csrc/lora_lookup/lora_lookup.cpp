// Binding of lora_lookup: checks, allocation, dispatch.
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "lora_lookup/lora_lookup_cpu.h"
#include "lora_lookup/lora_lookup_cuda.h"

namespace fedpeft {
namespace {

// Shared B: partial gradients of blocks of this many positions are added in order, whatever the
// threads.
constexpr int64_t kBlock = 4096;

struct Factors {
  bool per_client;
  int64_t clients, rows, rank, D;
};

Factors factors_of(const Tensor& A, const Tensor& B) {
  check_value(A.dim() == 2 || A.dim() == 3, "A: expected shape [R, r] or [C, R, r], got ",
              shape_text(A));
  check_value(B.dim() == A.dim(), "B: expected shape ", A.dim() == 3 ? "[C, D, r]" : "[D, r]",
              ", got ", shape_text(B));
  const int64_t d = A.dim() - 2;
  check_rank(A);
  check_size(B, d + 1, A.size(d + 1), "B", "r, the rank of A");
  if (d == 1) check_size(B, 0, A.size(0), "B", "C, the clients of A");
  check_same_dtype(B, A, "B", "A");
  check_same_device(B, A, "B", "A");
  return {d == 1, d == 1 ? A.size(0) : 1, A.size(d), A.size(d + 1), B.size(d)};
}

Tensor lora_lookup(const Tensor& items, const Tensor& A, const Tensor& B,
                   const std::optional<Tensor>& base, const std::optional<Tensor>& rows) {
  const Factors f = factors_of(A, B);
  const Layout layout = layout_of(items, f.per_client, f.clients, "items", "A");
  const bool separate = rows.has_value();
  check_base(base, separate ? -1 : f.rows, f.D, A, "A");
  if (separate) check_same_shape(*rows, items, "rows", "items");

  const Tensor items_ = dense(items), A_ = dense(A), B_ = dense(B);
  const std::optional<Tensor> base_ = dense(base), rows_ = dense(rows);
  Tensor out = allocate(A, output_shape(items, f.D));
  FirstError bad_item, bad_row;
  LoraLookupArgs a{};
  a.items = indices_of(items_, "items");
  a.rows = separate ? indices_of(*rows_, "rows") : a.items;
  a.A = A_.const_data_ptr();
  a.B = B_.const_data_ptr();
  a.base = base_ ? base_->const_data_ptr() : nullptr;
  a.out = out.mutable_data_ptr();
  a.positions = layout.positions;
  // With rows and no base, items only say where padding is.
  a.num_items = base ? base->size(0) : separate ? INT64_MAX : f.rows;
  a.num_rows = f.rows;
  a.rank = f.rank;
  a.D = f.D;
  a.per_client = f.per_client;
  a.separate_rows = separate;
  a.bad_item = &bad_item;
  a.bad_row = &bad_row;
  const DType dtype = dtype_of(A, "A");
  run_on(
      A,
      [&](auto) {
        const auto kernel = select_lora_lookup_kernels().forward[int(dtype)];
        parallel_ranges(layout.total(), (f.rank + 1) * f.D, [&](int64_t begin, int64_t end) {
          std::vector<double> scratch(size_t(f.rank * f.D));
          kernel(a, begin, end, scratch.data());
        });
        raise_bad_index(bad_item, a.items, a.num_items, "items");
        if (bad_row.any()) {
          throw std::out_of_range(text("rows: index ", a.rows[bad_row.position], " at position ",
                                       bad_row.position, " is out of range: expected 0 to ",
                                       f.rows - 1,
                                       " where items holds an item and -1 where items is -1"));
        }
      },
      [&](auto stream) { gpu::lora_lookup(a, dtype, layout.clients, stream); });
  return out;
}

std::tuple<Tensor, Tensor> lora_lookup_backward(const Tensor& grad, const Tensor& rows,
                                                const Tensor& A, const Tensor& B) {
  const Factors f = factors_of(A, B);
  check_grad(grad, rows);
  check_size(grad, grad.dim() - 1, f.D, "grad", "D, the width of B");
  check_same_dtype(grad, A, "grad", "A");
  const Layout layout = layout_of(rows, f.per_client, f.clients, "rows", "A");

  const Tensor grad_ = dense(grad), rows_ = dense(rows), A_ = dense(A), B_ = dense(B);
  FirstError bad_row;
  LoraLookupArgs a{};
  a.rows = indices_of(rows_, "rows");
  a.A = A_.const_data_ptr();
  a.B = B_.const_data_ptr();
  a.grad = grad_.const_data_ptr();
  a.positions = layout.positions;
  a.num_rows = f.rows;
  a.rank = f.rank;
  a.D = f.D;
  a.per_client = f.per_client;
  a.bad_row = &bad_row;
  const DType dtype = dtype_of(A, "A");
  const ScalarType accumulator = accumulator_type(A);
  std::vector<int64_t> shape_A{f.rows, f.rank}, shape_B{f.D, f.rank};
  if (f.per_client) {
    shape_A.insert(shape_A.begin(), f.clients);
    shape_B.insert(shape_B.begin(), f.clients);
  }
  Tensor grad_A, grad_B;
  run_on(
      A,
      [&](auto) {
        const LoraLookupKernels& kernels = select_lora_lookup_kernels();
        const size_t scratch_size = size_t(2 * f.rank * f.D);
        grad_A = f.per_client ? allocate(A, shape_A, accumulator)
                              : torch::stable::new_zeros(A, shape_A, accumulator);
        grad_B = torch::stable::new_zeros(B, shape_B, accumulator);
        a.grad_A = grad_A.mutable_data_ptr();
        a.grad_B = grad_B.mutable_data_ptr();

        if (f.per_client || layout.positions <= kBlock) {
          parallel_ranges(layout.clients, (layout.positions + f.rows + 1) * f.rank * f.D,
                          [&](int64_t begin, int64_t end) {
                            std::vector<double> scratch(scratch_size);
                            kernels.backward[int(dtype)](a, begin, end, scratch.data());
                          });
        } else {
          const auto row_of = [&](int64_t n, int64_t) -> int64_t {
            return classify(a.rows[n], f.rows) == Position::bad ? 0 : a.rows[n];
          };
          const auto run = [&](const int64_t* positions, int64_t count) {
            std::vector<double> scratch(scratch_size);
            kernels.backward_entries[int(dtype)](a, positions, count, scratch.data());
          };
          scatter_by_row(layout.positions, 1, f.rows, f.rank * f.D, row_of, run);
          const int64_t blocks = (layout.positions + kBlock - 1) / kBlock;
          const Tensor partial = allocate(B, {blocks, f.D, f.rank}, accumulator);
          char* into = static_cast<char*>(partial.mutable_data_ptr());
          const int64_t bytes = f.D * f.rank * (accumulator == ScalarType::Double ? 8 : 4);
          parallel_ranges(blocks, kBlock * f.rank * f.D, [&](int64_t begin, int64_t end) {
            std::vector<double> scratch(scratch_size);
            for (int64_t b = begin; b < end; ++b) {
              kernels.backward_B[int(dtype)](a, b * kBlock,
                                             std::min((b + 1) * kBlock, layout.positions),
                                             into + b * bytes, scratch.data());
            }
          });
          add_blocks(partial, grad_B);
        }
        raise_bad_index(bad_row, a.rows, f.rows, "rows");
        grad_A = as_dtype(grad_A, A.scalar_type());
        grad_B = as_dtype(grad_B, A.scalar_type());
      },
      [&](auto stream) {
        grad_A = allocate(A, shape_A);
        grad_B = allocate(B, shape_B);
        if (gpu::lora_lookup_backward_clients(a, dtype, layout.clients, grad_A.mutable_data_ptr(),
                                              grad_B.mutable_data_ptr(), stream))
          return;
        const gpu::ScatterPlan lists =
            gpu::plan_scatter(gpu::lora_lookup_shape_A(a, layout.clients));
        const gpu::PositionSum sum = gpu::lora_lookup_shape_B(a, layout.clients);
        if (lists.way == gpu::ScatterWay::lists && sum.blocks() == 1) {
          gpu::lora_lookup_backward(a, dtype, lists, sum, grad_A.mutable_data_ptr(),
                                    grad_B.mutable_data_ptr(), stream);
          return;
        }
        scatter(
            lists, grad_A, accumulator,
            [&](const gpu::ScatterPlan& plan, void* keys) {
              gpu::lora_lookup_keys(a, plan, keys, stream);
            },
            [&](const gpu::ScatterPlan& plan, const gpu::SortedEntries& sorted) {
              gpu::lora_lookup_backward_A(a, dtype, plan, sorted, grad_A.mutable_data_ptr(),
                                          stream);
            });
        Tensor partial = allocate(B, {sum.partial_size()}, accumulator);
        gpu::lora_lookup_backward_B(a, dtype, sum, partial.mutable_data_ptr(),
                                    grad_B.mutable_data_ptr(), stream);
      });
  return {grad_A, grad_B};
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("lora_lookup", TORCH_BOX(&lora_lookup));
  m.impl("lora_lookup_backward", TORCH_BOX(&lora_lookup_backward));
}

}  // namespace fedpeft
