// Between clients and the server on the GPU; the arguments are those of the CPU.
#pragma once

#include "aggregate/aggregate_cpu.h"
#include "common/gpu.h"

namespace fedpeft::gpu {

// touched_rows from each client's items sorted ascending and their original places: fills a.rows
// (-1 after the last), a.positions, and the largest number of rows of a client, which must be 0
// before.
void touched_rows(const TouchedRowsArgs& a, const void* sorted, const int64_t* order,
                  int64_t clients, unsigned long long* largest, Stream stream);
// Waits for the stream and reads a number.
unsigned long long read_back(const unsigned long long* value, Stream stream);

void accumulate_dense(const AccumulateArgs& a, DType dtype, bool in_double, Stream stream);
// With rows: `keys` [C * R] of int64 get each entry's row (padding: num_rows), to be sorted stably;
// every row is then summed in the order of entries.
void accumulate_keys(const AccumulateArgs& a, int64_t* keys, Stream stream);
void accumulate_rows(const AccumulateArgs& a, DType dtype, bool in_double, const int64_t* sorted,
                     const int64_t* order, Stream stream);

}  // namespace fedpeft::gpu
