// The MLP that scores [user vector, item vector] in place of their dot product, on the GPU; the
// semantics are those of mlp.h.
//
// A step works on kMlpRows scores at a time, pairs of a positive and a negative together: forward
// through all layers, the loss's slope, and backward at once, so that what the layers leave is
// needed for one block of scores only; gradients take its place on the way back. Products go
// through tiles in shared memory. Weights, their gradients and moments, and what layers leave, lie
// in shared memory while there is room, then in the block's part of `scratch`, which is to stay in
// the second-level cache. Rows of it are whole vectors, with zeros behind, so that there is one
// kernel for all widths.
//
// Every sum over scores is one chain in their order, or joins those of blocks in their order. The
// gradients of rows are made at the end of a step, from those of the scores' item vectors: a row
// sums its entries'. LoRA's factors take products with these sums, of which there are fewer than
// scores.
//
// The columns of the first layer that read the user vector are used once a step.
#pragma once

#include "common/tile.cuh"
#include "local_train/client.cuh"

namespace fedpeft::gpu {

// Scores worked on together: the rows of a tile.
constexpr int kMlpRows = 128;
static_assert(kThreadsOf<kMlpRows> == kThreads);

// Elements of shared memory for the operands of a tile.
template <typename T>
constexpr int kLeftRoom = kMlpRows * kDepthStride<T> > kDepth<T>*(kMlpRows + kGap)
                              ? kMlpRows * kDepthStride<T>
                              : kDepth<T> * (kMlpRows + kGap);
template <typename T>
constexpr int kRightRoom = kDepth<T> * kTileStride;
template <typename T>
constexpr int64_t kTilesBytes = (kLeftRoom<T> + kRightRoom<T>)*int64_t(sizeof(T));

// They lie first in it, which no pointer has to say.
template <typename T>
FEDPEFT_DEVICE T* left_operand() {
  FEDPEFT_DYNAMIC_SHARED(shared);
  return reinterpret_cast<T*>(shared);
}

// Loads of an operand that a thread has under way: more would not fit beside the sums.
constexpr int kMlpLoads = 2;

template <typename T>
__host__ __device__ inline int64_t whole_vectors(int64_t n) {
  return (n + kWide<T> - 1) / kWide<T> * kWide<T>;
}

// As for_all.
template <typename F>
FEDPEFT_DEVICE void share(int64_t count, const F& f) {
  for (int64_t i = opaque_thread(); i < count; i += kThreads) f(i);
}

// A parameter of the MLP, or columns of it: `table` has its rows with zeros behind them.
template <typename T>
struct MlpPart {
  Table<T> table;
  T* grad;
  int rows, width;  // without the zeros
  int64_t pitch;    // from row to row of the call's tensor

  __host__ __device__ void lay_out(Arena& arena, const LocalTrainArgs& a, int64_t rows_,
                                   int64_t width_, int64_t pitch_) {
    rows = int(rows_);
    width = int(width_);
    pitch = pitch_;
    table.width = int(whole_vectors<T>(width_));
    const int64_t count = rows_ * table.width;
    table.p = arena.take<T>(count);
    grad = arena.take<T>(count);
    table.m = a.adam ? arena.take<T>(count) : nullptr;
    table.v = a.adam ? arena.take<T>(count) : nullptr;
    table.start = !a.own_mlp && a.prox > 0 ? arena.take<T>(count) : nullptr;
    table.dots = nullptr;
  }
};

template <typename T>
struct MlpLayer {
  MlpPart<T> weight, bias;  // weight: of the first layer the columns that read the item
  T* out;                   // [kMlpRows, stride], of a block; on the way back its gradient
  int width, stride;
};

template <typename T>
struct MlpWorkspace : Workspace<T> {
  using Workspace<T>::size, Workspace<T>::draws, Workspace<T>::items, Workspace<T>::codewords,
      Workspace<T>::buckets, Workspace<T>::user, Workspace<T>::table, Workspace<T>::A,
      Workspace<T>::B, Workspace<T>::codebooks, Workspace<T>::hashed, Workspace<T>::user_grad,
      Workspace<T>::partial, Workspace<T>::scores, Workspace<T>::coefficients;

  int depth;  // layers
  // The number of the step, its epoch, where in its order it starts, and its pairs: here, since the
  // products need the registers.
  int step, epoch, start, pairs;
  int steps, most;  // of the client, and the most pairs of one
  double loss;      // sum over steps
  T drop_scale;
  MlpLayer<T>* layers;
  MlpPart<T> user_weight, output;
  double* losses;  // [kMlpRows / 2], of the pairs at a place of a block
  T* first_bias;   // of the first layer, with its part of the user vector
  T* input;        // [kMlpRows, input_stride]: item vectors of a block
  T* input_grads;  // [batch, input_stride]: their gradients, of a step
  int input_stride;
  // Gradients of rows, as their tables. Those of items are of whole vectors, for A too.
  T *items_grad, *A_grad, *B_grad, *codebooks_grad, *hashed_grad;

  // The client of n items. In the order of use in a step: the first pieces get shared memory.
  __host__ __device__ void lay_out(Arena& arena, const LocalTrainArgs& a, int64_t n) {
    const int64_t all = n * (1 + a.epochs);
    const int64_t batch = 2 * (a.batch > 0 && a.batch < n ? a.batch : n);
    size = int(n);
    draws = int(all);
    depth = int(a.layers);
    input_stride = int(whole_vectors<T>(a.D));
    arena.take<char>(kTilesBytes<T>);
    user.lay_out(arena, a, a.user, 1, a.user_width, false);
    user_grad = arena.take<T>(a.user_width);
    int64_t widest = a.user_width;
    for (int64_t l = 0; l < a.layers; ++l) widest = a.widths[l] > widest ? a.widths[l] : widest;
    const int64_t narrow = column_sums_scratch(kWarp, kThreads);
    const int64_t wide = column_sums_scratch(widest, kThreads);
    partial = arena.take<T>(wide > narrow ? wide : narrow);
    losses = arena.take<double>(kMlpRows / 2);
    scores = arena.take<T>(kMlpRows);
    coefficients = arena.take<T>(kMlpRows);
    first_bias = arena.take<T>(whole_vectors<T>(a.widths[0]));
    layers = arena.take<MlpLayer<T>>(a.layers);
    input = arena.take<T>(kMlpRows * input_stride);
    for (int64_t l = 0; l < a.layers; ++l) {
      T* const out = arena.take<T>(kMlpRows * whole_vectors<T>(a.widths[l]));
      if (layers) layers[l].out = out;
    }
    lay_out_rows(arena, a, all, batch);
    for (int64_t l = 0; l < a.layers; ++l) {
      MlpLayer<T> layer;
      const int64_t in = l ? a.widths[l - 1] : a.D, out = a.widths[l];
      if (l == 0) user_weight.lay_out(arena, a, out, a.user_width, a.user_width + a.D);
      layer.weight.lay_out(arena, a, out, in, l ? in : a.user_width + a.D);
      layer.bias.lay_out(arena, a, 1, out, out);
      layer.width = int(out);
      layer.stride = layer.bias.table.width;
      if (!layers) continue;
      layer.out = layers[l].out;
      layers[l] = layer;
    }
    const int64_t last = a.widths[a.layers - 1];
    output.lay_out(arena, a, 1, last, last);
    this->lay_out_draws(arena, a);
  }

  // The steps of the client, of which the epochs have equally many.
  FEDPEFT_DEVICE void start_steps(const LocalTrainArgs& a) {
    most = a.batch > 0 && a.batch < size ? int(a.batch) : size;
    steps = size ? int(a.epochs) * ((size + most - 1) / most) : 0;
    loss = 0;
    drop_scale = T(a.drop_scale);
    go_to(0);
  }
  FEDPEFT_DEVICE void go_to(int next) {
    step = next;
    if (step >= steps) return;
    const int each = (size + most - 1) / most;
    epoch = step / each;
    start = (step - epoch * each) * most;
    pairs = size - start < most ? size - start : most;
  }

  // The rows of the item's vector.
  __host__ __device__ void lay_out_rows(Arena& arena, const LocalTrainArgs& a, int64_t all,
                                        int64_t batch) {
    if (a.table || a.A) items.lay_out(arena, a.num_items, 1, all, batch, false);
    if (a.codebooks) codewords.lay_out(arena, a.L * a.K, a.L, all, batch, false);
    if (a.buckets) buckets.lay_out(arena, a.M, a.H, all, batch, false);
    if (a.table || a.A) items_grad = arena.take<T>(items.capacity * a.D);
    if (a.A) {
      B.lay_out(arena, a, a.B, a.D, a.rank);
      B_grad = arena.take<T>(a.D * a.rank);
      A.lay_out(arena, a, a.A, items.capacity, a.rank);
      A_grad = arena.take<T>(items.capacity * a.rank);
    }
    if (a.codebooks) {
      codebooks.lay_out(arena, a, a.codebooks, codewords.capacity, a.D);
      codebooks_grad = arena.take<T>(codewords.capacity * a.D);
    }
    if (a.buckets) {
      hashed.lay_out(arena, a, a.buckets, buckets.capacity, a.D);
      hashed_grad = arena.take<T>(buckets.capacity * a.D);
    }
    if (a.table) table.lay_out(arena, a, a.table, items.capacity, a.D);
    input_grads = arena.take<T>(batch * input_stride);
  }
};

// Calls f(part, tensor, offset) for every parameter, which begins at element `offset` of tensor
// `tensor` of the arguments.
template <typename T, typename F>
FEDPEFT_DEVICE void for_parts(MlpWorkspace<T>& w, const F& f) {
  for (int at = -1; at <= 2 * w.depth; ++at) {
    MlpPart<T>& part = at < 0              ? w.user_weight
                       : at == 2 * w.depth ? w.output
                       : at % 2            ? w.layers[at / 2].bias
                                           : w.layers[at / 2].weight;
    f(part, at < 0 ? 0 : at, at == 0 ? w.user_weight.width : 0);
  }
}

// Where a part's tensor [rows, pitch] of a client begins: one of all, or of its own.
template <typename T>
FEDPEFT_DEVICE const T* source_of(const LocalTrainArgs& a, const MlpWorkspace<T>& w,
                                  const MlpPart<T>& part, int tensor, int offset) {
  const T* const from = static_cast<const T*>(a.mlp[tensor]) + offset;
  return a.own_mlp ? from + int64_t(w.place) * part.rows * part.pitch : from;
}

template <typename T>
FEDPEFT_DEVICE void start_mlp(const LocalTrainArgs& a, MlpWorkspace<T>& w) {
  for_parts(w, [&](const MlpPart<T>& part, int tensor, int offset) {
    const T* const source = source_of(a, w, part, tensor, offset);
    const Table<T>& t = part.table;
    share(int64_t(part.rows) * t.width, [&](int64_t i) {
      const int64_t row = divide(i, t.width), column = i - row * t.width;
      const T value = column < part.width ? source[row * part.pitch + column] : T(0);
      t.p[i] = value;
      if (t.start) t.start[i] = value;
      if (t.m) t.m[i] = t.v[i] = 0;
    });
  });
}

// The upload, or the new values of an MLP of the client's own.
template <typename T>
FEDPEFT_DEVICE void write_mlp(const LocalTrainArgs& a, MlpWorkspace<T>& w) {
  for_parts(w, [&](const MlpPart<T>& part, int tensor, int offset) {
    const T* const source = source_of(a, w, part, tensor, offset);
    T* const out =
        static_cast<T*>(a.d_mlp[tensor]) + int64_t(w.place) * part.rows * part.pitch + offset;
    share(int64_t(part.rows) * part.width, [&](int64_t i) {
      const int64_t row = divide(i, part.width), column = i - row * part.width;
      const int64_t to = row * part.pitch + column;
      const T value = part.table.p[row * part.table.width + column];
      out[to] = a.own_mlp ? value : value - source[to];
    });
  });
}

// Vectors of the items of `rows` scores from score `at` of a step on.
template <typename T>
FEDPEFT_DEVICE void gather_vectors(const LocalTrainArgs& a, const MlpWorkspace<T>& w, int at,
                                   int rows) {
  constexpr int N = 4;  // elements of a thread whose loads are under way together
  const T *const base = static_cast<const T*>(a.base), scale = row_scale<T>(a);
  const int stride = w.input_stride, D = int(a.D), rank = int(a.rank), all = rows * stride;
#pragma unroll 1
  for (int first = opaque_thread(); first < all; first += N * kThreads) {
    int column[N];  // where there is none, the first: its loads are for nothing
    int64_t draw[N];
    T sum[N] = {};
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int i = first + u * kThreads < all ? first + u * kThreads : first, r = i / stride;
      column[u] = i - r * stride < D ? i - r * stride : 0;
      draw[u] = draw_of(w, w.epoch, w.start, at + r);
    }
    if (base) {
#pragma unroll
      for (int u = 0; u < N; ++u) sum[u] = base[w.item_of[draw[u]] * D + column[u]];
    }
    if (a.table) {
#pragma unroll
      for (int u = 0; u < N; ++u) sum[u] += w.table.p[int64_t(w.items.at[draw[u]]) * D + column[u]];
    }
    if (a.A) {
      const T *of_A[N], *of_B[N];
      T product[N] = {};
#pragma unroll
      for (int u = 0; u < N; ++u) {
        of_A[u] = w.A.p + int64_t(w.items.at[draw[u]]) * rank;
        of_B[u] = w.B.p + column[u] * rank;
      }
      for (int j = 0; j < rank; ++j) {
#pragma unroll
        for (int u = 0; u < N; ++u) product[u] += of_B[u][j] * of_A[u][j];
      }
#pragma unroll
      for (int u = 0; u < N; ++u) sum[u] += product[u];
    }
    if (a.codebooks) {
      for (int64_t j = 0; j < a.L; ++j) {
#pragma unroll
        for (int u = 0; u < N; ++u)
          sum[u] += w.codebooks.p[int64_t(w.codewords.at[draw[u] * a.L + j]) * D + column[u]];
      }
    }
    if (a.buckets) {
      T added[N] = {};
      for (int64_t h = 0; h < a.H; ++h) {
#pragma unroll
        for (int u = 0; u < N; ++u)
          added[u] += w.hashed.p[int64_t(w.buckets.at[draw[u] * a.H + h]) * D + column[u]];
      }
#pragma unroll
      for (int u = 0; u < N; ++u) sum[u] += scale * added[u];
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int i = first + u * kThreads;
      if (i < all) w.input[i] = i % stride < D ? sum[u] : T(0);
    }
  }
}

// The left operand of a product: values [rows, width] of a block from column k0 on.
template <typename T>
FEDPEFT_DEVICE void fill_left(T* left, const T* from, int width, int k0, int rows, int depth,
                              int thread) {
  constexpr int V = kWide<T>;
  fill<kMlpRows, kDepth<T>, V, kMlpLoads, kThreads>(
      left, kDepthStride<T>, rows, depth,
      [&](int row, int k) { return values_at<V>(from + row * width + k0 + k); }, thread);
}

// What layer l makes of a block of `rows` scores, before dropout.
template <typename T>
FEDPEFT_DEVICE void forward_layer(const MlpWorkspace<T>& w, int l, int rows) {
  constexpr int V = kWide<T>;
  const int thread = opaque_thread();
  const MlpLayer<T>& layer = w.layers[l];
  const T* const x = l ? w.layers[l - 1].out : w.input;
  const T *const weight = layer.weight.table.p, *const bias = l ? layer.bias.table.p : w.first_bias;
  const int in = layer.weight.table.width, width = layer.width, stride = layer.stride;
  T *const left = left_operand<T>(), *const right = left + kLeftRoom<T>;
  const T scale = w.drop_scale;
  for (int o0 = 0; o0 < width; o0 += kTile) {
    const int columns = at_most(width - o0, kTile);
    TileSums<T> sums;
    start_with(sums, bias + o0, columns, thread);
    for (int i0 = 0; i0 < in; i0 += kDepth<T>) {
      const int depth = at_most(in - i0, kDepth<T>);
      fill_left(left, x, in, i0, rows, depth, thread);
      fill_transposed<kTile, kDepth<T>, V, kMlpLoads, kThreads>(
          right, kTileStride, columns, depth,
          [&](int o, int k) { return values_at<V>(weight + int64_t(o0 + o) * in + i0 + k); },
          thread);
      __syncthreads();
      multiply<kMlpRows>(sums, left, right, depth, thread);
      __syncthreads();
    }
    const int column = tile_across(thread) * kTileColumns;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const int row = tile_down(thread) + r * kDownOf<kMlpRows>;
      if (row >= rows || o0 + column >= stride) continue;
#pragma unroll
      for (int v = 0; v < kTileColumns; ++v) {  // zeros behind, also where infinities left NaNs
        const T sum = sums.row[r].at[v];
        sums.row[r].at[v] = column + v >= columns || sum < T(0) ? T(0) : sum * scale;
      }
      store_columns<V, true>(layer.out + row * stride + o0 + column, sums.row[r],
                             stride - o0 - column);
    }
  }
}

// Dropout of what layer l gave to a block, of which the first is score `at` of the step: element e
// of a step's outputs [scores, width] is dropped as in client_dropout. Apart from the products,
// whose registers the words would need.
template <typename T>
FEDPEFT_DEVICE void drop_units(const LocalTrainArgs& a, const MlpWorkspace<T>& w, int l, int64_t at,
                               int rows) {
  const MlpLayer<T>& layer = w.layers[l];
  const uint32_t stream = philox_stream(Purpose::dropout, uint32_t(l), uint32_t(w.epoch));
  const int width = layer.width, all = rows * width;
  static_assert(kMlpRows % 4 == 0);  // blocks of words begin with those of scores
  const int64_t first = at * width / 4;
  share((all + 3) / 4, [&](int64_t q) {
    const PhiloxBlock words =
        philox(uint32_t(first + q), uint32_t(w.client), a.round, stream, a.seed);
    int row = 4 * int(q) / width, column = 4 * int(q) - row * width;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (4 * int(q) + i < all && words.word[i] < a.drop_threshold)
        layer.out[row * layer.stride + column] = 0;
      if (++column == width) {
        column = 0;
        ++row;
      }
    }
  });
}

// The sums of a thread to a gradient [O, in] from (o0, i0) on, or from it. `flipped`: the tile's
// rows are inputs.
template <typename T, typename Move>
FEDPEFT_DEVICE void for_gradients(const MlpPart<T>& part, bool flipped, int row0, int column0,
                                  int thread, const Move& move) {
  constexpr int V = kWide<T>;
  const int in = part.table.width, row = row0 + tile_down(thread) * kTileRows,
            column = column0 + tile_across(thread) * kTileColumns;
  if (flipped) {
#pragma unroll
    for (int v = 0; v < kTileColumns; ++v) {
#pragma unroll
      for (int r = 0; r < kTileRows; r += V) {
        if (column + v < part.rows && row + r < in)
          move(part.grad + int64_t(column + v) * in + row + r, row + r,
               [=](auto& sums, int k) -> T& { return sums.row[r + k].at[v]; });
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
#pragma unroll
      for (int v = 0; v < kTileColumns; v += V) {
        if (row + r < part.rows && column + v < in)
          move(part.grad + int64_t(row + r) * in + column + v, column + v,
               [=](auto& sums, int k) -> T& { return sums.row[r].at[v + k]; });
      }
    }
  }
}

// The gradient of layer l's weights from a block of scores, in place of what is there (`fresh`) or
// upon it: one chain in the order of the scores.
template <typename T>
FEDPEFT_DEVICE void backward_weight(const MlpWorkspace<T>& w, int l, int rows, bool fresh) {
  constexpr int V = kWide<T>;
  const int thread = opaque_thread();
  const MlpLayer<T>& layer = w.layers[l];
  const MlpPart<T>& part = layer.weight;
  const int in = part.table.width;
  // A tile has more rows than columns.
  const bool flipped = layer.stride <= kTile && in > kTile;
  const T* const x = l ? w.layers[l - 1].out : w.input;
  const T *const across = flipped ? layer.out : x, *const down = flipped ? x : layer.out;
  const int columns = flipped ? layer.stride : in, tall = flipped ? in : layer.stride;
  T *const left = left_operand<T>(), *const right = left + kLeftRoom<T>;
  for (int r0 = 0; r0 < tall; r0 += kMlpRows) {
    for (int c0 = 0; c0 < columns; c0 += kTile) {
      TileSums<T> sums;
      sums.clear();
      if (!fresh) {
        for_gradients(part, flipped, r0, c0, thread, [&](T* grad, int, const auto& place) {
          const Pack<T, V> pack = load_pack<V>(grad);
#pragma unroll
          for (int k = 0; k < V; ++k) place(sums, k) = pack.at[k];
        });
      }
      for (int p0 = 0; p0 < rows; p0 += kDepth<T>) {
        const int depth = at_most(rows - p0, kDepth<T>);
        fill<kDepth<T>, kMlpRows, V, kMlpLoads, kThreads>(
            left, kMlpRows + kGap, depth, at_most(tall - r0, kMlpRows),
            [&](int p, int o) { return values_at<V>(down + (p0 + p) * tall + r0 + o); }, thread);
        fill<kDepth<T>, kTile, V, kMlpLoads, kThreads>(
            right, kTileStride, depth, at_most(columns - c0, kTile),
            [&](int p, int i) { return values_at<V>(across + (p0 + p) * columns + c0 + i); },
            thread);
        __syncthreads();
        multiply_transposed<kMlpRows>(sums, left, right, depth, thread);
        __syncthreads();
      }
      for_gradients(part, flipped, r0, c0, thread, [&](T* grad, int i, const auto& place) {
        Pack<T, V> pack;
#pragma unroll
        for (int k = 0; k < V; ++k) pack.at[k] = i + k < part.width ? place(sums, k) : T(0);
        store_whole_pack<V, true>(grad, pack);
      });
    }
  }
}

// The gradient of what layer l reads, from that of its output: of the item vectors from score `at`
// of the step on, or in place of the output of the layer before.
template <typename T>
FEDPEFT_DEVICE void backward_input(const MlpWorkspace<T>& w, int l, int64_t at, int rows) {
  constexpr int V = kWide<T>;
  const int thread = opaque_thread();
  const MlpLayer<T>& layer = w.layers[l];
  const T *const above = layer.out, *const weight = layer.weight.table.p;
  const int in = layer.weight.table.width, width = layer.width, stride = layer.stride;
  T *const left = left_operand<T>(), *const right = left + kLeftRoom<T>;
  T* const below = l ? w.layers[l - 1].out : w.input_grads + at * in;
  const T scale = w.drop_scale;
  for (int i0 = 0; i0 < in; i0 += kTile) {
    const int columns = at_most(in - i0, kTile);
    TileSums<T> sums;
    sums.clear();
    for (int o0 = 0; o0 < width; o0 += kDepth<T>) {
      const int depth = at_most(width - o0, kDepth<T>);
      fill_left(left, above, stride, o0, rows, depth, thread);
      fill<kDepth<T>, kTile, V, kMlpLoads, kThreads>(
          right, kTileStride, depth, columns,
          [&](int o, int i) { return values_at<V>(weight + int64_t(o0 + o) * in + i0 + i); });
      __syncthreads();
      multiply<kMlpRows>(sums, left, right, depth, thread);
      __syncthreads();
    }
    const int column = tile_across(thread) * kTileColumns;
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const int row = tile_down(thread) + r * kDownOf<kMlpRows>;
      if (row >= rows || column >= columns) continue;
      T* const to = below + row * in + i0 + column;
#pragma unroll
      for (int v = 0; v < kTileColumns; ++v) {
        if (l > 0 && column + v < columns)
          sums.row[r].at[v] = to[v] > T(0) ? scale * sums.row[r].at[v] : T(0);
      }
      store_columns<V, true>(to, sums.row[r], columns - column);
    }
  }
}

// Scores of a block, and the slopes of the loss, which is added to that of the step.
template <typename T>
FEDPEFT_DEVICE void score_block(const LocalTrainArgs& a, const MlpWorkspace<T>& w, int rows) {
  const MlpLayer<T>& last = w.layers[w.depth - 1];
  const T *const out = last.out, *const output = w.output.table.p;
  row_sums<T>(
      last.width, rows, [&](int r, int d) { return out[r * last.stride + d] * output[d]; },
      [&](int r, T sum) { w.scores[r] = sum; });
  __syncthreads();
  const double loss = slopes(a, w.scores, w.coefficients, rows / 2, w.pairs);
  if (2 * int(threadIdx.x) < rows) w.losses[threadIdx.x] += loss;
  __syncthreads();
}

// Adds the gradients of a block of scores, the first of which is score `at` of the step, to those
// of the MLP, and leaves those of the item vectors.
template <typename T>
FEDPEFT_DEVICE void backward(const MlpWorkspace<T>& w, int64_t at, int rows) {
  const T scale = w.drop_scale;
  const MlpLayer<T>& last = w.layers[w.depth - 1];
  const T *const coefficients = w.coefficients, *const output = w.output.table.p;
  T* const out = last.out;
  const int stride = last.stride;
  column_sums(
      last.width, rows, w.partial,
      [&](int r, int d) { return coefficients[r] * out[r * stride + d]; },
      [&](int d, T sum) { w.output.grad[d] += sum; });
  share(rows * stride, [&](int64_t i) {
    const int r = int(i) / stride, d = int(i) - r * stride;
    out[i] = out[i] > T(0) ? scale * (coefficients[r] * output[d]) : T(0);
  });
  __syncthreads();
  for (int l = w.depth - 1; l >= 0; --l) {
    const MlpLayer<T>& layer = w.layers[l];
    const T* const above = layer.out;
    const int all = layer.stride;
    column_sums(
        layer.width, rows, w.partial, [&](int r, int o) { return above[r * all + o]; },
        [&](int o, T sum) { layer.bias.grad[o] += sum; });
    backward_weight(w, l, rows, at == 0);
    backward_input(w, l, at, rows);
    __syncthreads();
  }
}

// grad[s, d .. d + V) = gradient(s, d), and dots[s] = whether row s has a gradient, also of the
// proximal term.
template <int V = 1, typename T, typename Gradient>
FEDPEFT_DEVICE void find_gradients(const Table<T>& t, int count, T* grad,
                                   const Gradient& gradient) {
  const int width = t.width;
  row_sums<int, 1>(
      width / V, count,
      [&](int s, int vector) {
        const int64_t i = int64_t(s) * width + vector * V;
        const Pack<T, V> g = gradient(s, vector * V);
        store_whole_pack<V, true>(grad + i, g);
        bool moved = false;
#pragma unroll
        for (int v = 0; v < V; ++v)
          moved |= g.at[v] != T(0) || (t.start && t.p[i + v] != t.start[i + v]);
        return int(moved);
      },
      [&](int s, int moved) { t.dots[s] = T(moved != 0); });
}

template <typename T>
FEDPEFT_DEVICE void step_gradients(const Table<T>& t, int count, const T* grad,
                                   const Rates<T>& rates, T l2) {
  update_all(t, rates, int64_t(count) * t.width, [&](int64_t i, T p) {
    return grad[i] + (t.dots[divide(i, t.width)] != T(0) ? l2 * p : T(0));
  });
}

// scale times the sum of the entries of row s in the order of the scores, V columns from d on:
// `grads` are those of the scores' item vectors, `stride` apart.
template <int V, typename T>
FEDPEFT_DEVICE Pack<T, V> sum_entries(const Touched<T>& t, const T* grads, int stride, T scale,
                                      int s, int d) {
  constexpr int N = V > 1 ? 2 : 4;  // whose loads are under way together
  Pack<T, V> sum = zero_pack<V, T>();
#pragma unroll 1
  for (int e = t.head[s]; e >= 0;) {
    int entry[N];
    Pack<T, V> value[N];
#pragma unroll
    for (int u = 0; u < N; ++u) {
      entry[u] = e;
      if (e >= 0) e = t.next[e];
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
      const int score = (entry[u] >= 0 ? entry[u] : entry[0]) / t.reads;
      value[u] = load_pack<V>(grads + int64_t(score) * stride + d);
    }
#pragma unroll
    for (int u = 0; u < N; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) sum.at[v] += entry[u] >= 0 ? value[u].at[v] : T(0);
    }
  }
#pragma unroll
  for (int v = 0; v < V; ++v) sum.at[v] *= scale;
  return sum;
}

// The gradients of the rows of all tables from those of item vectors; for LoRA, of the sums of B a.
template <int V, typename T>
FEDPEFT_DEVICE void sum_vectors(const LocalTrainArgs& a, MlpWorkspace<T>& w) {
  const int stride = w.input_stride;
  const T* const grads = w.input_grads;
  const auto summed = [&](const Touched<T>& t, T scale) {
    return [&t, grads, stride, scale](int s, int d) {
      return sum_entries<V>(t, grads, stride, scale, s, d);
    };
  };
  if (a.table) {
    find_gradients<V>(w.table, w.items.count, w.items_grad, summed(w.items, T(1)));
  } else if (a.A) {
    const int vectors = int(a.D) / V;
    share(int64_t(w.items.count) * vectors, [&](int64_t i) {
      const int s = int(divide(i, vectors)), d = int(i - int64_t(s) * vectors) * V;
      store_whole_pack<V, true>(w.items_grad + i * V, summed(w.items, T(1))(s, d));
    });
  }
  if (a.codebooks) {
    find_gradients<V>(w.codebooks, w.codewords.count, w.codebooks_grad, summed(w.codewords, T(1)));
  }
  if (a.buckets) {
    find_gradients<V>(w.hashed, w.buckets.count, w.hashed_grad, summed(w.buckets, row_scale<T>(a)));
  }
}

// The steps of the rows, from the gradients of item vectors.
template <typename T>
FEDPEFT_DEVICE void step_vectors(const LocalTrainArgs& a, MlpWorkspace<T>& w) {
  const int D = int(a.D), rank = int(a.rank);
  const T l2 = T(a.l2_items);
  if (D % kWide<T> == 0) {
    sum_vectors<kWide<T>>(a, w);
  } else {
    sum_vectors<1>(a, w);
  }
  __syncthreads();
  if (a.A) {
    const T *const of_vectors = w.items_grad, *const A = w.A.p, *const B = w.B.p;
    find_gradients(w.A, w.items.count, w.A_grad, [&](int s, int j) {
      T sum = 0;
#pragma unroll 4
      for (int d = 0; d < D; ++d) sum += of_vectors[int64_t(s) * D + d] * B[d * rank + j];
      return Pack<T, 1>{{sum}};
    });
    find_gradients(w.B, D, w.B_grad, [&](int d, int j) {
      T sum = 0;
#pragma unroll 8
      for (int s = 0; s < w.items.count; ++s)
        sum += of_vectors[int64_t(s) * D + d] * A[int64_t(s) * rank + j];
      return Pack<T, 1>{{sum}};
    });
    __syncthreads();
    step_gradients(w.A, w.items.count, w.A_grad, w.rates, l2);
    step_gradients(w.B, D, w.B_grad, w.rates, l2);
  }
  if (a.table) step_gradients(w.table, w.items.count, w.items_grad, w.rates, l2);
  if (a.codebooks) {
    step_gradients(w.codebooks, w.codewords.count, w.codebooks_grad, w.rates, l2);
  }
  if (a.buckets) step_gradients(w.hashed, w.buckets.count, w.hashed_grad, w.rates, l2);
}

// Before the scores of a step: lists of the rows' entries, and what the user vector gives to the
// first layer.
template <typename T>
FEDPEFT_DEVICE void begin_step(const LocalTrainArgs& a, MlpWorkspace<T>& w) {
  const int batch = 2 * w.pairs;
  const auto draw = [&](int k) { return draw_of(w, w.epoch, w.start, k); };
  if (threadIdx.x == 0) advance(a, w.rates);
  share(kMlpRows / 2, [&](int64_t i) { w.losses[i] = 0; });
  if (a.table || a.A) start_lists(w.items, batch, draw);
  if (a.codebooks) start_lists(w.codewords, batch, draw);
  if (a.buckets) start_lists(w.buckets, batch, draw);
  for (int l = 0; l < w.depth; ++l) {
    const MlpPart<T>& of = w.layers[l].bias;
    share(of.table.width, [&](int64_t o) { of.grad[o] = 0; });
  }
  share(w.output.table.width, [&](int64_t o) { w.output.grad[o] = 0; });
  const T *const user = w.user.p, *const weight = w.user_weight.table.p,
                 *const bias = w.layers[0].bias.table.p;
  const int stride = w.user_weight.table.width;
  row_sums<T>(
      w.user.width, w.layers[0].width,
      [&](int o, int d) { return weight[o * stride + d] * user[d]; },
      [&](int o, T sum) { w.first_bias[o] = bias[o] + sum; });
  __syncthreads();
  if (a.table || a.A) link_lists(w.items, batch, false);
  if (a.codebooks) link_lists(w.codewords, batch, true);
  if (a.buckets) link_lists(w.buckets, batch, false);
}

// After the scores of a step: the gradients of what reads the user vector, and of itself, from that
// of the first layer's bias, and the steps of all.
template <typename T>
FEDPEFT_DEVICE void end_step(const LocalTrainArgs& a, MlpWorkspace<T>& w, int* flags) {
  const int width = w.user.width, stride = w.user_weight.table.width, units = w.layers[0].width;
  const T *const slope = w.layers[0].bias.grad, *const user = w.user.p,
                 *const weight = w.user_weight.table.p;
  share(int64_t(units) * stride, [&](int64_t i) {
    const int64_t o = divide(i, stride), d = i - o * stride;
    w.user_weight.grad[i] = d < width ? slope[o] * user[d] : T(0);
  });
  column_sums(
      width, units, w.partial, [&](int o, int d) { return slope[o] * weight[o * stride + d]; },
      [&](int d, T sum) { w.user_grad[d] = sum; });
  for_parts(w, [&](const MlpPart<T>& part, int, int) {
    constexpr int V = kWide<T>;
    share(int64_t(part.rows) * part.table.width / V, [&](int64_t i) {
      Element<T, V> element;
      element.load(part.table, V * i);
      element.step(part.table, w.rates, V * i, load_pack<V>(part.grad + V * i));
    });
  });
  step_vectors(a, w);
  bool moves = false;
  for (int d = int(threadIdx.x); d < width; d += kThreads) moves |= w.user_grad[d] != T(0);
  const T l2 = block_any(moves, flags) ? T(a.l2_user) : T(0);
  share(width, [&](int64_t d) { update(w.user, w.rates, d, w.user_grad[d] + l2 * user[d]); });
  __syncthreads();
}

// The steps of a client. A step is on positives [start, start + pairs) of an epoch's order.
template <typename T>
FEDPEFT_DEVICE void train_mlp(const LocalTrainArgs& a, MlpWorkspace<T>& w, double* sums,
                              int* flags) {
  if (threadIdx.x == 0) w.start_steps(a);
  __syncthreads();
  while (w.step < w.steps) {
    if (a.batch > 0 && w.start == 0) shuffle(a, w, w.epoch);
    begin_step(a, w);
    for (int at = 0; at < 2 * w.pairs; at += kMlpRows) {
      const int left = 2 * w.pairs - at, rows = left < kMlpRows ? left : kMlpRows;
      gather_vectors(a, w, at, rows);
      __syncthreads();
      for (int l = 0; l < w.depth; ++l) {
        forward_layer(w, l, rows);
        __syncthreads();
        if (!a.drop) continue;
        drop_units(a, w, l, at, rows);
        __syncthreads();
      }
      score_block(a, w, rows);
      backward(w, at, rows);
    }
    const double loss =
        block_sum(int(threadIdx.x) < kMlpRows / 2 ? w.losses[threadIdx.x] : 0.0, sums);
    if (threadIdx.x == 0) w.loss += loss / double(a.bpr ? w.pairs : 2 * w.pairs);
    end_step(a, w, flags);
    if (threadIdx.x == 0) w.go_to(w.step + 1);
    __syncthreads();
  }
  if (threadIdx.x == 0) a.losses[w.place] = w.steps ? w.loss / double(w.steps) : 0.0;
}

}  // namespace fedpeft::gpu
