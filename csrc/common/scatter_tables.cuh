// Sums of a scatter in tables of the blocks' own, in shared memory (common/scatter.h, `tables`).
//
// A thread owns a unit: a column of the rows that some slots read. It walks the positions of the
// block's chunk, a batch at a time: eight elements of the gradient, then, for two of its slots at a
// time, sixteen rows, whose cells it loads, adds to and stores. Units lie side by side, so that a
// thread meets its own bank whatever its row. A warp of its own copies gradient and rows a few
// tiles ahead.
#pragma once

#include "common/scatter.cuh"
#include "common/streaming.cuh"

namespace fedpeft::gpu {

// An address in shared memory, in one register on a GPU: from a pointer, the compiler makes it anew
// at each access.
struct SharedPlace {
#if defined(__CUDACC__)
  uint32_t at;
  FEDPEFT_DEVICE explicit SharedPlace(const void* p) : at(uint32_t(__cvta_generic_to_shared(p))) {
    asm volatile("" : "+r"(at));
  }
#else
  unsigned char* at;
  explicit SharedPlace(const void* p) : at(static_cast<unsigned char*>(const_cast<void*>(p))) {}
#endif
  FEDPEFT_DEVICE SharedPlace operator+(int bytes) const {
    SharedPlace moved = *this;
    moved.at += bytes;
    return moved;
  }
};

#if defined(__CUDACC__)
FEDPEFT_DEVICE float load_shared(SharedPlace p, float) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(p.at) : "memory");
  return x;
}
FEDPEFT_DEVICE double load_shared(SharedPlace p, double) {
  double x;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(x) : "r"(p.at) : "memory");
  return x;
}
template <typename T>
FEDPEFT_DEVICE T load_shared(SharedPlace p, T) {
  T x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x.bits) : "r"(p.at) : "memory");
  return x;
}
FEDPEFT_DEVICE Pack<uint32_t, 4> load_shared(SharedPlace p, Pack<uint32_t, 4>) {
  Pack<uint32_t, 4> x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "r"(p.at)
               : "memory");
  return x;
}
FEDPEFT_DEVICE void store_shared(SharedPlace p, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(p.at), "f"(x) : "memory");
}
FEDPEFT_DEVICE void store_shared(SharedPlace p, double x) {
  asm volatile("st.shared.f64 [%0], %1;" ::"r"(p.at), "d"(x) : "memory");
}
#else
template <typename T>
T load_shared(SharedPlace p, T x) {
  if (reinterpret_cast<uintptr_t>(p.at) % alignof(T))
    throw emulator::Fault("misaligned access to shared memory");
  std::memcpy(&x, p.at, sizeof(T));
  return x;
}
template <typename T>
void store_shared(SharedPlace p, T x) {
  if (reinterpret_cast<uintptr_t>(p.at) % alignof(T))
    throw emulator::Fault("misaligned access to shared memory");
  std::memcpy(p.at, &x, sizeof(T));
}
#endif

// Rows of a batch in one slot, two a word, with marks (scatter_rows).
struct BatchRows {
  static constexpr unsigned kMarks = 3 * ScatterTables::kRowLimit;
  Pack<uint32_t, ScatterTables::kBatch / 2> pack;

  // What lies behind `end`, where copies may be under way, is read for nothing.
  FEDPEFT_DEVICE void load(SharedPlace from, [[maybe_unused]] SharedPlace end) {
#if !defined(__CUDACC__)
    const emulator::races::Unseen unseen(from.at >= end.at);
#endif
    pack = load_shared(from, pack);
  }
  FEDPEFT_DEVICE int row(int j) const {
    const uint32_t word = pack.at[j / 2];
    return int(j % 2 == 1 ? word >> 16 : word & (ScatterTables::kRowLimit - 1));
  }
  FEDPEFT_DEVICE bool lost(int j) const {
    return (pack.at[j / 2] & unsigned(ScatterTables::kRowLimit << j % 2)) != 0;
  }
  FEDPEFT_DEVICE bool any_lost() const {
    return ((pack.at[0] | pack.at[1] | pack.at[2] | pack.at[3]) & kMarks) != 0;
  }
  FEDPEFT_DEVICE bool many_lost() const {
    return (pack.at[0] & pack.at[1] & pack.at[2] & pack.at[3] & kMarks) == kMarks;
  }
};

// A thread's cells, a row every so many bytes.
template <typename A>
struct Cells {
  static constexpr int N = ScatterTables::kBatch;
  SharedPlace first;
  int stride;

  FEDPEFT_DEVICE SharedPlace at(int row) const { return first + row * stride; }
  FEDPEFT_DEVICE void load(const BatchRows& rows, A (&sum)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] = load_shared(at(rows.row(j)), A());
  }
  FEDPEFT_DEVICE void store(const BatchRows& rows, const A (&sum)[N]) const {
#pragma unroll
    for (int j = 0; j < N; ++j) store_shared(at(rows.row(j)), sum[j]);
  }
  // Where many rows come again: each takes over from its place before, and is stored over it.
  FEDPEFT_DEVICE void add_many_lost(const BatchRows& rows, const A (&value)[N]) const {
    A sum[N];
    load(rows, sum);
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int i = 0; i < j; ++i) sum[j] = rows.row(i) == rows.row(j) ? sum[i] : sum[j];
      sum[j] += value[j];
    }
    store(rows, sum);
  }
  // What was stored over in a few rows that came again.
  FEDPEFT_DEVICE void add_lost(const BatchRows& rows, const A (&value)[N]) const {
    if (!rows.any_lost()) return;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!rows.lost(j)) continue;
      const SharedPlace place = at(rows.row(j));
      store_shared(place, load_shared(place, A()) + value[j]);
    }
  }
  FEDPEFT_DEVICE void add(const BatchRows& rows, const A (&value)[N]) const {
    if (rows.many_lost()) {
      add_many_lost(rows, value);
      return;
    }
    A sum[N];
    load(rows, sum);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] += value[j];
    store(rows, sum);
    add_lost(rows, value);
  }
  // In two slots at once.
  FEDPEFT_DEVICE void add(const BatchRows& rows, const BatchRows& others,
                          const A (&value)[N]) const {
    const bool lost = rows.any_lost() || others.any_lost();
    if (lost && (rows.many_lost() || others.many_lost())) {
      add_many_lost(rows, value);
      add_many_lost(others, value);
      return;
    }
    A sum[N], other[N];
    load(rows, sum);
    load(others, other);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sum[j] += value[j];
      other[j] += value[j];
    }
    store(rows, sum);
    store(others, other);
    if (!lost) return;
    add_lost(rows, value);
    add_lost(others, value);
  }
};

// The copies of tiles into shared memory, one after the other, by one warp: a lane's columns of
// every so many-th position, and its rows.
template <typename T, int V>
struct TileCopies {
  static constexpr int kRows = 16 / int(sizeof(uint16_t));
  const T* grad;
  const uint16_t* rows;
  int64_t step, tile_step, left;  // left: positions from the next tile on
  int lanes, lane, group, groups, column, columns, slice, tile, count;

  FEDPEFT_DEVICE TileCopies(const T* grad_, const uint16_t* rows_, const ScatterPlan& plan,
                            int64_t first_tile, int64_t first_column, int columns_)
      : lanes(lanes_for(columns_ / V)),
        lane(int(threadIdx.x) % kWarp),
        group(lane / lanes),
        groups(kWarp / lanes),
        column(lane % lanes * V),
        columns(columns_),
        slice(plan.tables.slice),
        tile(plan.tables.tile()),
        count(int(plan.slots) << plan.tables.tile_bits) {
    const int64_t first = first_tile << plan.tables.tile_bits;
    grad = grad_ + (first + group) * plan.width + first_column + column;
    rows = rows_ + first_tile * count + lane * kRows;
    step = groups * plan.width;
    tile_step = tile * plan.width;
    left = plan.positions - first;
  }

  FEDPEFT_DEVICE void operator()(T* to, uint16_t* to_rows) {
    const int positions = int(left < tile ? left : tile);
    const T* from = grad;
    to += group * slice + column;
    if (columns <= lanes * V) {
      if (column < columns) {
#pragma unroll 4
        for (int p = group; p < positions; p += groups) {
          copy_to_shared<V>(to, from);
          from += step;
          to += groups * slice;
        }
      }
    } else {
#pragma unroll 1
      for (int p = group; p < positions; p += groups) {
#pragma unroll 1
        for (int more = 0; column + more < columns; more += lanes * V)
          copy_to_shared<V>(to + more, from + more);
        from += step;
        to += groups * slice;
      }
    }
#pragma unroll 1
    for (int i = 0; lane * kRows + i < count; i += kWarp * kRows)
      copy_to_shared<kRows>(to_rows + lane * kRows + i, rows + i);
    grad += tile_step;
    rows += count;
    left -= tile;
  }
};

// A block a chunk of positions and slice of columns.
template <typename T, int V>
__global__ void __launch_bounds__(ScatterTables::kMaxThreads, 1)
    scatter_tables(const T* grad, const uint16_t* rows, acc_t<T>* partial, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int kStages = ScatterTables::kStages, kBatch = ScatterTables::kBatch;
  constexpr int kRowsBytes = kBatch * int(sizeof(uint16_t));
  FEDPEFT_DYNAMIC_SHARED(shared);
  const ScatterTables& tables = plan.tables;
  const int units = tables.units, slice = tables.slice, tile = tables.tile();
  const int64_t chunk = divide(blockIdx.x, tables.slices);
  const int64_t first_column = (blockIdx.x - chunk * tables.slices) * slice;
  const int columns = int(plan.width - first_column < slice ? plan.width - first_column : slice);
  const int part = int(threadIdx.x) / slice, column = int(threadIdx.x) - part * slice;
  const bool owns = part < tables.parts && column < columns;
  const Cells<A> cells{SharedPlace(shared + threadIdx.x * sizeof(A)), units * int(sizeof(A))};

  const int64_t begin = chunk * tables.chunk_tiles, left = tables.tiles - begin;
  const int count = int(left < tables.chunk_tiles ? left : tables.chunk_tiles);
  // A stage: the gradient, then the rows.
  unsigned char* const stages = shared + tables.table_bytes;
  const int stage_bytes = int(tables.stage_bytes);
  const int rows_bytes = int(plan.slots) * 2 << tables.tile_bits;
  TileCopies<T, V> copies(grad, rows, plan, begin, first_column, columns);
  const bool copier = threadIdx.x / kWarp == blockDim.x / kWarp - 1;
  const auto copy = [&](int t) {
    if (t < count) {
      unsigned char* const stage = stages + t % kStages * stage_bytes;
      copies(reinterpret_cast<T*>(stage),
             reinterpret_cast<uint16_t*>(stage + stage_bytes - rows_bytes));
    }
    commit_copies();
  };
  if (copier) {
#pragma unroll 1
    for (int t = 0; t < kStages - 1; ++t) copy(t);
  }
  if (owns) {
#pragma unroll 8
    for (int r = 0; r <= tables.part_rows; ++r) store_shared(cells.at(r), A(0));
  }

  const SharedPlace values(stages + column * sizeof(T));
  const int part_bytes = part * tables.part_slots * 2 << tables.tile_bits;
  const SharedPlace lists(stages + stage_bytes - rows_bytes + part_bytes);
  const int value_bytes = slice * int(sizeof(T)), slots = tables.part_slots;
#pragma unroll 1
  for (int t = 0; t < count; ++t) {
    if (copier) wait_for_copies<kStages - 2>();
    __syncthreads();
    if (copier) copy(t + kStages - 1);  // where the tile before was
    if (!owns) continue;
    SharedPlace from = values + t % kStages * stage_bytes;
    SharedPlace list = lists + t % kStages * stage_bytes;
    BatchRows rows_now, others_now;
    const SharedPlace end = list + (rows_bytes - part_bytes);
    rows_now.load(list, end);
    others_now.load(list + kRowsBytes, end);
#pragma unroll 1
    for (int p = 0; p < tile; p += kBatch) {
      A value[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        value[j] = to_acc(load_shared(from, T()));
        from = from + value_bytes;
      }
#pragma unroll 1
      for (int slot = 0; slot < slots; slot += 2) {
        // The rows of the next step, or what follows the last, while this one's are added.
        const bool both = slot + 1 < slots;
        list = list + (both ? 2 * kRowsBytes : kRowsBytes);
        BatchRows rows_next, others_next;
        rows_next.load(list, end);
        others_next.load(list + kRowsBytes, end);
        if (both) {
          cells.add(rows_now, others_now, value);
        } else {
          cells.add(rows_now, value);
        }
        rows_now = rows_next;
        others_now = others_next;
      }
    }
  }

  if (!owns) return;
  A* to = partial + (chunk * plan.rows + int64_t(part) * tables.part_rows) * plan.width +
          first_column + column;
#pragma unroll 8
  for (int r = 0; r < tables.part_rows; ++r) to[r * plan.width] = load_shared(cells.at(r), A());
}

// The tables of all chunks, added in order: four ranges of chunks, then those. A thread a cell and
// range.
template <typename T>
__global__ void __launch_bounds__(256)
    scatter_total(const acc_t<T>* partial, T* out, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int kRanges = 4, kCells = 256 / kRanges;
  FEDPEFT_SHARED(A, sums, 256);
  const int range = int(threadIdx.x) / kCells, place = int(threadIdx.x) % kCells;
  const int64_t cells = plan.rows * plan.width, chunks = plan.tables.chunks;
  const int64_t each = (chunks + kRanges - 1) / kRanges, begin = range * each;
  const int64_t end = begin + each < chunks ? begin + each : chunks;
  for (int64_t first = int64_t(blockIdx.x) * kCells; first < cells;
       first += int64_t(gridDim.x) * kCells) {
    const int64_t cell = first + place;
    A sum = 0;
    if (cell < cells) {
#pragma unroll 8
      for (int64_t chunk = begin; chunk < end; ++chunk) sum += partial[chunk * cells + cell];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (range == 0 && cell < cells) {
#pragma unroll
      for (int r = 1; r < kRanges; ++r) sum += sums[r * kCells + place];
      out[cell] = from_acc<T>(sum * A(plan.scale));
    }
    __syncthreads();
  }
}

}  // namespace fedpeft::gpu
