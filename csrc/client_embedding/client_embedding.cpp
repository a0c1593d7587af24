// Binding of client_embedding: checks, allocation, dispatch.
#include "client_embedding/client_embedding_cpu.h"
#include "client_embedding/client_embedding_cuda.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fedpeft {
namespace {

Tensor client_embedding(const Tensor& rows, const Tensor& weight) {
  check_value(weight.dim() == 2 || weight.dim() == 3,
              "weight: expected shape [R, D] or [C, R, D], got ", shape_text(weight));
  const bool per_client = weight.dim() == 3;
  const Layout layout = layout_of(rows, per_client, weight.size(0), "rows", "weight");
  const int64_t D = weight.size(weight.dim() - 1);

  const Tensor rows_ = dense(rows), weight_ = dense(weight);
  Tensor out = allocate(weight, output_shape(rows, D));
  FirstError bad_row;
  ClientEmbeddingArgs a{};
  a.rows = indices_of(rows_, "rows");
  a.weight = weight_.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.positions = layout.positions;
  a.num_rows = weight.size(weight.dim() - 2);
  a.D = D;
  a.per_client = per_client;
  a.bad_row = &bad_row;
  const DType dtype = dtype_of(weight, "weight");
  run_on(
      weight,
      [&](auto) {
        const auto kernel = select_client_embedding_kernels().forward[int(dtype)];
        parallel_ranges(layout.total(), D,
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
        raise_bad_index(bad_row, a.rows, a.num_rows, "rows");
      },
      [&](auto stream) { gpu::client_embedding(a, dtype, layout.clients, stream); });
  return out;
}

Tensor client_embedding_backward(const Tensor& grad, const Tensor& rows, int64_t num_rows,
                                 bool per_client) {
  check_grad(grad, rows);
  check_value(num_rows >= 0, "num_rows: expected at least 0, got ", num_rows);
  check_value(!per_client || rows.dim() == 2, "rows: expected shape [C, P], got ",
              shape_text(rows));
  const Layout layout = layout_of(rows, per_client, per_client ? rows.size(0) : 1, "rows", "grad");
  const int64_t D = grad.size(grad.dim() - 1);
  std::vector<int64_t> shape{num_rows, D};
  if (per_client) shape.insert(shape.begin(), layout.clients);

  const Tensor grad_ = dense(grad), rows_ = dense(rows);
  FirstError bad_row;
  ClientEmbeddingArgs a{};
  a.rows = indices_of(rows_, "rows");
  a.grad = grad_.const_data_ptr();
  a.positions = layout.positions;
  a.num_rows = num_rows;
  a.D = D;
  a.per_client = per_client;
  a.bad_row = &bad_row;
  const DType dtype = dtype_of(grad, "grad");
  const ScalarType accumulator = accumulator_type(grad);
  Tensor out;
  run_on(
      grad,
      [&](auto) {
        const ClientEmbeddingKernels& kernels = select_client_embedding_kernels();
        Tensor sum = per_client ? allocate(grad, shape, accumulator)
                                : torch::stable::new_zeros(grad, shape, accumulator);
        a.grad_weight = sum.mutable_data_ptr();
        const auto row_of = [&](int64_t n, int64_t) -> int64_t {
          const int64_t row = a.rows[n];
          return classify(row, num_rows) == Position::bad ? 0 : row;
        };
        if (per_client) {
          parallel_ranges(
              layout.clients, (layout.positions + num_rows) * D,
              [&](int64_t begin, int64_t end) { kernels.backward[int(dtype)](a, begin, end); });
        } else {
          scatter_by_row(layout.positions, 1, num_rows, D, row_of,
                         [&](const int64_t* positions, int64_t count) {
                           kernels.backward_entries[int(dtype)](a, positions, count);
                         });
        }
        raise_bad_index(bad_row, a.rows, num_rows, "rows");
        out = as_dtype(sum, grad.scalar_type());
      },
      [&](auto stream) {
        out = allocate(grad, shape);
        scatter(
            gpu::plan_scatter(gpu::client_embedding_shape(a, dtype, layout.clients)), out,
            accumulator,
            [&](const gpu::ScatterPlan& plan, void* keys) {
              gpu::client_embedding_keys(a, plan, keys, stream);
            },
            [&](const gpu::ScatterPlan& plan, const gpu::SortedEntries& sorted) {
              gpu::client_embedding_backward(a, dtype, plan, sorted, out.mutable_data_ptr(),
                                             stream);
            });
      });
  return out;
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("client_embedding", TORCH_BOX(&client_embedding));
  m.impl("client_embedding_backward", TORCH_BOX(&client_embedding_backward));
}

}  // namespace fedpeft
