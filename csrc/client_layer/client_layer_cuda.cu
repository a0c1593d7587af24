// CUDA kernels of client_layer: small matrix products, one client's each. A block makes a tile of
// 64 x 64 elements of a result, a thread 8 x 4 of them in registers; the operands pass through
// shared memory. Every element is one chain in the order of the summed index. Padding is zero in
// shared memory, and tiles of nothing else are skipped, so that it changes no bit. Where one tile
// holds all inputs, the forward keeps the weights there and goes through a client's positions.
#include <type_traits>

#include "client_layer/client_layer_cuda.h"
#include "common/block.cuh"
#include "common/philox.h"
#include "common/streaming.cuh"
#include "common/tile.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kWarps = kTileThreads / kWarp;

FEDPEFT_DEVICE Dropout dropout_of(const ClientLayerArgs& a) {
  return {a.drop, a.threshold, a.scale, a.seed, a.round, a.stream};
}

// ReLU, dropout and padding of a tile of sums from (p0, o0), and its way to memory.
template <typename T, int V>
FEDPEFT_DEVICE void finish(const ClientLayerArgs& a, TileSums<acc_t<T>>& sums, int64_t c,
                           uint32_t client, int64_t p0, int64_t o0, int rows, int columns) {
  const int64_t O = a.out_width, P = a.positions;
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = tile_down() + r * kDown, column = tile_across() * kTileColumns;
    if (row >= rows || column >= columns) continue;
    const int64_t element = (p0 + row) * O + o0 + column;
    if (a.items[c * P + p0 + row] >= 0) {
      activate(dropout_of(a), client, element, sums.row[r]);
    } else {
      sums.row[r].clear();
    }
    store_columns<V>(static_cast<T*>(a.out) + c * P * O + element, sums.row[r], columns - column);
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
  FEDPEFT_SHARED(int, votes, kWarps);
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
    TileSums<A> sums;
    start_with(sums, static_cast<const T*>(a.bias) + c * O + o0, columns);
    for (int64_t i0 = 0; i0 < I; i0 += kDepth<A>) {
      const int depth = at_most(I - i0, kDepth<A>);
      bool mine = false;
      fill<kTile, kDepth<A>, V>(left, kDepthStride<A>, rows, depth, [&](int row, int k) {
        const bool valid = a.items[c * P + p0 + row] >= 0;
        mine |= valid;
        return keep_if(valid, values_at<V>(x + row * I + i0 + k));
      });
      fill_transposed<kTile, kDepth<A>, V, 4>(
          right, kTileStride, columns, depth,
          [&](int row, int k) { return values_at<V>(weight + row * I + i0 + k); });
      if (block_any(mine, votes)) multiply(sums, left, right, depth);
      __syncthreads();
    }
    finish<T, V>(a, sums, c, client, p0, o0, rows, columns);
  }
}

// Starts to copy rows of x to shared memory, zeros at padding and up to the tile's edges; whether
// the calling thread saw an item.
template <int V>
FEDPEFT_DEVICE bool copy_rows(const ClientLayerArgs& a, int64_t n0, int rows, float* to) {
  constexpr int kPacks = kTile / V;
  const float* x = static_cast<const float*>(a.x);
  bool any = false;
#pragma unroll 4
  for (int e = int(threadIdx.x); e < kTile * kPacks; e += kTileThreads) {
    const int row = e / kPacks, column = e % kPacks * V;
    const bool valid = row < rows && a.items[n0 + row] >= 0;
    any |= valid;
    if (valid && column < a.in) {
      copy_to_shared<V>(to + row * kTileStride + column, x + (n0 + row) * a.in + column);
    } else {
      store_pack<V>(to + row * kTileStride + column, zero_pack<V, float>());
    }
  }
  return any;
}

// Inputs that one tile holds, of float: a block keeps the weights while it goes through `span`
// tiles of its client's positions, of which the next is on its way into shared memory while it
// works on one.
template <int V>
__global__ void __launch_bounds__(kTileThreads, 4)
    forward_spans(ClientLayerArgs a, int64_t work, int64_t span) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(int, votes, kWarps);
  float* right = reinterpret_cast<float*>(shared);  // of weight [in, kTile], transposed
  const int64_t O = a.out_width, P = a.positions;
  const int64_t across_o = (O + kTile - 1) / kTile, down_p = (P + kTile - 1) / kTile;
  const int64_t spans = (down_p + span - 1) / span;
  const auto left = [&](int64_t tile) { return right + (1 + (tile & 1)) * kOperand<float>; };
  for (int64_t item = blockIdx.x; item < work; item += gridDim.x) {
    const int64_t n = divide(item, across_o), c = divide(n, spans);
    const int64_t o0 = (item - n * across_o) * kTile, first = (n - c * spans) * span;
    const int64_t last = first + span < down_p ? first + span : down_p;
    const int columns = at_most(O - o0, kTile), inputs = int(a.in);
    const uint32_t client = client_at(a, c);
    const float* weight = static_cast<const float*>(a.weight) + (c * O + o0) * a.in;
    const auto copy = [&](int64_t tile) {
      const int64_t p0 = tile * kTile;
      return copy_rows<V>(a, c * P + p0, at_most(P - p0, kTile), left(tile));
    };
    bool mine = copy(first);
    commit_copies();
    fill_transposed<kTile, kTile, V, 4>(right, kTileStride, columns, inputs, [&](int row, int k) {
      return values_at<V>(weight + row * a.in + k);
    });
    for (int64_t tile = first; tile < last; ++tile) {
      const bool here = mine;
      if (tile + 1 < last) mine = copy(tile + 1);
      commit_copies();
      wait_for_copies<1>();
      TileSums<float> sums;
      start_with(sums, static_cast<const float*>(a.bias) + c * O + o0, columns);
      if (block_any(here, votes)) multiply(sums, left(tile), right, inputs);
      const int64_t p0 = tile * kTile;
      finish<float, V>(a, sums, c, client, p0, o0, at_most(P - p0, kTile), columns);
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
                                    acc_t<T>* left, acc_t<T>* right, int* votes) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width, P = a.positions;
  const int rows = at_most(O - o0, kTile), columns = at_most(I - i0, kTile);
  const int mine_o = int(threadIdx.x);
  TileSums<A> sums;
  sums.clear();
  A bias = 0;
  for (int64_t p0 = 0; p0 < P; p0 += kDepth<A>) {
    const int depth = at_most(P - p0, kDepth<A>);
    const int64_t n0 = c * P + p0;
    bool mine = false;
    fill<kDepth<A>, kTile, V, 4>(left, kTileStride, depth, rows, [&](int p, int o) {
      const bool valid = a.items[n0 + p] >= 0;
      mine |= valid;
      return before<V, T>(a, n0 + p, o0 + o, valid);
    });
    if (columns)
      fill<kDepth<A>, kTile, V>(right, kTileStride, depth, columns, [&](int p, int i) {
        return keep_if(a.items[n0 + p] >= 0,
                       values_at<V>(static_cast<const T*>(a.x) + (n0 + p) * I + i0 + i));
      });
    if (block_any(mine, votes)) {
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
                               acc_t<T>* left, acc_t<T>* right, int* votes) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width, n0 = c * a.positions + p0;
  const int rows = at_most(a.positions - p0, kTile), columns = at_most(I - i0, kTile);
  if (columns == 0) return;
  TileSums<A> sums;
  sums.clear();
  for (int64_t o0 = 0; o0 < O; o0 += kDepth<A>) {
    const int depth = at_most(O - o0, kDepth<A>);
    bool mine = false;
    fill<kTile, kDepth<A>, V, 4>(left, kDepthStride<A>, rows, depth, [&](int p, int o) {
      const bool valid = a.items[n0 + p] >= 0;
      mine |= valid;
      return before<V, T>(a, n0 + p, o0 + o, valid);
    });
    fill<kDepth<A>, kTile, V>(right, kTileStride, depth, columns, [&](int o, int i) {
      return values_at<V>(static_cast<const T*>(a.weight) + (c * O + o0 + o) * I + i0 + i);
    });
    if (block_any(mine, votes)) multiply(sums, left, right, depth);
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const int row = tile_down() + r * kDown, column = tile_across() * kTileColumns;
    if (row >= rows || column >= columns) continue;
    store_columns<V>(static_cast<T*>(a.grad_x) + (n0 + row) * I + i0 + column,
                     keep_if(a.items[n0 + row] >= 0, sums.row[r]), columns - column);
  }
}

// The tiles of a client stand together, so that the second reader of its gradients finds them in
// L2; first those of the weights, which are the longest sums.
template <typename T, int V>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<acc_t<T>>)
    backward(ClientLayerArgs a, int64_t work) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  FEDPEFT_SHARED(int, votes, kWarps);
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
      backward_weight<T, V>(a, c, tile * kTile, i0, left, right, votes);
    } else {
      backward_x<T, V>(a, c, (tile - down_o) * kTile, i0, left, right, votes);
    }
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
