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
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(p.at) : "memory");
#else
  std::memcpy(&pair, p.at, sizeof(pair));
#endif
  return pair;
}

FEDPEFT_DEVICE int first_of(uint32_t pair) { return int(pair & (ScatterTables::kMore - 1)); }
FEDPEFT_DEVICE int second_of(uint32_t pair) { return int(pair >> 16); }

template <typename T>
FEDPEFT_DEVICE Pack<T, kWide<T>> load_wide(SharedPlace p) {
#if defined(__CUDACC__)
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
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

// Whether 64 registers hold the next values beside the sums.
template <typename T, int V>
constexpr bool kValuesAhead = sizeof(T) == 4 && V == kWide<T>;

// Copies a tile into shared memory: the gradient, behind which is a row of zeros; where the next
// tile's pairs lie; where the groups' pairs start; and the pairs. `grad` is the block's
// slice of the tile, of `right` columns, `list` the tile's list, `more` whether another tile
// follows, and `bounds` where the range's pairs begin in the list, and how many they are. What a
// thread needs is worked out anew, which leaves its registers to the sums.
template <typename T, int V>
FEDPEFT_DEVICE void copy_tile(unsigned char* stage, const T* grad, const uint16_t* list, int range,
                              int positions, int right, bool more, uint32_t bounds,
                              const ScatterPlan& plan) {
  constexpr int W = kWide<T>;
  const ScatterTables& tables = plan.tables;
  const int thread = opaque_thread(), group = thread / tables.lanes;
  const int column = (thread - group * tables.lanes) * W, columns = right - column;
  if (columns > 0) {
    const T* from = grad + group * plan.width + column;
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
  const int starts = tables.groups >> 1;
  if (thread == 0 && more) copy_to_shared<2>(to, list + 2 * (tables.pairs + range));
  if (thread < starts)
    copy_to_shared<2>(to + 2 * (1 + thread), list + 2 * (tables.ranges + range * starts + thread));
  const int begin = int(bounds & 0xffff), count = int(bounds >> 16);
#pragma unroll 1
  for (int i = thread; i < count; i += ScatterTables::kThreads)
    copy_to_shared<2>(to + 2 * (1 + starts + i), list + 2 * (begin + i));
  commit_copies();
}

// A block a chunk, range of rows and slice of columns.
template <typename T, int V>
__global__ void __launch_bounds__(ScatterTables::kThreads, 1)
    scatter_tables(const T* grad, const uint16_t* lists, acc_t<T>* partial, ScatterPlan plan) {
  using A = acc_t<T>;
  constexpr int W = kWide<T>, kRows = kGroupRows<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  const ScatterTables& tables = plan.tables;
  const int stage_bytes = int(tables.stage_bytes);
  const int parts = tables.slices * tables.ranges, chunk = int(blockIdx.x) / parts;
  const int part = int(blockIdx.x) - chunk * parts, range = part / tables.slices;
  const int64_t first_column = int64_t(part - range * tables.slices) * tables.slice;
  const int64_t right = plan.width - first_column;
  const int columns = int(right < tables.slice ? right : tables.slice);
  // Rows of the thread's group, none where the slice has no columns for it.
  const auto rows_of = [&](int group, int column) {
    const int rows = tables.rows - range * tables.range_rows() - group * tables.each;
    return column >= columns ? 0 : rows < tables.each ? rows : tables.each;
  };
  const int64_t first_tile = int64_t(chunk) * tables.chunk_tiles;
  const int64_t tiles_left = tables.tiles - first_tile;
  const int count = int(tiles_left < tables.chunk_tiles ? tiles_left : tables.chunk_tiles);
  const auto copy = [&](int tile, unsigned char* stage, uint32_t bounds) {
    const int64_t first = (first_tile + tile) * tables.tile, left = plan.positions - first;
    copy_tile<T, V>(stage, grad + first * plan.width + first_column,
                    lists + (first_tile + tile) * tables.pairs * 2, range,
                    int(left < tables.tile ? left : tables.tile), columns, tile + 1 < count, bounds,
                    plan);
  };
  {
    const int thread = opaque_thread(), group = thread / tables.lanes;
    const int column = (thread - group * tables.lanes) * W;
    if (column < tables.slice && group < ScatterTables::kStages) {
      unsigned char* const zeros = shared + group * stage_bytes + tables.tile * tables.stride;
      store_pack<W>(reinterpret_cast<T*>(zeros) + column, zero_pack<W, T>());
    }
    // What is loaded behind a list is a position too.
    for (int at = tables.list_place() + thread * 4; at < stage_bytes;
         at += ScatterTables::kThreads * 4) {
#pragma unroll
      for (int s = 0; s < ScatterTables::kStages; ++s)
        *reinterpret_cast<uint32_t*>(shared + s * stage_bytes + at) = 0;
    }
  }
  __syncthreads();
  const Pack<uint16_t, 2> bounds = load_pack<2>(lists + first_tile * tables.pairs * 2 + 2 * range);
  copy(0, shared, uint32_t(bounds.at[0]) | uint32_t(bounds.at[1]) << 16);

  Sum<A, W> sums[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) sums[r].clear();
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    const int stage = (tile & 1) * stage_bytes;
    wait_for_copies<0>();
    __syncthreads();
    const SharedPlace here(shared + stage);
    const SharedPlace list = here + tables.list_place();
    if (tile + 1 < count) copy(tile + 1, shared + (stage_bytes - stage), load_pair(list));
    const int thread = opaque_thread(), group = thread / tables.lanes;
    const int column = (thread - group * tables.lanes) * W, owned = rows_of(group, column);
    if (owned <= 0) continue;
    const SharedPlace values = here + column * int(sizeof(T));
    const uint32_t starts = load_pair(list + (1 + group / 2) * 4);
    const int start = int(group % 2 == 1 ? starts >> 16 : starts & 0xffff);
    SharedPlace pairs = list + (1 + tables.groups / 2 + start) * 4;
    // Values are loaded while those of the pair before are added, where registers allow, and pairs
    // one ahead of them; behind the last, for nothing.
    const auto load = [&](int position) { return load_wide<T>(values + position * tables.stride); };
    uint32_t pair = load_pair(pairs), next = load_pair(pairs + 4);
    Pack<T, W> one = load(first_of(pair)), other = load(second_of(pair));
    pairs = pairs + 8;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= owned) break;
      bool more;
      do {
        more = (pair & ScatterTables::kMore) != 0;
        if constexpr (!kValuesAhead<T, V>) {
          one = load(first_of(pair));
          other = load(second_of(pair));
        }
        pair = next;
        next = load_pair(pairs);
        pairs = pairs + 4;
        Pack<T, W> next_one = one, next_other = other;
        if constexpr (kValuesAhead<T, V>) {
          next_one = load(first_of(pair));
          next_other = load(second_of(pair));
        }
        sums[r].add(one);
        sums[r].add(other);
        one = next_one;
        other = next_other;
      } while (more);
    }
  }

  const int thread = opaque_thread(), group = thread / tables.lanes;
  const int column = (thread - group * tables.lanes) * W, owned = rows_of(group, column);
  A* to = partial + (int64_t(chunk) * tables.rows + range * tables.range_rows()) * plan.width +
          first_column + int64_t(group * tables.each) * plan.width + column;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= owned) break;
    if constexpr (V == W) {
      sums[r].store(to);
    } else {
#pragma unroll
      for (int i = 0; i < W; ++i) {
        if (i < columns - column) to[i] = sums[r].at[i];
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
