// Matrix products of blocks: a tile of 64 x 64 sums, a thread 8 x 4 of them in registers, from
// operands in shared memory. Every sum is one chain in the order of the summed index.
#pragma once

#include "common/device.cuh"

namespace fedpeft::gpu {

constexpr int kTileThreads = 128;
constexpr int kTile = 64;  // rows and columns of a block's result
constexpr int kTileRows = 8, kTileColumns = 4;
constexpr int kAcross = kTile / kTileColumns, kDown = kTile / kTileRows;  // threads
static_assert(kAcross * kDown == kTileThreads);
constexpr int kGap = 4;  // elements after a row of shared memory, against bank conflicts
constexpr int kTileStride = kTile + kGap;

// Length of the summed index that is in shared memory at once.
template <typename A>
constexpr int kDepth = 256 / int(sizeof(A));
template <typename A>
constexpr int kDepthStride = kDepth<A> + kGap;
// Elements of shared memory for an operand, whichever index is contiguous.
template <typename A>
constexpr int kOperand = kTile * kDepthStride<A> > kDepth<A>* kTileStride ? kTile * kDepthStride<A>
                                                                          : kDepth<A> * kTileStride;
template <typename A>
constexpr int64_t kTileBytes = 2 * kOperand<A> * int64_t(sizeof(A));
template <typename A>
constexpr int kTileBlocks = sizeof(A) == 8 ? 2 : 3;

FEDPEFT_DEVICE int tile_down() { return int(threadIdx.x) / kAcross; }
FEDPEFT_DEVICE int tile_across() { return int(threadIdx.x) % kAcross; }

FEDPEFT_DEVICE int at_most(int64_t n, int limit) { return n < limit ? int(n) : limit; }

// The sums of a thread: eight rows of four columns.
template <typename A>
struct TileSums {
  Sum<A, kTileColumns> row[kTileRows];

  FEDPEFT_DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) row[r].clear();
  }
};

// Elements of V as the accumulator type, to shared memory.
template <int V, typename A>
FEDPEFT_DEVICE void put(A* to, const Sum<A, V>& values) {
  constexpr int kWidth = V < kWide<A> ? V : kWide<A>;
#pragma unroll
  for (int v = 0; v < V; v += kWidth) {
    Pack<A, kWidth> pack;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) pack.at[w] = values.at[v + w];
    store_pack<kWidth>(to + v, pack);
  }
}

// Zero unless `keep`, chosen rather than branched upon, so that loads needn't wait for the item.
template <typename A, int V>
FEDPEFT_DEVICE Sum<A, V> keep_if(bool keep, Sum<A, V> values) {
#pragma unroll
  for (int v = 0; v < V; ++v) values.at[v] = keep ? values.at[v] : A(0);
  return values;
}

// Calls get(row, column) for V elements at each of a thread's places of Rows x Columns, and then
// put(row, column, values): zero outside of the first `rows` x `columns`, of which there is at
// least one. Batch gets go before their puts, without a branch, so that their loads are under way
// together.
template <int Turns, int Batch, typename A, int V, typename Place, typename Get, typename Put>
FEDPEFT_DEVICE void copy_tile(int rows, int columns, const Place& place, const Get& get,
                              const Put& put) {
  constexpr int kBatch = Turns < Batch ? Turns : Batch;
  static_assert(Turns % kBatch == 0);
#pragma unroll 1
  for (int turn = 0; turn < Turns; turn += kBatch) {
    Sum<A, V> values[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int row, column;
      place((turn + j) * kTileThreads + int(threadIdx.x), &row, &column);
      const bool inside = row < rows && column < columns;
      values[j] = keep_if(inside, get(inside ? row : 0, inside ? column : 0));
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int row, column;
      place((turn + j) * kTileThreads + int(threadIdx.x), &row, &column);
      put(row, column, values[j]);
    }
  }
}

// Places row after row, each of Packs vectors of V.
template <int Packs, int V>
FEDPEFT_DEVICE void place_in_rows(int e, int* row, int* column) {
  *row = e / Packs;
  *column = e % Packs * V;
}

// Fills Rows x Columns elements of shared memory, `stride` apart from row to row.
template <int Rows, int Columns, int V, int Batch = 8, typename A, typename Get>
FEDPEFT_DEVICE void fill(A* to, int stride, int rows, int columns, const Get& get) {
  constexpr int kPacks = Columns / V, kTurns = Rows * kPacks / kTileThreads;
  static_assert(kTurns * kTileThreads == Rows * kPacks);
  copy_tile<kTurns, Batch, A, V>(rows, columns, place_in_rows<kPacks, V>, get,
                                 [&](int row, int column, const Sum<A, V>& values) {
                                   put<V>(to + row * stride + column, values);
                                 });
}

// As fill, transposed: get(row, column) goes to `to`[column * stride + row]. The lanes of a warp
// take 16 rows of two vectors, whole sectors of memory and different banks.
template <int Rows, int Columns, int V, int Batch = 8, typename A, typename Get>
FEDPEFT_DEVICE void fill_transposed(A* to, int stride, int rows, int columns, const Get& get) {
  constexpr int kTurns = Rows * Columns / V / kTileThreads;
  static_assert(kTurns * kTileThreads == Rows * Columns / V && Rows % 16 == 0 &&
                Columns / V % 2 == 0);
  copy_tile<kTurns, Batch, A, V>(
      rows, columns,
      [](int e, int* row, int* column) {
        *row = e % 16 + e / 32 % (Rows / 16) * 16;
        *column = (e / 16 % 2 + e / (2 * Rows) * 2) * V;
      },
      get,
      [&](int row, int column, const Sum<A, V>& values) {
#pragma unroll
        for (int v = 0; v < V; ++v) to[(column + v) * stride + row] = values.at[v];
      });
}

template <int V, typename T>
FEDPEFT_DEVICE Sum<acc_t<T>, V> values_at(const T* p) {
  Sum<acc_t<T>, V> values;
  values.set(p);
  return values;
}

// sums += a b for a [kTile, depth] and b [depth, kTile]. Thread rows are tile_down() + 8 r.
template <typename A>
FEDPEFT_DEVICE void multiply(TileSums<A>& sums, const A* a, const A* b, int depth) {
  a += tile_down() * kDepthStride<A>;
  b += tile_across() * kTileColumns;
#pragma unroll 1
  for (int k = 0; k < depth; k += 4) {
    Sum<A, kTileColumns> right[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) right[j].set(b + (k + j) * kTileStride);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      Sum<A, 4> left;
      left.set(a + r * kDown * kDepthStride<A> + k);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int v = 0; v < kTileColumns; ++v) sums.row[r].at[v] += left.at[j] * right[j].at[v];
      }
    }
  }
}

// sums += a^T b for a and b [depth, kTile]. Thread rows are 8 tile_down() + r.
template <typename A>
FEDPEFT_DEVICE void multiply_transposed(TileSums<A>& sums, const A* a, const A* b, int depth) {
  a += tile_down() * kTileRows;
  b += tile_across() * kTileColumns;
#pragma unroll 4
  for (int k = 0; k < depth; ++k) {
    Sum<A, kTileColumns> right;
    right.set(b + k * kTileStride);
#pragma unroll
    for (int half = 0; half < kTileRows; half += 4) {
      Sum<A, 4> left;
      left.set(a + k * kTileStride + half);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int v = 0; v < kTileColumns; ++v) sums.row[half + r].at[v] += left.at[r] * right.at[v];
      }
    }
  }
}

}  // namespace fedpeft::gpu
