// CUDA kernels of touched_rows (a block a client, over its sorted items), accumulate_updates_ (a
// thread an element, clients in order; with rows a group of lanes a row, over entries sorted by
// row) and apply_updates_ (one pass, a thread a few elements).
#include "aggregate/aggregate_cuda.h"
#include "common/block.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

// Lists up to so long are sorted in shared memory.
constexpr int64_t kShortList = 4096;

// `sorted` items ascending, `order` their places in the client's list.
template <typename Item, typename Place>
FEDPEFT_DEVICE void touched_of(const TouchedRowsArgs& a, int64_t c, const Item* sorted,
                               const Place* order, int* starts, unsigned long long* largest) {
  Item* rows = static_cast<Item*>(a.rows) + c * a.N;
  Item* positions = static_cast<Item*>(a.positions) + c * a.N;
  int64_t found = 0;  // distinct items before this chunk
  for (int64_t first = 0; first < a.N; first += kThreads) {
    const int64_t i = first + threadIdx.x;
    const Item item = i < a.N ? sorted[i] : Item(-1);
    if (item < -1) FEDPEFT_BAD_INDEX("items", item, c * a.N + order[i], INT64_MAX);
    const bool begins = item >= 0 && (i == 0 || sorted[i - 1] != item);
    int all = 0;
    const int before = block_rank(begins, starts, &all);
    const int64_t row = found + before + begins - 1;
    if (begins) rows[row] = item;
    if (i < a.N) positions[order[i]] = item >= 0 ? Item(row) : Item(-1);
    found += all;
  }
  for (int64_t r = found + threadIdx.x; r < a.N; r += kThreads) rows[r] = -1;
  if (threadIdx.x == 0) atomicMax(largest, static_cast<unsigned long long>(found));
}

template <typename Item>
__global__ void __launch_bounds__(kThreads, 4)
    touched(TouchedRowsArgs a, const Item* sorted, const int64_t* order, int64_t clients,
            unsigned long long* largest) {
  FEDPEFT_SHARED(int, starts, kWarps);
  for (int64_t c = blockIdx.x; c < clients; c += gridDim.x)
    touched_of(a, c, sorted + c * a.N, order + c * a.N, starts, largest);
}

template <typename Item>
__global__ void __launch_bounds__(kThreads, 4)
    touched_short(TouchedRowsArgs a, int64_t clients, unsigned long long* largest) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int N = int(a.N);
  Item* items = reinterpret_cast<Item*>(shared);
  int* places = reinterpret_cast<int*>(items + N);
  int* starts = places + N;
  for (int64_t c = blockIdx.x; c < clients; c += gridDim.x) {
    for (int i = int(threadIdx.x); i < N; i += kThreads) {
      items[i] = static_cast<const Item*>(a.items.data)[c * N + i];
      places[i] = i;
    }
    __syncthreads();
    block_sort(items, places, N);
    touched_of(a, c, items, places, starts, largest);
    __syncthreads();
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

// A client's value is a thread's only load, so that many are under way while those before are added
// in order; small blocks, so that a small total reaches all multiprocessors.
constexpr int kDenseThreads = 64, kAhead = 32;

template <typename Total, typename T>
__global__ void __launch_bounds__(kDenseThreads) dense(AccumulateArgs a) {
  Total* total = static_cast<Total*>(a.total);
  for (int64_t i = int64_t(blockIdx.x) * kDenseThreads + threadIdx.x; i < a.size;
       i += int64_t(gridDim.x) * kDenseThreads) {
    const T* updates = static_cast<const T*>(a.updates) + i;
    acc_t<Total> sum = to_acc(total[i]);
    T now[kAhead], next[kAhead];
    const auto load = [&](int64_t client) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) next[k] = updates[(client + k) * a.size];
    };
    int64_t c = 0;
    if (a.clients >= kAhead) load(0);
    for (; c + kAhead <= a.clients; c += kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) now[k] = next[k];
      if (c + 2 * kAhead <= a.clients) load(c + kAhead);
#pragma unroll
      for (int k = 0; k < kAhead; ++k) add(sum, a.weights[c + k], to_acc(now[k]), a.shift);
    }
#pragma unroll 4
    for (; c < a.clients; ++c) add(sum, a.weights[c], to_acc(updates[c * a.size]), a.shift);
    store_sum(total + i, sum);
  }
}

template <typename Key>
__global__ void __launch_bounds__(kThreads, 4) write_keys(AccumulateArgs a, Key* keys) {
  const int64_t entries = a.clients * a.R;
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < entries;
       e += int64_t(gridDim.x) * kThreads) {
    const int64_t row = a.rows[e];
    if (classify(row, a.num_rows) == Position::bad) FEDPEFT_BAD_INDEX("rows", row, e, a.num_rows);
    keys[e] = Key(row < 0 ? a.num_rows : row);
  }
}

// A group of lanes an entry, V columns a lane; those of the first entry of a row add the whole row.
template <typename Total, typename T, typename Key, int V>
__global__ void __launch_bounds__(kThreads, 4)
    add_rows(AccumulateArgs a, const Key* keys, const int64_t* order) {
  const int64_t entries = a.clients * a.R, columns = a.width / V;
  for_rows(entries, columns, [&](int64_t e, int lane, int lanes) {
    const int64_t row = keys[e];
    if (row == a.num_rows || (e > 0 && keys[e - 1] == row)) return;
    Total* total = static_cast<Total*>(a.total) + row * a.width;
    for (int64_t column = int64_t(lane) * V; column < a.width; column += int64_t(lanes) * V) {
      Sum<acc_t<Total>, V> sum;
      sum.set(total + column);
      for (int64_t i = e; i < entries && keys[i] == row; ++i) {
        const int64_t entry = order[i];
        const Pack<T, V> update =
            load_pack<V>(static_cast<const T*>(a.updates) + entry * a.width + column);
        const double weight = a.weights[divide(entry, a.R)];
#pragma unroll
        for (int v = 0; v < V; ++v) add(sum.at[v], weight, to_acc(update.at[v]), a.shift);
      }
      sum.store(total + column);
    }
  });
}

// A group of lanes a row, V columns a lane. Rounds as the CPU does: the step, then the sum.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, 4) apply(ApplyArgs a, int64_t count) {
  for_rows(count, a.width / V, [&](int64_t i, int lane, int lanes) {
    int64_t row = i;
    if (a.rows.data) {
      row = a.rows[i];
      if (classify(row, a.num_rows) != Position::item)
        FEDPEFT_BAD_INDEX("rows", row, i, a.num_rows);
    }
    T* parameter = static_cast<T*>(a.parameter) + row * a.width;
    double* total = a.total + row * a.width;
    for (int64_t column = int64_t(lane) * V; column < a.width; column += int64_t(lanes) * V) {
      const Pack<double, V> sum = load_pack<V>(total + column);
      Pack<T, V> value = load_pack<V>(parameter + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T step = from_acc<T>(acc_t<T>(sum.at[v] * a.scale));
        value.at[v] = from_acc<T>(to_acc(value.at[v]) + to_acc(step));
      }
      store_pack<V>(parameter + column, value);
      store_pack<V>(total + column, zero_pack<V, double>());
    }
  });
}

bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

template <typename Key>
void accumulate_sorted(const AccumulateArgs& a, DType dtype, bool in_double, const void* sorted,
                       const int64_t* order, Stream stream) {
  const auto run = [&](auto total, auto zero, auto width) {
    constexpr int V = decltype(width)::value;
    using T = decltype(zero);
    launch_rows(add_rows<decltype(total), T, Key, V>, a.clients * a.R, a.width / V, stream, a,
                static_cast<const Key*>(sorted), order);
  };
  const auto run_wide = [&](auto total, auto zero) {
    constexpr int V = sizeof(zero) == 8 ? 2 : 4;
    if (a.width % V == 0 && aligned(a.updates, V * sizeof(zero)) &&
        aligned(a.total, V * sizeof(total))) {
      run(total, zero, std::integral_constant<int, V>{});
    } else {
      run(total, zero, std::integral_constant<int, 1>{});
    }
  };
  with_dtype(dtype, [&](auto zero) {
    if (in_double) {
      run_wide(double{}, zero);
    } else {
      run_wide(zero, zero);
    }
  });
}

}  // namespace

bool touched_needs_sort(const TouchedRowsArgs& a) { return a.N > kShortList; }

void touched_rows(const TouchedRowsArgs& a, const void* sorted, const int64_t* order,
                  int64_t clients, unsigned long long* largest, Stream stream) {
  const auto run = [&](auto zero) {
    using Item = decltype(zero);
    if (sorted) {
      launch(touched<Item>, clients, kThreads, 0, stream, a, static_cast<const Item*>(sorted),
             order, clients, largest);
    } else {
      const int64_t shared =
          a.N * int64_t(sizeof(Item) + sizeof(int)) + kWarps * int64_t(sizeof(int));
      launch(touched_short<Item>, clients, kThreads, shared, stream, a, clients, largest);
    }
  };
  a.items.bytes == 8 ? run(int64_t{}) : run(int32_t{});
}

unsigned long long read_back(const unsigned long long* value, Stream stream) {
  unsigned long long result = 0;
  copy_to_host(&result, value, sizeof(result), stream);
  return result;
}

void accumulate_dense(const AccumulateArgs& a, DType dtype, bool in_double, Stream stream) {
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(in_double ? dense<double, T> : dense<T, T>, (a.size + kDenseThreads - 1) / kDenseThreads,
           kDenseThreads, 0, stream, a);
  });
}

void accumulate_keys(const AccumulateArgs& a, void* keys, int key_bytes, Stream stream) {
  const int64_t grid = (a.clients * a.R + kThreads - 1) / kThreads;
  if (key_bytes == 4) {
    launch(write_keys<int32_t>, grid, kThreads, 0, stream, a, static_cast<int32_t*>(keys));
  } else {
    launch(write_keys<int64_t>, grid, kThreads, 0, stream, a, static_cast<int64_t*>(keys));
  }
}

void accumulate_rows(const AccumulateArgs& a, DType dtype, bool in_double, const void* sorted,
                     int key_bytes, const int64_t* order, Stream stream) {
  if (a.width == 0) return;
  if (key_bytes == 4) {
    accumulate_sorted<int32_t>(a, dtype, in_double, sorted, order, stream);
  } else {
    accumulate_sorted<int64_t>(a, dtype, in_double, sorted, order, stream);
  }
}

void apply_updates(const ApplyArgs& given, DType dtype, int64_t count, Stream stream) {
  if (given.width == 0) return;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    constexpr int V = sizeof(T) == 8 ? 2 : 4;
    ApplyArgs a = given;
    int64_t rows = count;
    const int64_t along = a.rows.data ? a.width : a.width * count;
    const bool wide = along % V == 0 && aligned(a.parameter, V * sizeof(T)) &&
                      aligned(a.total, V * sizeof(double));
    if (!a.rows.data) {  // elements, whatever the rows
      a.width = wide ? V : 1;
      rows = along / a.width;
    }
    if (wide) {
      launch_rows(apply<T, V>, rows, a.width / V, stream, a, rows);
    } else {
      launch_rows(apply<T, 1>, rows, a.width, stream, a, rows);
    }
  });
}

}  // namespace fedpeft::gpu
