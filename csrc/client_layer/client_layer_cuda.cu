// CUDA kernels of client_layer: small matrix products, one client's each. A block makes a tile of
// 64 x 64 elements of a result, a thread 8 x 4 of them in registers; the operands pass through
// shared memory. Every element is one chain in the order of the summed index. Padding is zero in
// shared memory, and tiles of nothing else are skipped, so that it changes no bit. Where one tile
// holds all inputs, the forward keeps the weights there and goes through a client's positions.
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

// ReLU, dropout and padding of a tile of sums from (p0, o0), and its way to memory.
template <typename T, int V>
FEDPEFT_DEVICE void finish(const ClientLayerArgs& a, TileSums<acc_t<T>>& sums, int64_t c,
                           uint32_t client, int64_t p0, int64_t o0, int rows, int columns,
                           uint64_t items) {
  const int64_t O = a.out_width, P = a.positions;
  const int column = tile_across() * kTileColumns;
  if (column >= columns) return;
  int64_t element = (p0 + tile_down()) * O + o0 + column;
  T* out = static_cast<T*>(a.out) + c * P * O + element;
  items >>= tile_down();
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    if (tile_down() + r * kDown >= rows) break;
    if (has_item(items, r * kDown)) {
      activate<V % 4 == 0>(dropout_of(a), client, element, sums.row[r]);
    } else {
      sums.row[r].clear();
    }
    store_columns<V>(out, sums.row[r], columns - column);
    element += kDown * O;
    out += kDown * O;
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
    finish<T, V>(a, sums, c, client, p0, o0, rows, columns, items);
    __syncthreads();
  }
}

// Starts to copy rows of x to shared memory, zeros at padding and up to the tile's edges.
template <int V>
FEDPEFT_DEVICE void copy_rows(const ClientLayerArgs& a, int64_t n0, uint64_t items, float* to) {
  constexpr int kPacks = kTile / V, kStep = kTileThreads / kPacks;  // rows at a time
  const int row = int(threadIdx.x) / kPacks, column = int(threadIdx.x) % kPacks * V;
  const float* from = static_cast<const float*>(a.x) + (n0 + row) * a.in + column;
  const bool inside = column < a.in;
  items >>= row;
  to += row * kTileStride + column;
#pragma unroll 8
  for (int r = 0; r < kTile; r += kStep) {
    if (inside && has_item(items, r)) {
      copy_to_shared<V>(to, from);
    } else {
      store_pack<V>(to, zero_pack<V, float>());
    }
    from += kStep * a.in;
    to += kStep * kTileStride;
  }
}

// Inputs that one tile holds, of float: a block keeps the weights while it goes through `span`
// tiles of its client's positions, of which the next is on its way into shared memory while it
// works on one, and the items of the one behind it.
template <int V>
__global__ void __launch_bounds__(kTileThreads, 4)
    forward_spans(ClientLayerArgs a, int64_t work, int64_t span) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(unsigned, words, 4 * TileItems::kWords);  // of four tiles in turn
  float* right = reinterpret_cast<float*>(shared);         // of weight [in, kTile], transposed
  const int64_t O = a.out_width, P = a.positions;
  const int64_t across_o = (O + kTile - 1) / kTile, down_p = (P + kTile - 1) / kTile;
  const int64_t spans = (down_p + span - 1) / span;
  const auto left = [&](int64_t tile) { return right + (1 + (tile & 1)) * kOperand<float>; };
  const auto words_of = [&](int64_t tile) { return words + (tile & 3) * TileItems::kWords; };
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t n = divide(item, across_o), c = divide(n, spans);
    const int64_t o0 = (item - n * across_o) * kTile, first = (n - c * spans) * span;
    const int64_t last = first + span < down_p ? first + span : down_p;
    const int columns = at_most(O - o0, kTile), inputs = int(a.in);
    const uint32_t client = client_at(a, c);
    const float* weight = static_cast<const float*>(a.weight) + (c * O + o0) * a.in;
    const auto load_items = [&](TileItems& items, int64_t tile) {
      items.load(a, c * P + tile * kTile, tile < last ? at_most(P - tile * kTile, kTile) : 0);
    };
    const auto copy = [&](int64_t tile) {
      copy_rows<V>(a, c * P + tile * kTile, TileItems::bits(words_of(tile)), left(tile));
    };
    TileItems now, next;
    load_items(now, first);
    load_items(next, first + 1);
    now.keep(a, words_of(first));
    next.keep(a, words_of(first + 1));
    __syncthreads();
    copy(first);
    commit_copies();
    fill_transposed<kTile, kTile, V, 4>(right, kTileStride, columns, inputs, [&](int row, int k) {
      return values_at<V>(weight + row * a.in + k);
    });
    TileSums<float> start;
    start_with(start, static_cast<const float*>(a.bias) + c * O + o0, columns);
    const Sum<float, kTileColumns> bias = start.row[0];
    for (int64_t tile = first; tile < last; ++tile) {
      if (tile + 1 < last) copy(tile + 1);
      commit_copies();
      load_items(next, tile + 2);
      wait_for_copies<1>();
      __syncthreads();
      const uint64_t items = TileItems::bits(words_of(tile));
      TileSums<float> sums;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) sums.row[r] = bias;
      if (items) multiply(sums, left(tile), right, inputs);
      next.keep(a, words_of(tile + 2));
      const int64_t p0 = tile * kTile;
      finish<float, V>(a, sums, c, client, p0, o0, at_most(P - p0, kTile), columns, items);
      __syncthreads();
    }
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

int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }

constexpr int64_t kSpanBytes = 3 * kOperand<float> * int64_t(sizeof(float));

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
            if (a.in > 0 && a.in <= kTile && kSpanBytes <= limits().shared_bytes) {
              // Long enough to pay for the weights, short enough to fill the device.
              const int64_t across = tiles(a.out_width), all = tiles(a.positions);
              const int64_t wanted = 16 * limits().multiprocessors;
              int64_t span = work / wanted;
              span = span < 1 ? 1 : span < all ? span : all;
              const int64_t tasks = clients * ((all + span - 1) / span) * across;
              launch(forward_spans<V>, tasks, kTileThreads, kSpanBytes, stream, a, tasks, span);
              return;
            }
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
          launch(backward<T, decltype(width)::value>, work, kTileThreads, kTileBytes<acc_t<T>>,
                 stream, a, work);
        },
        a.x, a.weight, a.kept, a.grad, a.grad_x, a.grad_weight);
  });
}

}  // namespace fedpeft::gpu
