// Between clients and the server on the GPU; the arguments are those of the CPU.
#pragma once

#include "aggregate/aggregate_cpu.h"
#include "common/gpu.h"

namespace fedpeft::gpu {

// Whether lists are too long to be sorted by touched_rows.
bool touched_needs_sort(const TouchedRowsArgs& a);
// touched_rows, where it needs a sort from each client's items sorted ascending and their original
// places, else from null: fills a.rows (-1 after the last), a.positions, and the largest number of
// rows of a client, which must be 0 before.
void touched_rows(const TouchedRowsArgs& a, const void* sorted, const int64_t* order,
                  int64_t clients, unsigned long long* largest, Stream stream);
// Waits for the stream and reads a number.
unsigned long long read_back(const unsigned long long* value, Stream stream);

void accumulate_dense(const AccumulateArgs& a, DType dtype, bool in_double, Stream stream);
// With rows: `keys` [C * R], integers of key_bytes (4 or 8), get each entry's row (padding:
// num_rows), to be sorted stably; every row is then summed in the order of entries.
void accumulate_keys(const AccumulateArgs& a, void* keys, int key_bytes, Stream stream);
void accumulate_rows(const AccumulateArgs& a, DType dtype, bool in_double, const void* sorted,
                     int key_bytes, const int64_t* order, Stream stream);

// At `count` places of a.rows, or everywhere.
void apply_updates(const ApplyArgs& a, DType dtype, int64_t count, Stream stream);

}  // namespace fedpeft::gpu
