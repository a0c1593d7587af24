// CPU kernels of client_layer: the products of common/products.h over each client's own positions.
// Runs of positions without padding are worked on, so padding costs nothing and adds nothing.
//
// ReLU leaves zeros, dropout more of them, and the gradient has them in the same places: of a
// factor that went through them only the elements that are not zero are multiplied with.
#include "client_layer/client_layer_cpu.h"

#include "common/draws.h"
#include "common/products.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Calls run(first, last) for the runs of positions without padding in [begin, end).
template <typename Run>
FEDPEFT_INLINE void for_runs(const ClientLayerArgs& a, int64_t client, int64_t begin, int64_t end,
                             const Run& run) {
  const int64_t start = client * a.positions;
  for (int64_t p = begin; p < end;) {
    while (p < end && a.items[start + p] < 0) ++p;
    const int64_t first = p;
    while (p < end && a.items[start + p] >= 0) ++p;
    if (first < p) run(first, p);
  }
}

template <typename T>
void pack(const ClientLayerArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t c = begin; c < end; ++c) {
    A* const packed = static_cast<A*>(a.packed) + c * a.packed_size;
    const T* const weight = static_cast<const T*>(a.weight) + c * a.out_width * a.in;
    if (a.sparse) {
      pad_rows(packed, weight, a.in, a.out_width, int64_t{1}, a.in, layer_padded(a.out_width));
    } else {
      pack_panels(packed, weight, a.in, a.out_width, int64_t{1}, a.in);
    }
  }
}

// ReLU and dropout of positions [begin, end) of a client, of which `begin` starts a block.
template <typename T>
FEDPEFT_INLINE void activate(const ClientLayerArgs& a, int64_t client, const acc_t<T>* from, T* out,
                             int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t first = begin * a.out_width, count = (end - begin) * a.out_width;
  const A scale = A(a.scale);
  const uint32_t id = uint32_t(a.clients[client]), threshold = a.threshold;
  constexpr int64_t kChunk = kElementBatch;
  uint32_t word[kChunk];
  for (int64_t i = 0; i < kChunk; ++i) word[i] = 0;
  for (int64_t e = 0; e < count; e += kChunk) {
    if (a.drop) philox_elements(uint64_t((first + e) / 4), id, a.round, a.stream, a.seed, word);
    // By way of arrays of their own, since `from` and `out` may be the same. The condition is not
    // x > 0, which would turn a NaN into 0.
    A value[kChunk], kept[kChunk];
    const auto apply = [&](int64_t n) __attribute__((always_inline)) {
      for (int64_t i = 0; i < n; ++i) kept[i] = word[i] < threshold ? A(0) : A(1);
      for (int64_t i = 0; i < n; ++i) {
        const A x = from[e + i];
        const A positive = x < A(0) ? A(0) : x * scale;
        value[i] = kept[i] == A(0) ? A(0) : positive;
      }
      for (int64_t i = 0; i < n; ++i) from_acc(value[i], out + e + i);
    };
    if (count - e >= kChunk) {
      apply(kChunk);
    } else {
      apply(count - e);
    }
  }
}

template <typename T>
void forward(const ClientLayerArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width;
  A* scratch = static_cast<A*>(a.scratch) + begin * a.scratch_size;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t c = item / a.tasks, start = (item % a.tasks) * kLayerTask;
    const int64_t stop = start + kLayerTask < a.positions ? start + kLayerTask : a.positions;
    const T* x = static_cast<const T*>(a.x) + c * a.positions * I;
    T* out = static_cast<T*>(a.out) + c * a.positions * O;
    const A* packed = static_cast<const A*>(a.packed) + c * a.packed_size;
    int32_t* const places = reinterpret_cast<int32_t*>(scratch + (kLayerBlock + 1) * O);
    // Products and the bias are of the accumulator type: in place where the tensors are too.
    const A* bias;
    if constexpr (sizeof(T) == sizeof(A)) {
      bias = static_cast<const T*>(a.bias) + c * O;
    } else {
      A* converted = scratch + kLayerBlock * O;
      for (int64_t o = 0; o < O; ++o)
        converted[o] = to_acc(static_cast<const T*>(a.bias)[c * O + o]);
      bias = converted;
    }
    for (int64_t block = start; block < stop; block += kLayerBlock) {
      const int64_t after = block + kLayerBlock < stop ? block + kLayerBlock : stop;
      A* sums;
      if constexpr (sizeof(T) == sizeof(A)) {
        sums = out + block * O;
      } else {
        sums = scratch;
      }
      int64_t used = block;
      for_runs(a, c, block, after, [&](int64_t from, int64_t to) {
        zero_row(sums + (used - block) * O, (from - used) * O);
        if (a.sparse) {
          int64_t counts[kLayerBlock];
          const int64_t rows = to - from, room = I + kPlacesBehind;
          for (int64_t r = 0; r < rows; ++r)
            counts[r] = nonzero_places(x + (from + r) * I, I, places + r * room);
          for_stretches<A>(O, [&](auto panels, int64_t first) {
            for (int64_t r = 0; r < rows; ++r) {
              sparse_row<int(decltype(panels)::value)>(sums + (from - block + r) * O, bias,
                                                       x + (from + r) * I, int64_t{1},
                                                       ListedPlaces(places + r * room, counts[r]),
                                                       Right<A>{packed, layer_padded(O)}, first, O);
            }
          });
        } else {
          product(sums + (from - block) * O, O, bias, int64_t{0}, x + from * I, I, int64_t{1},
                  packed, to - from, I, O);
        }
        used = to;
      });
      activate(a, c, static_cast<const A*>(sums), out + block * O, block, used);
      zero_row(out + used * O, (after - used) * O);
    }
  }
}

template <typename T>
void backward(const ClientLayerArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  const int64_t I = a.in, O = a.out_width;
  A* weights = static_cast<A*>(a.scratch) + begin * a.scratch_size;  // [O, I] in panels
  A* inputs = weights + O * layer_padded(I);                         // a block [rows, I] in panels
  A* before = inputs + kLayerBlock * layer_padded(I);                // a block [rows, O]
  A* narrow = before + kLayerBlock * O;                              // a block [rows, I]
  int32_t* const places =                                            // of its rows' elements
      reinterpret_cast<int32_t*>(narrow + kLayerBlock * I + O * (I + 1));
  const int64_t room = O + kPlacesBehind;
  int32_t* const column_counts = places + kLayerBlock * room;  // and of its columns'
  uint8_t* const column_places = reinterpret_cast<uint8_t*>(column_counts + O);
  for (int64_t c = begin; c < end; ++c) {
    const T* x = static_cast<const T*>(a.x) + c * a.positions * I;
    const T* kept = static_cast<const T*>(a.kept) + c * a.positions * O;
    const T* grad = static_cast<const T*>(a.grad) + c * a.positions * O;
    const T* weight = static_cast<const T*>(a.weight) + c * O * I;
    T* grad_x = static_cast<T*>(a.grad_x) + c * a.positions * I;
    T* grad_weight = static_cast<T*>(a.grad_weight) + c * O * I;
    T* grad_bias = static_cast<T*>(a.grad_bias) + c * O;
    A *sum_weight, *sum_bias;
    if constexpr (sizeof(T) == sizeof(A)) {
      sum_weight = grad_weight;
      sum_bias = grad_bias;
    } else {
      sum_weight = narrow + kLayerBlock * I;
      sum_bias = sum_weight + O * I;
    }
    zero_row(sum_weight, O * I);
    zero_row(sum_bias, O);
    // Read where they are, if their rows are whole panels.
    const bool in_place = sizeof(T) == sizeof(A) && I % kPanel<A> == 0;
    Right<A> of_weights{weights, layer_padded(I)}, of_inputs{inputs, layer_padded(I)};
    if (in_place) {
      of_weights = {reinterpret_cast<const A*>(weight), I};
    } else {
      pad_rows(weights, weight, O, I, I, int64_t{1}, of_weights.stride);
    }
    const A scale = A(a.scale);
    for (int64_t block = 0; block < a.positions; block += kLayerBlock) {
      const int64_t after = block + kLayerBlock < a.positions ? block + kLayerBlock : a.positions;
      int64_t done = block;
      for_runs(a, c, block, after, [&](int64_t first, int64_t last) {
        const int64_t rows = last - first;
        zero_row(grad_x + done * I, (first - done) * I);
        done = last;
        for (int64_t e = 0; e < rows * O; ++e) {
          const A g = to_acc(grad[first * O + e]) * scale;
          before[e] = to_acc(kept[first * O + e]) > A(0) ? g : A(0);
        }
        for (int64_t r = 0; r < rows; ++r) add_row(sum_bias, before + r * O, O);
        int64_t counts[kLayerBlock];
        for (int64_t o = 0; o < O; ++o) column_counts[o] = 0;
        for (int64_t r = 0; r < rows; ++r) {
          const int32_t* const mine = places + r * room;
          counts[r] = nonzero_places(static_cast<const A*>(before) + r * O, O, places + r * room);
          for (int64_t i = 0; i < counts[r]; ++i) {
            const int64_t o = mine[i];
            column_places[o * kLayerBlock + column_counts[o]++] = uint8_t(r);
          }
        }
        if (in_place) {
          of_inputs = {reinterpret_cast<const A*>(x + first * I), I};
        } else {
          pad_rows(inputs, x + first * I, rows, I, I, int64_t{1}, of_inputs.stride);
        }
        A* out;
        if constexpr (sizeof(T) == sizeof(A)) {
          out = grad_x + first * I;
        } else {
          out = narrow;
        }
        for_stretches<A>(I, [&](auto panels, int64_t column) {
          constexpr int G = int(decltype(panels)::value);
          for (int64_t o = 0; o < O; ++o) {
            sparse_row<G>(sum_weight + o * I, static_cast<const A*>(sum_weight) + o * I,
                          static_cast<const A*>(before) + o, O,
                          ListedPlaces(column_places + o * kLayerBlock, int64_t(column_counts[o])),
                          of_inputs, column, I);
          }
          for (int64_t r = 0; r < rows; ++r) {
            sparse_row<G>(out + r * I, static_cast<const A*>(nullptr),
                          static_cast<const A*>(before) + r * O, int64_t{1},
                          ListedPlaces(places + r * room, counts[r]), of_weights, column, I);
          }
        });
        if constexpr (sizeof(T) != sizeof(A)) {
          for (int64_t e = 0; e < rows * I; ++e) from_acc(narrow[e], grad_x + first * I + e);
        }
      });
      zero_row(grad_x + done * I, (after - done) * I);
    }
    if constexpr (sizeof(T) != sizeof(A)) {
      for (int64_t e = 0; e < O * I; ++e) from_acc(sum_weight[e], grad_weight + e);
      for (int64_t o = 0; o < O; ++o) from_acc(sum_bias[o], grad_bias + o);
    }
  }
}

}  // namespace

const ClientLayerKernels client_layer_kernels = {
    {pack<float>, pack<double>, pack<Half>, pack<BFloat16>},
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
