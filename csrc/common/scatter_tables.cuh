// Sums of a scatter in tables of the blocks' own, in registers (common/scatter.h, `tables`).
//
// A block has a tile's gradient in shared memory, and the tile's list, while the next is copied. A
// group of lanes walks the pairs of each of its rows.
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
  const unsigned char* at;
  explicit SharedPlace(const void* p) : at(static_cast<const unsigned char*>(p)) {}
#endif
  FEDPEFT_DEVICE SharedPlace operator+(int bytes) const {
    SharedPlace moved = *this;
    moved.at += bytes;
    return moved;
  }
};

// Two 16-bit numbers, the first in the lower bits.
FEDPEFT_DEVICE uint32_t load_pair(SharedPlace p) {
  uint32_t pair;
#if defined(__CUDACC__)
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(pair) : "r"(p.at) : "memory");
#else
  std::memcpy(&pair, p.at, sizeof(pair));
#endif
  return pair;
}

template <typename T>
FEDPEFT_DEVICE Pack<T, kWide<T>> load_wide(SharedPlace p) {
#if defined(__CUDACC__)
  uint4 x;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(p.at)
               : "memory");
  return *reinterpret_cast<Pack<T, kWide<T>>*>(&x);
#else
  return load_pack<kWide<T>>(reinterpret_cast<const T*>(p.at));
#endif
}

// Rows of a group at most.
template <typename T>
constexpr int kGroupRows = ScatterTables::group_rows(int(sizeof(T)));

// The copies of a chunk's tiles into shared memory, one after the other: the gradient, behind which
// is a row of zeros; where the next tile's pairs lie; where the groups' pairs start; and the pairs.
template <typename T, int V>
struct TileCopies {
  static constexpr int W = kWide<T>;
  const T* grad;         // of the thread's first position of the next tile
  const uint16_t* list;  // the next tile's
  int left;              // positions from the next tile on
  int columns;           // of the slice from the thread's own on
  int group, range;

  // `bounds`: where the range's pairs begin in the list, and how many they are.
  FEDPEFT_DEVICE void operator()(unsigned char* stage, int column, uint32_t bounds,
                                 const ScatterPlan& plan) {
    const ScatterTables& tables = plan.tables;
    const int positions = left < tables.tile ? left : tables.tile;
    if (columns > 0) {
      const T* from = grad;
      unsigned char* to = stage + group * tables.stride + column * int(sizeof(T));
#pragma unroll 1
      for (int p = group; p < positions; p += tables.groups) {
        if constexpr (V == W) {
          copy_to_shared<V>(reinterpret_cast<T*>(to), from);
        } else {
#pragma unroll(sizeof(T) == 2 ? W : 1)
          for (int i = 0; i < W; ++i) {
            if (i < columns) copy_to_shared<1>(reinterpret_cast<T*>(to) + i, from + i);
          }
        }
        from += tables.groups * plan.width;
        to += tables.groups * tables.stride;
      }
    }
    uint16_t* const to = reinterpret_cast<uint16_t*>(stage + tables.list_place());
    const int thread = int(threadIdx.x), starts = tables.groups >> 1;
    if (thread == 0 && left > tables.tile) copy_to_shared<2>(to, list + 2 * (tables.pairs + range));
    if (thread < starts)
      copy_to_shared<2>(to + 2 * (1 + thread),
                        list + 2 * (tables.ranges + range * starts + thread));
    const int begin = int(bounds & 0xffff), count = int(bounds >> 16);
#pragma unroll 1
    for (int i = thread; i < count; i += ScatterTables::kThreads)
      copy_to_shared<2>(to + 2 * (1 + starts + i), list + 2 * (begin + i));
    commit_copies();
    grad += tables.tile * plan.width;
    list += 2 * tables.pairs;
    left -= tables.tile;
  }
};

// A block a chunk, range of rows and slice of columns.
template <typename T, int V>
__global__ void __launch_bounds__(ScatterTables::kThreads, 1)
    scatter_tables(const T* grad, const uint16_t* lists, acc_t<T>* partial, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int W = kWide<T>, kRows = kGroupRows<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(int64_t, result, 1);  // where the block's sums go
  const ScatterTables& tables = plan.tables;
  const int group = int(threadIdx.x) / tables.lanes;
  const int column = (int(threadIdx.x) - group * tables.lanes) * W;
  const int stage_bytes = int(tables.stage_bytes);
  const int parts = tables.slices * tables.ranges, chunk = int(blockIdx.x) / parts;
  const int part = int(blockIdx.x) - chunk * parts, range = part / tables.slices;
  const int64_t first_column = int64_t(part - range * tables.slices) * tables.slice;
  const int64_t right = plan.width - first_column;
  const int columns = int(right < tables.slice ? right : tables.slice) - column;
  const int range_row = range * tables.range_rows(), row = range_row + group * tables.each;
  const int rows = tables.rows - row < tables.each ? tables.rows - row : tables.each;
  const int owned = columns > 0 ? rows : 0;
  const int64_t first_tile = chunk * tables.chunk_tiles, first = first_tile * tables.tile;
  const int64_t behind = plan.positions - first, most = tables.chunk_tiles * tables.tile;
  if (threadIdx.x == 0)
    *result = (int64_t(chunk) * tables.rows + range_row) * plan.width + first_column;
  if (column < tables.slice && group < ScatterTables::kStages) {
    unsigned char* const zeros = shared + group * stage_bytes + tables.tile * tables.stride;
    store_pack<W>(reinterpret_cast<T*>(zeros) + column, zero_pack<W, T>());
  }

  TileCopies<T, V> copy{grad + (first + group) * plan.width + first_column + column,
                        lists + first_tile * tables.pairs * 2,
                        int(behind < most ? behind : most),
                        columns,
                        group,
                        range};
  const Pack<uint16_t, 2> bounds = load_pack<2>(copy.list + 2 * range);
  copy(shared, column, uint32_t(bounds.at[0]) | uint32_t(bounds.at[1]) << 16, plan);

  Sum<A, W> sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r].clear();
  int stage = 0;
  bool more_tiles;
#pragma unroll 1
  do {
    wait_for_copies<0>();
    __syncthreads();
    const SharedPlace here(shared + stage);
    const SharedPlace list = here + tables.list_place();
    more_tiles = copy.left > 0;
    if (more_tiles) copy(shared + (stage_bytes - stage), column, load_pair(list), plan);
    if (owned > 0) {
      const SharedPlace values = here + column * int(sizeof(T));
      const uint32_t starts = load_pair(list + (1 + group / 2) * 4);
      const int start = int(group % 2 == 1 ? starts >> 16 : starts & 0xffff);
      SharedPlace pairs = list + (1 + tables.groups / 2 + start) * 4;
      uint32_t next = load_pair(pairs);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= owned) break;
        uint32_t pair;
        do {
          pair = next;
          const int one = int(pair & (ScatterTables::kMore - 1)), other = int(pair >> 16);
          const Pack<T, W> value = load_wide<T>(values + one * tables.stride);
          const Pack<T, W> another = load_wide<T>(values + other * tables.stride);
          // After them, which would wait until its address is free; behind the last, for nothing.
          pairs = pairs + 4;
          next = load_pair(pairs);
          sums[r].add(value);
          sums[r].add(another);
        } while (pair & ScatterTables::kMore);
      }
    }
    stage = stage_bytes - stage;
  } while (more_tiles);

  A* to = partial + *result + int64_t(group * tables.each) * plan.width + column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= owned) break;
    if constexpr (V == W) {
      sums[r].store(to);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (i < columns) to[i] = sums[r].at[i];
      }
    }
    to += plan.width;
  }
}

// The tables of all chunks, added in order: eight ranges of chunks, then those. A thread a cell and
// range.
template <typename T>
__global__ void __launch_bounds__(256)
    scatter_total(const acc_t<T>* partial, T* out, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int kRanges = 8, kCells = 256 / kRanges, kBatch = 10;
  FEDPEFT_SHARED(A, sums, 256);
  const int range = int(threadIdx.x) / kCells, place = int(threadIdx.x) % kCells;
  const int64_t cells = plan.rows * plan.width, tables = plan.tables.chunks * plan.tables.copies;
  const int64_t each = (tables + kRanges - 1) / kRanges, begin = range * each;
  const int64_t end = begin + each < tables ? begin + each : tables;
  for (int64_t first = int64_t(blockIdx.x) * kCells; first < cells;
       first += int64_t(gridDim.x) * kCells) {
    const int64_t cell = first + place;
    A sum = 0;
    if (cell < cells) {
      for (int64_t table = begin; table < end; table += kBatch) {
        A value[kBatch];
#pragma unroll
        for (int j = 0; j < kBatch; ++j)
          value[j] = table + j < end ? partial[(table + j) * cells + cell] : A(0);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) sum += value[j];
      }
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
