// Matrix products of blocks: a tile of 64 x 64 sums, a thread 8 x 4 of them in registers, from
// operands in shared memory. Every sum is one chain in the order of the summed index. Blocks of
// twice as many threads make a tile of 128 x 64 in the same way (Rows).
#pragma once

#include "common/device.cuh"
#include "common/philox.h"

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

// Of a tile of Rows x 64: threads, and the thread rows that they form.
template <int Rows>
constexpr int kThreadsOf = Rows / kTileRows * kAcross;
template <int Rows>
constexpr int kDownOf = Rows / kTileRows;

FEDPEFT_DEVICE int tile_down(int thread = int(threadIdx.x)) { return thread / kAcross; }
FEDPEFT_DEVICE int tile_across(int thread = int(threadIdx.x)) { return thread % kAcross; }

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
template <int Threads, int Turns, int Batch, typename A, int V, typename Place, typename Get,
          typename Put>
FEDPEFT_DEVICE void copy_tile(int rows, int columns, const Place& place, const Get& get,
                              const Put& put, int thread) {
  constexpr int kBatch = Turns < Batch ? Turns : Batch;
  static_assert(Turns % kBatch == 0);
#pragma unroll 1
  for (int turn = 0; turn < Turns; turn += kBatch) {
    Sum<A, V> values[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int row, column;
      place((turn + j) * Threads + thread, &row, &column);
      const bool inside = row < rows && column < columns;
      values[j] = keep_if(inside, get(inside ? row : 0, inside ? column : 0));
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      int row, column;
      place((turn + j) * Threads + thread, &row, &column);
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
template <int Rows, int Columns, int V, int Batch = 8, int Threads = kTileThreads, typename A,
          typename Get>
FEDPEFT_DEVICE void fill(A* to, int stride, int rows, int columns, const Get& get,
                         int thread = int(threadIdx.x)) {
  constexpr int kPacks = Columns / V, kTurns = Rows * kPacks / Threads;
  static_assert(kTurns * Threads == Rows * kPacks);
  copy_tile<Threads, kTurns, Batch, A, V>(
      rows, columns, place_in_rows<kPacks, V>, get,
      [&](int row, int column, const Sum<A, V>& values) {
        put<V>(to + row * stride + column, values);
      },
      thread);
}

// As fill, transposed: get(row, column) goes to `to`[column * stride + row]. The lanes of a warp
// take 16 rows of two vectors, whole sectors of memory and different banks.
template <int Rows, int Columns, int V, int Batch = 8, int Threads = kTileThreads, typename A,
          typename Get>
FEDPEFT_DEVICE void fill_transposed(A* to, int stride, int rows, int columns, const Get& get,
                                    int thread = int(threadIdx.x)) {
  constexpr int kTurns = Rows * Columns / V / Threads;
  static_assert(kTurns * Threads == Rows * Columns / V && Rows % 16 == 0 && Columns / V % 2 == 0);
  copy_tile<Threads, kTurns, Batch, A, V>(
      rows, columns,
      [](int e, int* row, int* column) {
        *row = e % 16 + e / 32 % (Rows / 16) * 16;
        *column = (e / 16 % 2 + e / (2 * Rows) * 2) * V;
      },
      get,
      [&](int row, int column, const Sum<A, V>& values) {
#pragma unroll
        for (int v = 0; v < V; ++v) to[(column + v) * stride + row] = values.at[v];
      },
      thread);
}

template <int V, typename T>
FEDPEFT_DEVICE Sum<acc_t<T>, V> values_at(const T* p) {
  Sum<acc_t<T>, V> values;
  values.set(p);
  return values;
}

// How far `multiply` goes along the summed index at once. Compilers for newer architectures load so
// far ahead that a tall tile's registers are enough for less.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
template <int Rows>
constexpr int kTogether = Rows == kTile ? 4 : 2;
#else
template <int Rows>
constexpr int kTogether = 4;
#endif

// sums += a b for a [Rows, depth] and b [depth, kTile], zeros up to a multiple of four of depth.
// Thread rows are tile_down() + kDownOf<Rows> r.
template <int Rows = kTile, typename A>
FEDPEFT_DEVICE void multiply(TileSums<A>& sums, const A* a, const A* b, int depth,
                             int thread = int(threadIdx.x)) {
  constexpr int K = kTogether<Rows>;
  a += tile_down(thread) * kDepthStride<A>;
  b += tile_across(thread) * kTileColumns;
#pragma unroll 1
  for (const A* const end = a + depth; a < end; a += K, b += K * kTileStride) {
    Sum<A, kTileColumns> right[K];
#pragma unroll
    for (int j = 0; j < K; ++j) right[j].set(b + j * kTileStride);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      Sum<A, K> left;
      left.set(a + r * kDownOf<Rows> * kDepthStride<A>);
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int v = 0; v < kTileColumns; ++v) sums.row[r].at[v] += left.at[j] * right[j].at[v];
      }
    }
  }
}

// Turns of a product's loop made one where registers are left for it: loads for the second are
// under way during the first.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kTwoTurns = 1;
#else
constexpr int kTwoTurns = 2;
#endif

// Where row `column` of an operand of `multiply_rows` is, so that the lanes of a warp, which read
// rows four apart, meet different banks.
FEDPEFT_DEVICE int place_of_row(int column) {
  return column % kTileColumns * kAcross + column / kTileColumns;
}

// sums += a b^T for a [kTile, depth] and b [kTile, depth], whose rows are at place_of_row; zeros up
// to a multiple of 4 Turns of depth, which is at least 1. Thread rows are those of `multiply`.
template <int Turns = 1, typename A>
FEDPEFT_DEVICE void multiply_rows(TileSums<A>& sums, const A* a, const A* b, int depth,
                                  int thread = int(threadIdx.x)) {
  constexpr int K = 4;
  a += tile_down(thread) * kDepthStride<A>;
  b += tile_across(thread) * kDepthStride<A>;
  const A* const end = a + depth;
#pragma unroll 1
  do {
#pragma unroll
    for (int k = 0; k < Turns * K; k += K) {
      Sum<A, K> right[kTileColumns];
#pragma unroll
      for (int v = 0; v < kTileColumns; ++v) right[v].set(b + v * kAcross * kDepthStride<A> + k);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        Sum<A, K> left;
        left.set(a + r * kDown * kDepthStride<A> + k);
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
          for (int v = 0; v < kTileColumns; ++v) sums.row[r].at[v] += left.at[j] * right[v].at[j];
        }
      }
    }
    a += Turns * K;
    b += Turns * K;
  } while (a < end);
}

// sums += a^T b for a [depth, Rows] and b [depth, kTile], zeros up to a multiple of 4 Turns of
// depth. Thread rows are 8 tile_down() + r.
template <int Rows = kTile, int Turns = 1, typename A>
FEDPEFT_DEVICE void multiply_transposed(TileSums<A>& sums, const A* a, const A* b, int depth,
                                        int thread = int(threadIdx.x)) {
  constexpr int K =
      (Rows == kTile ? 4 : 2) * Turns;  // beside what a larger block keeps in registers
  const A* const end = b + depth * kTileStride;
  a += tile_down(thread) * kTileRows;
#pragma unroll 1
  for (; b < end; a += K * (Rows + kGap), b += K * kTileStride) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Sum<A, kTileColumns> right;
      right.set(b + tile_across(thread) * kTileColumns + k * kTileStride);
#pragma unroll
      for (int half = 0; half < kTileRows; half += 4) {
        Sum<A, 4> left;
        left.set(a + k * (Rows + kGap) + half);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int v = 0; v < kTileColumns; ++v)
            sums.row[half + r].at[v] += left.at[r] * right.at[v];
        }
      }
    }
  }
}

// Sums that start with the bias of their columns, of which the first `columns` are there.
template <typename A, typename T>
FEDPEFT_DEVICE void start_with(TileSums<A>& sums, const T* bias, int columns,
                               int thread = int(threadIdx.x)) {
#pragma unroll
  for (int v = 0; v < kTileColumns; ++v) {
    const int o = tile_across(thread) * kTileColumns + v;
    const A start = o < columns ? to_acc(bias[o]) : A(0);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) sums.row[r].at[v] = start;
  }
}

// Stores the four columns of a thread that are below `columns`, by V where rows allow; Anywhere as
// in Sum::store.
template <int V, bool Anywhere = false, typename T>
FEDPEFT_DEVICE void store_columns(T* to, const Sum<acc_t<T>, kTileColumns>& sums, int columns) {
  constexpr int kWidth = V < kTileColumns ? V : kTileColumns;
#pragma unroll
  for (int v = 0; v < kTileColumns; v += kWidth) {
    if (v >= columns) break;
    Sum<acc_t<T>, kWidth> part;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) part.at[w] = sums.at[v + w];
    part.template store<Anywhere>(to + v);
  }
}

// As store_columns, from memory.
template <int V, typename T>
FEDPEFT_DEVICE void load_columns(Sum<acc_t<T>, kTileColumns>& sums, const T* from, int columns) {
  constexpr int kWidth = V < kTileColumns ? V : kTileColumns;
#pragma unroll
  for (int v = 0; v < kTileColumns; v += kWidth) {
    if (v >= columns) break;
    const Sum<acc_t<T>, kWidth> part = values_at<kWidth>(from + v);
#pragma unroll
    for (int w = 0; w < kWidth; ++w) sums.at[v + w] = part.at[w];
  }
}

// The draws of a layer's dropout, as those of client_dropout.
struct Dropout {
  bool drop;
  uint32_t threshold;  // floor(p * 2^32): an element with a word below it is dropped
  double scale;        // 1 / (1 - p)
  uint64_t seed;
  uint32_t round, stream;
};

// Words of elements [4 index + phase, + 4) of a client's output. Whole: `phase` is zero.
template <bool Whole>
FEDPEFT_DEVICE PhiloxBlock dropout_words(const Dropout& d, uint32_t client, uint32_t index,
                                         [[maybe_unused]] int phase) {
  const PhiloxBlock first = philox(index, client, d.round, d.stream, d.seed);
  if constexpr (Whole) return first;
  const PhiloxBlock next = philox(index + 1, client, d.round, d.stream, d.seed);
  // Moved down in two steps: an index known only at run time would move the words to memory.
  uint32_t word[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    word[w] = first.word[w];
    word[4 + w] = next.word[w];
  }
#pragma unroll
  for (int w = 0; w < 7; ++w) word[w] = phase & 1 ? word[w + 1] : word[w];
#pragma unroll
  for (int w = 0; w < 4; ++w) word[w] = phase & 2 ? word[w + 2] : word[w];
  return {{word[0], word[1], word[2], word[3]}};
}

}  // namespace fedpeft::gpu
