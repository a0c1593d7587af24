// Between clients and the server on the CPU: which rows a client touches, and the weighted sum of
// updates.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kAccumulateBlock = 1024;  // elements of a work item

struct TouchedRowsArgs {
  IndexArray items;  // [C, N]
  void* rows;        // [C, N] of the type of items: the first counts[c] are filled
  void* positions;   // [C, N] of the type of items: index into the client's rows, -1 at padding
  int64_t* counts;   // [C]
  int64_t N;
  FirstError* bad_item;  // an item below -1
};

struct AccumulateArgs {
  void* total;            // [size], or [num_rows, width]
  const void* updates;    // [C, size], or [C, R, width]
  const double* weights;  // [C]
  double shift;           // 1.5 * 2^52 * grid: x + shift - shift rounds x to the grid; 0 leaves x
  IndexArray rows;        // [C, R] with rows
  int64_t clients, size;
  int64_t R, num_rows, width;
};

struct ApplyArgs {
  void* parameter;  // [num_rows, width]
  double* total;    // the same
  IndexArray rows;  // [n], distinct; null: all
  int64_t num_rows, width;
  double scale;
};

struct AggregateKernels {
  // Bytes of scratch for a task.
  int64_t (*touched_scratch)(const TouchedRowsArgs&);
  // Clients [begin, end); scratch is aligned to 8 bytes.
  void (*touched)(const TouchedRowsArgs&, int64_t begin, int64_t end, void* scratch);

  // Blocks [begin, end) of kAccumulateBlock elements. A total of the type of updates, or of
  // float64.
  void (*dense[kDTypes])(const AccumulateArgs&, int64_t begin, int64_t end);
  void (*dense_double[kDTypes])(const AccumulateArgs&, int64_t begin, int64_t end);
  // Entries (c * R + r), in this order; null stands for 0 .. count - 1. Rows are within bounds or
  // -1.
  void (*rows[kDTypes])(const AccumulateArgs&, const int64_t* entries, int64_t count);
  void (*rows_double[kDTypes])(const AccumulateArgs&, const int64_t* entries, int64_t count);
  // Reports entries [begin, end) whose row is out of range.
  void (*check_rows)(const AccumulateArgs&, int64_t begin, int64_t end, FirstError* bad_row);
  // Rows [begin, end), or places of `rows`.
  void (*apply[kDTypes])(const ApplyArgs&, int64_t begin, int64_t end);
};

FEDPEFT_DECLARE_KERNELS(AggregateKernels, aggregate_kernels)

}  // namespace fedpeft
