// CUDA kernels of touched_rows (a block a client, over its sorted items) and accumulate_updates_ (a
// thread an element, clients in order; with rows a group of lanes a row, over entries sorted by
// row).
#include "aggregate/aggregate_cuda.h"
#include "common/block.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

template <typename Item>
__global__ void __launch_bounds__(kThreads, 4)
    touched(TouchedRowsArgs a, const Item* sorted, const int64_t* order, int64_t clients,
            unsigned long long* largest) {
  FEDPEFT_SHARED(int, starts, kWarps);
  for (int64_t c = blockIdx.x; c < clients; c += gridDim.x) {
    const Item* items = sorted + c * a.N;
    Item* rows = static_cast<Item*>(a.rows) + c * a.N;
    Item* positions = static_cast<Item*>(a.positions) + c * a.N;
    int64_t found = 0;  // distinct items before this chunk
    for (int64_t first = 0; first < a.N; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      const Item item = i < a.N ? items[i] : Item(-1);
      if (item < -1) FEDPEFT_BAD_INDEX("items", item, c * a.N + order[c * a.N + i], INT64_MAX);
      const bool begins = item >= 0 && (i == 0 || items[i - 1] != item);
      int all = 0;
      const int before = block_rank(begins, starts, &all);
      const int64_t row = found + before + begins - 1;
      if (begins) rows[row] = item;
      if (i < a.N) positions[order[c * a.N + i]] = item >= 0 ? Item(row) : Item(-1);
      found += all;
    }
    for (int64_t r = found + threadIdx.x; r < a.N; r += kThreads) rows[r] = -1;
    if (threadIdx.x == 0) atomicMax(largest, static_cast<unsigned long long>(found));
  }
}

// As on the CPU: a sum in the type of total, or in float32 where that has 16 bits; a grid comes
// with float64 totals only.
FEDPEFT_DEVICE void add(double& sum, double weight, double x, double shift) {
  sum += (weight * x + shift) - shift;
}
FEDPEFT_DEVICE void add(float& sum, double weight, float x, double) { sum += float(weight) * x; }

template <typename Total>
FEDPEFT_DEVICE void store_sum(Total* total, acc_t<Total> sum) {
  if constexpr (sizeof(Total) == sizeof(acc_t<Total>)) {
    *total = sum;
  } else {
    *total = from_acc<Total>(sum);
  }
}

template <typename Total, typename T>
__global__ void __launch_bounds__(kThreads, 4) dense(AccumulateArgs a) {
  Total* total = static_cast<Total*>(a.total);
  const T* updates = static_cast<const T*>(a.updates);
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < a.size;
       i += int64_t(gridDim.x) * kThreads) {
    acc_t<Total> sum = to_acc(total[i]);
#pragma unroll 8
    for (int64_t c = 0; c < a.clients; ++c)
      add(sum, a.weights[c], to_acc(updates[c * a.size + i]), a.shift);
    store_sum(total + i, sum);
  }
}

__global__ void __launch_bounds__(kThreads, 4) write_keys(AccumulateArgs a, int64_t* keys) {
  const int64_t entries = a.clients * a.R;
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < entries;
       e += int64_t(gridDim.x) * kThreads) {
    const int64_t row = a.rows[e];
    if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, e, a.num_rows);
    keys[e] = row < 0 ? a.num_rows : row;
  }
}

// A group of lanes an entry; those of the first entry of a row add the whole row.
template <typename Total, typename T>
__global__ void __launch_bounds__(kThreads, 4)
    add_rows(AccumulateArgs a, const int64_t* keys, const int64_t* order) {
  const int64_t entries = a.clients * a.R;
  for_rows(entries, a.width, [&](int64_t e, int lane, int lanes) {
    const int64_t row = keys[e];
    if (row == a.num_rows || (e > 0 && keys[e - 1] == row)) return;
    Total* total = static_cast<Total*>(a.total) + row * a.width;
    for (int64_t column = lane; column < a.width; column += lanes) {
      acc_t<Total> sum = to_acc(total[column]);
      for (int64_t i = e; i < entries && keys[i] == row; ++i) {
        const int64_t entry = order[i];
        const T update = static_cast<const T*>(a.updates)[entry * a.width + column];
        add(sum, a.weights[divide(entry, a.R)], to_acc(update), a.shift);
      }
      store_sum(total + column, sum);
    }
  });
}

}  // namespace

void touched_rows(const TouchedRowsArgs& a, const void* sorted, const int64_t* order,
                  int64_t clients, unsigned long long* largest, Stream stream) {
  if (a.items.bytes == 8) {
    launch(touched<int64_t>, clients, kThreads, 0, stream, a, static_cast<const int64_t*>(sorted),
           order, clients, largest);
  } else {
    launch(touched<int32_t>, clients, kThreads, 0, stream, a, static_cast<const int32_t*>(sorted),
           order, clients, largest);
  }
}

unsigned long long read_back(const unsigned long long* value, Stream stream) {
  unsigned long long result = 0;
  copy_to_host(&result, value, sizeof(result), stream);
  return result;
}

void accumulate_dense(const AccumulateArgs& a, DType dtype, bool in_double, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(in_double ? dense<double, T> : dense<T, T>, (a.size + kThreads - 1) / kThreads, kThreads,
           0, stream, a);
  });
}

void accumulate_keys(const AccumulateArgs& a, int64_t* keys, Stream stream) {
  launch(write_keys, (a.clients * a.R + kThreads - 1) / kThreads, kThreads, 0, stream, a, keys);
}

void accumulate_rows(const AccumulateArgs& a, DType dtype, bool in_double, const int64_t* sorted,
                     const int64_t* order, Stream stream) {
  if (a.width == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_rows(in_double ? add_rows<double, T> : add_rows<T, T>, a.clients * a.R, a.width, stream,
                a, sorted, order);
  });
}

}  // namespace fedpeft::gpu
