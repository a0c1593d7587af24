// Binding of touched_rows, accumulate_updates_ and apply_updates_: checks, allocation, dispatch.
#include <cstring>
#include <memory>
#include <tuple>

#include "aggregate/aggregate_cpu.h"
#include "aggregate/aggregate_cuda.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fedpeft {
namespace {

std::tuple<Tensor, Tensor> touched_rows(const Tensor& items) {
  check_dim(items, 2, "items", "[C, N]");
  const Tensor items_ = dense(items);
  const int64_t C = items.size(0), N = items.size(1);
  FirstError bad_item;
  TouchedRowsArgs a{};
  a.items = indices_of(items_, "items");
  Tensor found = allocate_like(items_);
  Tensor positions = allocate_like(items_);
  a.rows = found.mutable_data_ptr();
  a.positions = positions.mutable_data_ptr();
  a.N = N;
  a.bad_item = &bad_item;
  Tensor rows;
  run_on(
      items,
      [&](auto) {
        std::vector<int64_t> counts(static_cast<size_t>(C), 0);
        a.counts = counts.data();
        const AggregateKernels& kernels = select_aggregate_kernels();
        const size_t scratch_words = size_t(kernels.touched_scratch(a) + 7) / 8;
        parallel_ranges(C, 16 * N, [&](int64_t begin, int64_t end) {
          const std::unique_ptr<uint64_t[]> scratch(new uint64_t[scratch_words]);
          kernels.touched(a, begin, end, scratch.get());
        });
        raise_bad_index(bad_item, a.items, INT64_MAX, "items");

        int64_t R = 0;
        for (const int64_t count : counts) R = std::max(R, count);
        rows = allocate(items_, {C, R});
        const size_t size = size_t(a.items.bytes);
        const char* from = static_cast<const char*>(a.rows);
        char* to = static_cast<char*>(rows.mutable_data_ptr());
        parallel_ranges(R > 0 ? C : 0, R, [&](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c) {
            const size_t filled = size * size_t(counts[size_t(c)]), all = size * size_t(R);
            std::memcpy(to + size_t(c) * all, from + size * size_t(c * N), filled);
            std::memset(to + size_t(c) * all + filled, 0xff, all - filled);  // -1
          }
        });
      },
      [&](auto stream) {
        Tensor largest = torch::stable::new_zeros(items_, {1}, ScalarType::Long);
        auto* count = static_cast<unsigned long long*>(largest.mutable_data_ptr());
        if (gpu::touched_needs_sort(a)) {
          const auto [sorted, order] = sort_stable(items_);
          gpu::touched_rows(a, sorted.const_data_ptr(),
                            static_cast<const int64_t*>(order.const_data_ptr()), C, count, stream);
        } else {
          gpu::touched_rows(a, nullptr, nullptr, C, count, stream);
        }
        Tensor filled = found;
        rows = torch::stable::contiguous(
            torch::stable::narrow(filled, 1, 0, int64_t(gpu::read_back(count, stream))));
      });
  return {rows, positions};
}

void accumulate_updates_(const Tensor& total, const Tensor& updates, const Tensor& weights,
                         const std::optional<Tensor>& rows, double grid) {
  const DType dtype = dtype_of(updates, "updates");
  check_value(updates.dim() >= 1, "updates: expected shape [C, ...], got ", shape_text(updates));
  const int64_t C = updates.size(0);
  const bool in_double = total.scalar_type() == ScalarType::Double;
  check_type(in_double || total.scalar_type() == updates.scalar_type(),
             "total: expected float64 or the dtype of updates (",
             torch::headeronly::toString(updates.scalar_type()), "), got ",
             torch::headeronly::toString(total.scalar_type()));
  check_same_device(updates, total, "updates", "total");
  check_weights(weights, C, total, "total");
  check_value(grid == 0.0 || in_double, "grid: expected 0 unless total is float64, got ", grid);

  AccumulateArgs a{};
  a.shift = shift_of(grid);
  a.clients = C;
  if (rows.has_value()) {
    check_dim(total, 2, "total", "[I, W]");
    check_dim(updates, 3, "updates", "[C, R, W]");
    check_size(updates, 2, total.size(1), "updates", "W, the width of total");
    check_dim(*rows, 2, "rows", "[C, R]");
    check_size(*rows, 0, C, "rows", "C, the clients of updates");
    check_size(*rows, 1, updates.size(1), "rows", "R, the rows of updates");
    check_same_device(*rows, total, "rows", "total");
    a.R = updates.size(1);
    a.num_rows = total.size(0);
    a.width = total.size(1);
  } else {
    bool ok = total.dim() == updates.dim() - 1;
    for (int64_t d = 0; ok && d < total.dim(); ++d) ok = total.size(d) == updates.size(d + 1);
    check_value(ok, "updates: expected the shape of total ", shape_text(total),
                " with C in front, got ", shape_text(updates));
    a.size = total.numel();
  }

  const Tensor total_ = dense(total), updates_ = dense(updates), weights_ = dense(weights);
  const std::optional<Tensor> rows_ = dense(rows);
  a.total = total_.mutable_data_ptr();
  a.updates = updates_.const_data_ptr();
  a.weights = static_cast<const double*>(weights_.const_data_ptr());
  if (rows_) a.rows = indices_of(*rows_, "rows");
  run_on(
      total,
      [&](auto) {
        const AggregateKernels& kernels = select_aggregate_kernels();
        if (rows_) {
          FirstError bad_row;  // before total is written
          parallel_ranges(C * a.R, 1, [&](int64_t begin, int64_t end) {
            kernels.check_rows(a, begin, end, &bad_row);
          });
          raise_bad_index(bad_row, a.rows, a.num_rows, "rows");
          const auto kernel = (in_double ? kernels.rows_double : kernels.rows)[int(dtype)];
          scatter_by_row(
              C * a.R, 1, a.num_rows, a.width,
              [&](int64_t entry, int64_t) { return a.rows[entry]; },
              [&](const int64_t* entries, int64_t count) { kernel(a, entries, count); });
        } else {
          const auto kernel = (in_double ? kernels.dense_double : kernels.dense)[int(dtype)];
          const int64_t blocks = (a.size + kAccumulateBlock - 1) / kAccumulateBlock;
          parallel_ranges(blocks, C * std::min(a.size, kAccumulateBlock),
                          [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
        }
      },
      [&](auto stream) {
        if (!rows_) {
          gpu::accumulate_dense(a, dtype, in_double, stream);
          return;
        }
        // A radix sort takes half as many passes over half as many bytes.
        const int key_bytes = a.num_rows <= INT32_MAX ? 4 : 8;
        Tensor keys =
            allocate(total_, {C * a.R}, key_bytes == 4 ? ScalarType::Int : ScalarType::Long);
        gpu::accumulate_keys(a, keys.mutable_data_ptr(), key_bytes, stream);
        const auto [sorted, order] = sort_stable(keys);
        gpu::accumulate_rows(a, dtype, in_double, sorted.const_data_ptr(), key_bytes,
                             static_cast<const int64_t*>(order.const_data_ptr()), stream);
      });
  if (!total.is_contiguous()) {
    Tensor target = total;
    torch::stable::copy_(target, total_);
  }
}

void apply_updates_(Tensor parameter, Tensor total, const std::optional<Tensor>& rows,
                    double scale) {
  const DType dtype = dtype_of(parameter, "parameter");
  check_value(parameter.dim() >= 1, "parameter: expected shape [I, ...], got []");
  check_same_shape(total, parameter, "total", "parameter");
  check_float64(total, "total");
  check_same_device(total, parameter, "total", "parameter");
  check_value(parameter.is_contiguous() && total.is_contiguous(),
              "parameter, total: expected contiguous tensors");
  ApplyArgs a{};
  a.parameter = parameter.mutable_data_ptr();
  a.total = static_cast<double*>(total.mutable_data_ptr());
  a.num_rows = parameter.size(0);
  a.width = a.num_rows ? parameter.numel() / a.num_rows : 0;
  a.scale = scale;
  int64_t n = a.num_rows;
  std::optional<Tensor> rows_;
  if (rows) {
    check_dim(*rows, 1, "rows", "[n]");
    check_same_device(*rows, parameter, "rows", "parameter");
    rows_ = dense(*rows);
    a.rows = indices_of(*rows_, "rows");
    n = rows->size(0);
  }
  run_on(
      parameter,
      [&](auto) {
        if (rows_) {
          FirstError bad_row;  // before anything is written
          for (int64_t i = 0; i < n; ++i) {
            if (classify(a.rows[i], a.num_rows) != Position::item) bad_row.report(i);
          }
          raise_bad_index(bad_row, a.rows, a.num_rows, "rows");
        }
        const auto kernel = select_aggregate_kernels().apply[int(dtype)];
        parallel_ranges(n, 2 * a.width, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::apply_updates(a, dtype, n, stream); });
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("touched_rows", TORCH_BOX(&touched_rows));
  m.impl("accumulate_updates_", TORCH_BOX(&accumulate_updates_));
  m.impl("apply_updates_", TORCH_BOX(&apply_updates_));
}

}  // namespace fedpeft
