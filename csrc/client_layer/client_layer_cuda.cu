// CUDA kernels of client_layer: small matrix products, one client's each. A block makes a tile of
// 64 x 64 elements of a result, a thread 8 x 4 of them in registers; the operands pass through
// shared memory. Every element is one chain in the order of the summed index. Padding is zero in
// shared memory, and tiles of nothing else are skipped, so that it changes no bit. Of float, a
// block goes through a client's positions, with the next tile's operands on their way to shared
// memory.
#include <type_traits>

#include "client_layer/client_layer_cuda.h"
#include "common/philox.h"
#include "common/streaming.cuh"
#include "common/tile.cuh"

namespace fedpeft::gpu {
namespace {

FEDPEFT_DEVICE Dropout dropout_of(const ClientLayerArgs& a) {
  return {a.drop, a.threshold, a.scale, a.seed, a.round, a.stream};
}

// Which of a tile's positions hold an item, a bit each. A thread reads the item of one position,
// which comes while it does other things; `keep` then leaves the bits in shared memory.
struct TileItems {
  static constexpr int kWords = kTile / kWarp;
  static_assert(kWords == 2 && kTile <= kTileThreads);
  Late item;

  // Of positions n0 on, `count` at most; all threads call.
  FEDPEFT_DEVICE void load(const ClientLayerArgs& a, int64_t n0, int count) {
    const int p = int(threadIdx.x), bytes = a.items.bytes;
    item.load(static_cast<const char*>(a.items.data) + (n0 + p) * bytes, bytes,
              p < count && p < kTile);
  }
  FEDPEFT_DEVICE void keep(const ClientLayerArgs& a, unsigned* words) const {
    const unsigned votes = __ballot_sync(kFullMask, item.come(a.items.bytes) >= 0);
    const int warp = int(threadIdx.x) / kWarp;
    if (warp < kWords && threadIdx.x % kWarp == 0) words[warp] = votes;
  }
  static FEDPEFT_DEVICE uint64_t bits(const unsigned* words) {
    return uint64_t(words[1]) << 32 | words[0];
  }
};
FEDPEFT_DEVICE bool has_item(uint64_t bits, int position) { return bits >> position & 1; }

// Where a thread's first sums of a tile from position 0 and output o0 go, and their draws.
template <typename T>
struct Outputs {
  T* out;
  uint32_t index;  // of the block of four elements that the first is in
  int phase;       // its place in that

  FEDPEFT_DEVICE Outputs(const ClientLayerArgs& a, int64_t c, int64_t p0, int64_t o0) {
    const int64_t element = (p0 + tile_down()) * a.out_width + o0 + tile_across() * kTileColumns;
    out = static_cast<T*>(a.out) + c * a.positions * a.out_width + element;
    index = uint32_t(element >> 2);
    phase = int(element & 3);
  }
  // To the tile of the next positions.
  FEDPEFT_DEVICE void advance(const ClientLayerArgs& a) {
    out += kTile * a.out_width;
    index += kTile / 4 * uint32_t(a.out_width);
  }
};

// ReLU, dropout and padding of a tile of sums, and its way to memory. Rows are worked on without a
// branch, so that the chains of their draws are under way together.
template <typename T, int V>
FEDPEFT_DEVICE void finish(const ClientLayerArgs& a, TileSums<acc_t<T>>& sums, const Outputs<T>& to,
                           uint32_t client, int rows, int columns, uint64_t items) {
  using A = acc_t<T>;
  columns -= tile_across() * kTileColumns;
  if (columns <= 0) return;
  const uint64_t mine = items >> tile_down();
  if (a.drop) {
    const Dropout drop = dropout_of(a);
    const A scale = A(a.scale);
    const uint32_t step = kDown / 4 * uint32_t(a.out_width);
    static_assert(kDown % 4 == 0);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const PhiloxBlock draws =
          dropout_words<V % 4 == 0>(drop, client, to.index + uint32_t(r) * step, to.phase);
#pragma unroll
      for (int v = 0; v < kTileColumns; ++v) {
        A& x = sums.row[r].at[v];
        const bool keep =
            has_item(mine, r * kDown) && !(x < A(0)) && draws.word[v] >= drop.threshold;
        x = keep ? x * scale : A(0);
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int v = 0; v < kTileColumns; ++v) {
        A& x = sums.row[r].at[v];
        x = has_item(mine, r * kDown) && !(x < A(0)) ? x : A(0);
      }
    }
  }
  T* out = to.out;
  rows -= tile_down();
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (r * kDown < rows) store_columns<V>(out, sums.row[r], columns);
    out += kDown * a.out_width;
  }
}

// Zeros in place of a tile without an item.
template <typename T, int V>
FEDPEFT_DEVICE void finish_padding(const ClientLayerArgs& a, const Outputs<T>& to, int rows,
                                   int columns) {
  Sum<acc_t<T>, kTileColumns> zero;
  zero.clear();
  T* out = to.out;
#pragma unroll 1
  for (int row = tile_down(); row < rows; row += kDown) {
    store_columns<V>(out, zero, columns - tile_across() * kTileColumns);
    out += kDown * a.out_width;
  }
}

FEDPEFT_DEVICE uint32_t client_at(const ClientLayerArgs& a, int64_t c) {
  const int64_t client = a.clients[c];
  if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, c, int64_t{1} << 32);
  return uint32_t(client);
}

template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t<T>>)
    forward(ClientLayerArgs a, int64_t work) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(unsigned, words, TileItems::kWords);
  A* left = reinterpret_cast<A*>(shared);  // of x [kTile, depth]
  A* right = left + kOperand<A>;           // of weight [depth, kTile], transposed
  const int64_t I = a.in, O = a.out_width, P = a.positions;
  const int64_t across_o = (O + kTile - 1) / kTile, down_p = (P + kTile - 1) / kTile;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t n = divide(item, across_o), c = divide(n, down_p);
    const int64_t o0 = (item - n * across_o) * kTile, p0 = (n - c * down_p) * kTile;
    const int rows = at_most(P - p0, kTile), columns = at_most(O - o0, kTile);
    const uint32_t client = client_at(a, c);
    const T* x = static_cast<const T*>(a.x) + (c * P + p0) * I;
    const T* weight = static_cast<const T*>(a.weight) + (c * O + o0) * I;
    TileItems tile;
    tile.load(a, c * P + p0, rows);
    tile.keep(a, words);
    __syncthreads();
    const uint64_t items = TileItems::bits(words);
    TileSums<A> sums;
    start_with(sums, static_cast<const T*>(a.bias) + c * O + o0, columns);
    for (int64_t i0 = 0; items && i0 < I; i0 += kDepth<A>) {
      const int depth = at_most(I - i0, kDepth<A>);
      fill<kTile, kDepth<A>, V>(left, kDepthStride<A>, rows, depth, [&](int row, int k) {
        return keep_if(has_item(items, row), values_at<V>(x + row * I + i0 + k));
      });
      fill_transposed<kTile, kDepth<A>, V, 4>(
          right, kTileStride, columns, depth,
          [&](int row, int k) { return values_at<V>(weight + row * I + i0 + k); });
      __syncthreads();
      multiply(sums, left, right, depth);
      __syncthreads();
    }
    const Outputs<T> to(a, c, p0, o0);
    if (items) {
      finish<T, V>(a, sums, to, client, rows, columns, items);
    } else {
      finish_padding<T, V>(a, to, rows, columns);
    }
    __syncthreads();
  }
}

// Rows of kTile floats at most that Threads threads copy to shared memory: a thread has one place
// in kStep rows. Columns beyond `columns` become zeros, as rows do that are not wanted.
template <int V, int Threads>
struct RowCopy {
  static constexpr int kPacks = kTile / V, kStep = Threads / kPacks, kTurns = kTile / kStep;
  static FEDPEFT_DEVICE int row(int thread) { return thread / kPacks; }
  static FEDPEFT_DEVICE int column(int thread) { return thread % kPacks * V; }
  // Of the thread, in an operand and in rows `pitch` apart.
  static FEDPEFT_DEVICE float* own(float* operand, int thread) {
    return operand + row(thread) * kTileStride + column(thread);
  }
  static FEDPEFT_DEVICE const float* own(const float* rows, int64_t pitch, int thread) {
    return rows + row(thread) * pitch + column(thread);
  }

  // Starts to copy the rows with a bit in `wanted` from the thread's place in the first on, which
  // moves to that in the row after the last.
  static FEDPEFT_DEVICE void start(float* operand, const float*& from, int64_t pitch,
                                   uint64_t wanted, int columns, int thread) {
    wanted = column(thread) < columns ? wanted >> row(thread) : 0;
    float* const to = own(operand, thread);
#pragma unroll(kTurns < 8 ? kTurns : 8)
    for (int r = 0; r < kTile; r += kStep) {
      copy_or_clear<V>(to + r * kTileStride, from, wanted >> r & 1);
      from += kStep * pitch;
    }
  }
  // As start for the first `count` rows, to where place_of_row says.
  static FEDPEFT_DEVICE void start_placed(float* operand, const float* from, int64_t pitch,
                                          int count, int columns, int thread) {
    from = own(from, pitch, thread);
    count = column(thread) < columns ? count - row(thread) : 0;
#pragma unroll(kTurns < 8 ? kTurns : 8)
    for (int r = 0; r < kTile; r += kStep) {
      copy_or_clear<V>(operand + place_of_row(row(thread) + r) * kTileStride + column(thread), from,
                       r < count);
      from += kStep * pitch;
    }
  }
};

constexpr int64_t kCopied = kOperand<float>;  // elements of an operand that is copied
static_assert(kDepthStride<float> == kTileStride && kCopied == kTile * kTileStride);

// Of float: operands are copied past the registers while the block works on those before, and the
// items of the tile behind come meanwhile. A block goes through `span` tiles of its client's
// positions. Inputs pass by 64 at a time (Deep), or there are no more, and the weights stay.
template <int V, bool Deep>
__global__ void __launch_bounds__(kTileThreads, Deep || V == 1 ? 3 : 4)
    forward_spans(ClientLayerArgs a, int64_t work, int64_t span) {
  using Copy = RowCopy<V, kTileThreads>;
  constexpr int kTurns = kTwoTurns;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(unsigned, words, 4 * TileItems::kWords);  // of four tiles in turn
  float* const operands = reinterpret_cast<float*>(shared);
  const int64_t I = a.in, O = a.out_width, P = a.positions;
  const int64_t across_o = (O + kTile - 1) / kTile, down_p = (P + kTile - 1) / kTile;
  const int64_t spans = (down_p + span - 1) / span;
  const auto left = [&](int parity) { return operands + parity * kCopied; };
  const auto right = [&](int parity) { return operands + (2 + (Deep ? parity : 0)) * kCopied; };
  const auto words_of = [&](int tile) { return words + (tile & 3) * TileItems::kWords; };
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t n = divide(item, across_o), c = divide(n, spans);
    const int64_t o0 = (item - n * across_o) * kTile, p0 = (n - c * spans) * span * kTile;
    const int columns = at_most(O - o0, kTile);
    const uint32_t client = client_at(a, c);
    const float* const weight = static_cast<const float*>(a.weight) + (c * O + o0) * I;
    const float* x =
        Copy::own(static_cast<const float*>(a.x) + (c * P + p0) * I, I, int(threadIdx.x));
    Outputs<float> to(a, c, p0, o0);
    // Positions that are left of the span.
    int count = at_most(P - p0, int(span) * kTile);
    int64_t n0 = c * P + p0;
    TileItems now, next;
    now.load(a, n0, count);
    next.load(a, n0 + kTile, count - kTile);
    if (!Deep) Copy::start_placed(right(0), weight, I, columns, int(I), int(threadIdx.x));
    TileSums<float> sums;
    start_with(sums, static_cast<const float*>(a.bias) + c * O + o0, columns);
    const Sum<float, kTileColumns> bias = sums.row[0];
    now.keep(a, words_of(0));
    next.keep(a, words_of(1));
    // Of the tile whose first position x is at.
    const auto copy = [&](int tile, int64_t i0, int parity) {
      const uint64_t items = TileItems::bits(words_of(tile));
      const int thread = opaque_thread();
      if (Deep) {
        const float* from = x + i0;
        const int inputs = at_most(I - i0, kTile);
        Copy::start(left(parity), from, I, items, inputs, thread);
        Copy::start_placed(right(parity), weight + i0, I, columns, inputs, thread);
        if (i0 + kTile >= I) x += kTile * I;
      } else {
        Copy::start(left(parity), x, I, items, int(I), thread);
      }
    };
    __syncthreads();
    copy(0, 0, 0);
    int parity = 0;
    for (int tile = 0; count > 0; ++tile, count -= kTile) {
      uint64_t items = 0;
      if (Deep) {
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) sums.row[r] = bias;
        for (int64_t i0 = 0; i0 < I; i0 += kTile) {
          copies_done();
          __syncthreads();
          items = TileItems::bits(words_of(tile));
          if (i0 + kTile < I) {
            copy(tile, i0 + kTile, parity ^ 1);
          } else {
            if (count > kTile) copy(tile + 1, 0, parity ^ 1);
            next.load(a, n0 + 2 * kTile, count - 2 * kTile);
          }
          if (items)
            multiply_rows<kTurns>(sums, left(parity), right(parity), at_most(I - i0, kTile));
          parity ^= 1;
        }
      } else {
        copies_done();
        __syncthreads();
        items = TileItems::bits(words_of(tile));
        if (count > kTile) copy(tile + 1, 0, (tile + 1) & 1);
        next.load(a, n0 + 2 * kTile, count - 2 * kTile);
      }
      if (items) {
        if (!Deep) {
#pragma unroll
          for (int r = 0; r < kTileRows; ++r) sums.row[r] = bias;
          multiply_rows<kTurns>(sums, left(tile & 1), right(0), int(I));
        }
        finish<float, V>(a, sums, to, client, count, columns, items);
      } else {
        finish_padding<float, V>(a, to, at_most(count, kTile), columns);
      }
      next.keep(a, words_of(tile + 2));
      to.advance(a);
      n0 += kTile;
    }
    __syncthreads();
  }
}

// Gradient before ReLU and dropout of V outputs of position n of all clients.
template <int V, typename T>
FEDPEFT_DEVICE Sum<acc_t<T>, V> before(const ClientLayerArgs& a, int64_t n, int64_t o, bool valid) {
  using A = acc_t<T>;
  const int64_t e = n * a.out_width + o;
  Sum<A, V> grad = values_at<V>(static_cast<const T*>(a.grad) + e);
  const Sum<A, V> kept = values_at<V>(static_cast<const T*>(a.kept) + e);
#pragma unroll
  for (int v = 0; v < V; ++v)
    grad.at[v] = valid && kept.at[v] > A(0) ? grad.at[v] * A(a.scale) : A(0);
  return grad;
}

// A tile of grad_weight from (o0, i0), and with the first inputs the gradient of the bias.
template <typename T, int V>
FEDPEFT_DEVICE void backward_weight(const ClientLayerArgs& a, int64_t c, int64_t o0, int64_t i0,
                                    acc_t<T>* left, acc_t<T>* right, unsigned* words) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width, P = a.positions;
  const int rows = at_most(O - o0, kTile), columns = at_most(I - i0, kTile);
  const int mine_o = int(threadIdx.x);
  TileSums<A> sums;
  sums.clear();
  A bias = 0;
  TileItems next;
  next.load(a, c * P, at_most(P, kDepth<A>));
  next.keep(a, words);
  __syncthreads();
  for (int64_t p0 = 0; p0 < P; p0 += kDepth<A>) {
    const int depth = at_most(P - p0, kDepth<A>);
    const int64_t n0 = c * P + p0, behind = P - p0 - kDepth<A>;
    const uint64_t items = TileItems::bits(words);
    next.load(a, n0 + kDepth<A>, behind > 0 ? at_most(behind, kDepth<A>) : 0);
    words += (p0 / kDepth<A>)&1 ? -TileItems::kWords : TileItems::kWords;
    if (items) {
      fill<kDepth<A>, kTile, V, 4>(left, kTileStride, depth, rows, [&](int p, int o) {
        return before<V, T>(a, n0 + p, o0 + o, has_item(items, p));
      });
      if (columns)
        fill<kDepth<A>, kTile, V>(right, kTileStride, depth, columns, [&](int p, int i) {
          return keep_if(has_item(items, p),
                         values_at<V>(static_cast<const T*>(a.x) + (n0 + p) * I + i0 + i));
        });
    }
    next.keep(a, words);
    __syncthreads();
    if (items) {
      multiply_transposed(sums, left, right, depth);
      if (i0 == 0 && mine_o < rows) {
#pragma unroll 8
        for (int p = 0; p < depth; ++p) bias += left[p * kTileStride + mine_o];
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = tile_down() * kTileRows + r, column = tile_across() * kTileColumns;
    if (row >= rows || column >= columns) continue;
    store_columns<V>(static_cast<T*>(a.grad_weight) + (c * O + o0 + row) * I + i0 + column,
                     sums.row[r], columns - column);
  }
  if (i0 == 0 && mine_o < rows)
    static_cast<T*>(a.grad_bias)[c * O + o0 + mine_o] = from_acc<T>(bias);
}

// A tile of grad_x from (p0, i0).
template <typename T, int V>
FEDPEFT_DEVICE void backward_x(const ClientLayerArgs& a, int64_t c, int64_t p0, int64_t i0,
                               acc_t<T>* left, acc_t<T>* right, unsigned* words) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width, n0 = c * a.positions + p0;
  const int rows = at_most(a.positions - p0, kTile), columns = at_most(I - i0, kTile);
  if (columns == 0) return;
  TileItems tile;
  tile.load(a, n0, rows);
  tile.keep(a, words);
  __syncthreads();
  const uint64_t items = TileItems::bits(words);
  TileSums<A> sums;
  sums.clear();
  for (int64_t o0 = 0; items && o0 < O; o0 += kDepth<A>) {
    const int depth = at_most(O - o0, kDepth<A>);
    fill<kTile, kDepth<A>, V, 4>(left, kDepthStride<A>, rows, depth, [&](int p, int o) {
      return before<V, T>(a, n0 + p, o0 + o, has_item(items, p));
    });
    fill<kDepth<A>, kTile, V>(right, kTileStride, depth, columns, [&](int o, int i) {
      return values_at<V>(static_cast<const T*>(a.weight) + (c * O + o0 + o) * I + i0 + i);
    });
    __syncthreads();
    multiply(sums, left, right, depth);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = tile_down() + r * kDown, column = tile_across() * kTileColumns;
    if (row >= rows || column >= columns) continue;
    store_columns<V>(static_cast<T*>(a.grad_x) + (n0 + row) * I + i0 + column,
                     keep_if(has_item(items, row), sums.row[r]), columns - column);
  }
}

// The tiles of a client stand together, so that the second reader of its gradients finds them in
// L2; first those of the weights, which are the longest sums.
template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t<T>>)
    backward(ClientLayerArgs a, int64_t work) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(unsigned, words, 2 * TileItems::kWords);
  A* left = reinterpret_cast<A*>(shared);
  A* right = left + kOperand<A>;
  // At least one tile across, for the bias of a layer without inputs.
  const int64_t across_i = a.in ? (a.in + kTile - 1) / kTile : 1;
  const int64_t down_o = (a.out_width + kTile - 1) / kTile;
  const int64_t down_p = (a.positions + kTile - 1) / kTile;
  const int64_t down_all = down_o + down_p;
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t row = divide(item, across_i), c = divide(row, down_all);
    const int64_t i0 = (item - row * across_i) * kTile, tile = row - c * down_all;
    if (tile < down_o) {
      backward_weight<T, V>(a, c, tile * kTile, i0, left, right, words);
    } else {
      backward_x<T, V>(a, c, (tile - down_o) * kTile, i0, left, right, words);
    }
    __syncthreads();
  }
}

// Loads V floats where `there`, else leaves what is there, and never waits for the condition's
// end.
template <int V>
FEDPEFT_DEVICE void load_where(Pack<float, V>& to, const float* from, bool there) {
#if defined(__CUDACC__)
  if constexpr (V == 4) {
    asm volatile(
        "{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %5, 0;\n\t"
        "@there ld.global.v4.f32 {%0, %1, %2, %3}, [%4];\n\t}"
        : "+f"(to.at[0]), "+f"(to.at[1]), "+f"(to.at[2]), "+f"(to.at[3])
        : "l"(__cvta_generic_to_global(from)), "r"(int(there)));
  } else {
    static_assert(V == 1);
    asm volatile(
        "{\n\t.reg .pred there;\n\tsetp.ne.s32 there, %2, 0;\n\t"
        "@there ld.global.f32 %0, [%1];\n\t}"
        : "+f"(to.at[0])
        : "l"(__cvta_generic_to_global(from)), "r"(int(there)));
  }
#else
  if (!there) return;
  emulator::check_global(from);
  to = load_pack<V>(from);
#endif
}

// A thread's sums to rows kDown apart, of which `rows` are there, and zeros where `items`, a bit
// each, has none.
template <int V>
FEDPEFT_DEVICE void store_rows(float* to, TileSums<float>& sums, uint64_t items, int64_t pitch,
                               int rows, int columns) {
  if (columns <= 0) return;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r)
    sums.row[r] = keep_if(has_item(items, r * kDown), sums.row[r]);
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (r * kDown < rows) store_columns<V>(to, sums.row[r], columns);
    to += kDown * pitch;
  }
}

// Of float, 64 of a client's inputs: half of a block's threads make the gradient of x, the other
// half that of the weights, from tiles of positions that come to shared memory once, each while the
// block works on the one before. Outputs pass by 64 at a time; the sums of x's gradient wait in its
// place.
constexpr int kTogetherThreads = 2 * kTileThreads;
constexpr int64_t kTogetherBytes = 5 * kCopied * int64_t(sizeof(float));

template <int V>
__global__ void __launch_bounds__(kTogetherThreads, 2)
    backward_together(ClientLayerArgs a, int64_t work) {
  using Copy = RowCopy<V, kTogetherThreads>;
  constexpr int kTurns = V == 1 ? 1 : kTwoTurns;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(unsigned, words, 4 * TileItems::kWords);   // of four tiles in turn
  float* const weights = reinterpret_cast<float*>(shared);  // [outputs, inputs]
  const auto grads = [&](int tile) { return weights + (1 + (tile & 1)) * kCopied; };
  const auto inputs = [&](int tile) { return weights + (3 + (tile & 1)) * kCopied; };
  const auto words_of = [&](int tile) { return words + (tile & 3) * TileItems::kWords; };
  const bool of_x = int(threadIdx.x) >= kTileThreads;
  const int64_t I = a.in, O = a.out_width, P = a.positions;
  const int64_t across_i = (I + kTile - 1) / kTile;
  const float scale = float(a.scale);
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t c = divide(item, across_i), i0 = (item - c * across_i) * kTile;
    const int columns = at_most(I - i0, kTile);
    for (int64_t o0 = 0; o0 < O; o0 += kTile) {
      const int outputs = at_most(O - o0, kTile);
      // Of the thread in the tile that is copied next.
      const int first = opaque_thread();
      const float* x = Copy::own(static_cast<const float*>(a.x) + c * P * I + i0, I, first);
      int64_t at = (c * P + Copy::row(first)) * O + o0 + Copy::column(first);  // of grad and kept
      // Of `kept`; what does not come is not used, since the gradient is zero there.
      Pack<float, V> came[Copy::kTurns];
#pragma unroll
      for (int j = 0; j < Copy::kTurns; ++j) came[j] = zero_pack<V, float>();
      const auto copy = [&](int tile, int left) {
        const uint64_t items = TileItems::bits(words_of(tile));
        const int thread = opaque_thread();
        Copy::start(inputs(tile), x, I, items, columns, thread);
        const float* grad = static_cast<const float*>(a.grad) + at;
        Copy::start(grads(tile), grad, O, items, outputs, thread);
        const float* kept = static_cast<const float*>(a.kept) + at;
        at += kTile * O;
        const int rows =
            Copy::column(thread) < outputs ? at_most(left, kTile) - Copy::row(thread) : 0;
#pragma unroll
        for (int j = 0; j < Copy::kTurns; ++j) {
          load_where<V>(came[j], kept, j * Copy::kStep < rows);
          kept += Copy::kStep * O;
        }
      };
      TileItems now, next;
      now.load(a, c * P, int(P));
      next.load(a, c * P + kTile, int(P) - kTile);
      const float* weight =
          Copy::own(static_cast<const float*>(a.weight) + (c * O + o0) * I + i0, I, first);
      Copy::start(weights, weight, I, ~uint64_t{0} >> (kTile - outputs), columns, first);
      now.keep(a, words_of(0));
      next.keep(a, words_of(1));
      __syncthreads();
      copy(0, int(P));
      TileSums<float> sums;
      sums.clear();
      float bias = 0;
      int tile = 0;
      for (int left = int(P); left > 0; left -= kTile, ++tile) {
        const int rows = at_most(left, kTile);
        const auto to_x = [&](int thread) {
          return static_cast<float*>(a.grad_x) + ((c + 1) * P - left + tile_down(thread)) * I + i0 +
                 tile_across(thread) * kTileColumns;
        };
        if (of_x) {
          sums.clear();
          const int thread = opaque_thread() % kTileThreads;
          const int own_rows = rows - tile_down(thread),
                    own_columns = columns - tile_across(thread) * kTileColumns;
          if (o0 > 0 && own_columns > 0) {
            const float* from = to_x(thread);
#pragma unroll
            for (int r = 0; r < kTileRows; ++r) {
              if (r * kDown < own_rows) load_columns<V>(sums.row[r], from, own_columns);
              from += kDown * I;
            }
          }
        }
        copies_done();
        float* const own = Copy::own(grads(tile), opaque_thread());
#pragma unroll
        for (int j = 0; j < Copy::kTurns; ++j) {
          Pack<float, V> g = load_pack<V>(own + j * Copy::kStep * kTileStride);
#pragma unroll
          for (int v = 0; v < V; ++v) g.at[v] = came[j].at[v] > 0 ? g.at[v] * scale : 0.0f;
          store_pack<V>(own + j * Copy::kStep * kTileStride, g);
        }
        __syncthreads();
        const uint64_t items = TileItems::bits(words_of(tile));
        if (left > kTile) copy(tile + 1, left - kTile);
        next.load(a, (c + 1) * P - left + 2 * kTile, left - 2 * kTile);
        if (items && of_x) {
          multiply(sums, grads(tile), weights, outputs, opaque_thread() % kTileThreads);
        } else if (items) {
          const int thread = opaque_thread();
          multiply_transposed<kTile, kTurns>(sums, grads(tile), inputs(tile), rows, thread);
          if (i0 == 0 && thread < outputs) {
            const float* column = grads(tile) + thread;
#pragma unroll 1
            for (int p = 0; p < rows; p += 8, column += 8 * kTileStride) {
#pragma unroll
              for (int q = 0; q < 8; ++q) bias += column[q * kTileStride];
            }
          }
        }
        next.keep(a, words_of(tile + 2));
        if (of_x) {
          const int thread = opaque_thread() % kTileThreads;
          store_rows<V>(to_x(thread), sums, items >> tile_down(thread), I, rows - tile_down(thread),
                        columns - tile_across(thread) * kTileColumns);
        }
      }
      if (!of_x) {
        const int thread = opaque_thread(), row = tile_down(thread) * kTileRows,
                  across = tile_across(thread) * kTileColumns;
        float* to = static_cast<float*>(a.grad_weight) + (c * O + o0 + row) * I + i0 + across;
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) {
          if (row + r < outputs) store_columns<V>(to, sums.row[r], columns - across);
          to += I;
        }
        if (i0 == 0 && thread < outputs)
          static_cast<float*>(a.grad_bias)[c * O + o0 + thread] = bias;
      }
      __syncthreads();
    }
  }
}

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

constexpr int64_t kMostCounted = 1 << 30;  // positions, in 32 bits
template <bool Deep>
constexpr int64_t kSpanBytes = (Deep ? 4 : 3) * kCopied * int64_t(sizeof(float));

}  // namespace

void client_layer(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t work = clients * tiles(a.positions) * tiles(a.out_width);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    // A power of two divides both widths where it divides their union of bits.
    with_width<T>(
        a.in | a.out_width,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if constexpr (std::is_same_v<T, float>) {
            const int64_t across = tiles(a.out_width), all = tiles(a.positions);
            const auto launch_spans = [&](auto deep) {
              constexpr bool kDeep = decltype(deep)::value;
              if (kSpanBytes<kDeep> > limits().shared_bytes) return false;
              // Long enough to pay for the weights, short enough to fill the device.
              const int64_t wanted = 16 * limits().multiprocessors;
              int64_t span = work / wanted;
              span = span < 1 ? 1 : span < all ? span : all;
              if (span > kMostCounted / kTile) span = kMostCounted / kTile;
              const int64_t tasks = clients * ((all + span - 1) / span) * across;
              launch(forward_spans<V, kDeep>, tasks, kTileThreads, kSpanBytes<kDeep>, stream, a,
                     tasks, span);
              return true;
            };
            if (a.in > kTile ? launch_spans(std::true_type{})
                             : a.in > 0 && launch_spans(std::false_type{}))
              return;
          }
          launch(forward<T, V>, work, kTileThreads, kTileBytes<acc_t<T>>, stream, a, work);
        },
        a.x, a.weight, a.out);
  });
}

void client_layer_backward(const ClientLayerArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t across = a.in ? tiles(a.in) : 1;
  const int64_t work = clients * (tiles(a.out_width) + tiles(a.positions)) * across;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_width<T>(
        a.in | a.out_width,
        [&](auto width) {
          constexpr int V = decltype(width)::value;
          if constexpr (std::is_same_v<T, float>) {
            // Few clients with many outputs fill the device only where these are not one sum.
            if (a.in > 0 && a.out_width > 0 && a.positions > 0 && a.positions <= kMostCounted &&
                2 * kTogetherBytes <= limits().shared_bytes &&
                (a.out_width <= kTile || clients * across >= 2 * limits().multiprocessors)) {
              launch(backward_together<V>, clients * across, kTogetherThreads, kTogetherBytes,
                     stream, a, clients * across);
              return;
            }
          }
          launch(backward<T, V>, work, kTileThreads, kTileBytes<acc_t<T>>, stream, a, work);
        },
        a.x, a.weight, a.kept, a.grad, a.grad_x, a.grad_weight);
  });
}

}  // namespace fedpeft::gpu
