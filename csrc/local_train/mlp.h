// The MLP that scores [user vector, item vector] in place of their dot product: a client's layers,
// their optimizer state, and the passes of a step over them. Included by *_cpu.cpp files only.
//
// A step works on a block of scores at a time, pairs of a positive and a negative together: forward
// through all layers, the loss's slope, and backward at once, so that a block's activations are
// still in the core's nearest caches, and those of a whole step nowhere. The weights, their
// gradients and moments stay in its second-level cache from the first step to the last.
//
// The products and their order are those of client_layer: what ReLU and dropout left zero is not
// multiplied with, forward from the second layer on, and backward in all layers. The columns of the
// first layer that read the user vector are the same at every score: they are used once a step.
#pragma once

#include "common/draws.h"
#include "common/products.h"
#include "local_train/parts.h"

namespace fedpeft::FEDPEFT_ISA {

// Scores whose dropout is drawn at once: they fill whole blocks of words.
constexpr int64_t kMaskedRows = 4;

template <typename T>
struct MlpPart {
  struct Layer {
    DensePart<T> weight, bias;  // weight: of the first layer the columns that read the item
    T* across;                  // weight transposed: [in, stride], of the first layer in panels
    T* out;                     // [kMlpBlock, stride], of a block
    int32_t* places;            // [kMlpBlock, room]: elements of `out` that are not zero
    int64_t* counts;            // [kMlpBlock]
    uint8_t* bits;              // [width / 8, kMlpBlock]: the same as bits, 8 units a byte (AVX2)
    int64_t width, stride, room;
  };

  int64_t count = 0;  // layers; 0: there is no MLP
  Layer* layers = nullptr;
  DensePart<T> user_weight, output;
  T* input = nullptr;       // [kMlpBlock, input_stride]: item vectors of a block
  T* input_grad = nullptr;  // the same of their gradients, after `backward`
  int64_t input_stride = 0;

  void lay_out(Arena& arena, const LocalTrainArgs& a) {
    count = a.layers;
    layers = arena.take<Layer>(count);
    input_stride = whole_panels<T>(a.D);
    int64_t widest = input_stride, before = input_stride;
    for (int64_t l = 0; l < count; ++l) {
      Layer layer{};
      const int64_t out = a.widths[l], in = l ? a.widths[l - 1] : a.D;
      layer.width = out;
      layer.stride = whole_panels<T>(out);
      layer.room = layer.stride + 8;  // as nonzero_places needs
      layer.weight.lay_out(arena, a, nullptr, out, in, !a.own_mlp, before);
      layer.bias.lay_out(arena, a, nullptr, 1, out, !a.own_mlp, layer.stride);
      if (l == 0) {
        user_weight.lay_out(arena, a, nullptr, out, a.user_width, !a.own_mlp);
        layer.weight.pitch = user_weight.pitch = a.user_width + a.D;
        first_bias = arena.take<T>(layer.stride);
      }
      layer.across = arena.take<T>(before * layer.stride);
      layer.out = arena.take<T>(kMlpBlock * layer.stride);
      layer.places = arena.take<int32_t>(kMlpBlock * layer.room);
      layer.counts = arena.take<int64_t>(kMlpBlock);
      layer.bits = arena.take<uint8_t>(kMlpBlock * ((out + 7) / 8));
      if (layers) layers[l] = layer;
      before = layer.stride;
      widest = widest < before ? before : widest;
    }
    if (!count) return;
    output.lay_out(arena, a, nullptr, 1, a.widths[count - 1], !a.own_mlp, before);
    input = arena.take<T>(kMlpBlock * input_stride);
    for (T*& grad : grads) grad = arena.take<T>(kMlpBlock * widest);
    columns = arena.take<uint64_t>(widest + 8);
    words = arena.take<uint32_t>(kMaskedRows * widest + kElementBatch);
  }

  // Calls f(part, tensor, offset) for every parameter, which begins at element `offset` of tensor
  // `tensor` of the arguments.
  template <typename F>
  FEDPEFT_INLINE void for_parts(const F& f) {
    for (int64_t l = 0; l < count; ++l) {
      if (l == 0 && user_weight.width > 0) f(user_weight, 0, 0);
      f(layers[l].weight, 2 * l, l ? 0 : user_weight.width);
      f(layers[l].bias, 2 * l + 1, 0);
    }
    if (count) f(output, 2 * count, 0);
  }

  // Elements of a tensor of the arguments.
  int64_t size_of(int64_t tensor) const {
    if (tensor == 2 * count) return output.width;
    const Layer& layer = layers[tensor / 2];
    return tensor % 2 ? layer.width : layer.width * layer.weight.pitch;
  }

  // The start of client c of the call.
  void load_start(const LocalTrainArgs& a, int64_t c) {
    for_parts([&](DensePart<T>& part, int64_t tensor, int64_t offset) {
      part.source = static_cast<const T*>(a.mlp[tensor]) + offset;
      if (a.own_mlp) part.source += c * size_of(tensor);
      part.load_start();
    });
    zero_row(input, kMlpBlock * input_stride);
  }

  // Before the scores of a step.
  void begin(const T* user) {
    for (int64_t l = 0; l < count; ++l) {
      Layer& layer = layers[l];
      const DensePart<T>& weight = layer.weight;
      if (l == 0) {
        pack_panels(layer.across, static_cast<const T*>(weight.p), weight.width, layer.width,
                    int64_t{1}, weight.stride);
      } else {
        pad_rows(layer.across, static_cast<const T*>(weight.p), weight.width, layer.width,
                 int64_t{1}, weight.stride, layer.stride);
      }
    }
    const Layer& first = layers[0];
    copy_row(first_bias, first.bias.p, first.stride);
    if (user_weight.width == 0) return;
    for (int64_t o = 0; o < first.width; ++o)
      first_bias[o] += dot(user_weight.p + o * user_weight.stride, user, user_weight.width);
  }

  // Scores of a block of `rows` item vectors in `input`, of which the first is score `at` of the
  // step.
  void forward(const LocalTrainArgs& a, uint32_t client, uint32_t epoch, int64_t rows, int64_t at,
               T* scores) {
    for (int64_t l = 0; l < count; ++l) {
      const Layer& layer = layers[l];
      const int64_t stride = layer.stride;
      if (l == 0) {
        product(layer.out, stride, static_cast<const T*>(first_bias), int64_t{0},
                static_cast<const T*>(input), input_stride, int64_t{1},
                static_cast<const T*>(layer.across), rows, layer.weight.width, stride);
      } else {
        const Layer& before = layers[l - 1];
        for_stretches<T>(stride, [&](auto panels, int64_t column) {
          for (int64_t r = 0; r < rows; ++r) {
            sparse_row<int(decltype(panels)::value)>(
                layer.out + r * stride, static_cast<const T*>(layer.bias.p),
                static_cast<const T*>(before.out) + r * before.stride, int64_t{1},
                ListedPlaces(before.places + r * before.room, before.counts[r]),
                Right<T>{layer.across, stride}, column, stride);
          }
        });
      }
      activate(a, layer, client, philox_stream(Purpose::dropout, uint32_t(l), epoch), rows, at);
    }
    const Layer& last = layers[count - 1];
    for (int64_t r = 0; r < rows; ++r)
      scores[r] = dot(last.out + r * last.stride, output.p, last.stride);
  }

  // Adds the gradients of a block, whose scores have these, to those of the parameters.
  void backward(const LocalTrainArgs& a, int64_t rows, const T* coefficients) {
    const T scale = T(a.drop_scale);
    const Layer& last = layers[count - 1];
    T *above = grads[0], *below = grads[1];
    for (int64_t r = 0; r < rows; ++r) {
      const T* const out = last.out + r * last.stride;
      add_scaled(output.grad, coefficients[r], out, last.stride);
      pass_active(above + r * last.stride, out, scale, last.stride,
                  [&](int64_t d) { return coefficients[r] * load(output.p + d); });
    }
    for (int64_t l = count - 1; l >= 0; --l) {
      const Layer& layer = layers[l];
      const int64_t in = l ? layers[l - 1].stride : input_stride, stride = layer.stride;
      const T* const x = l ? layers[l - 1].out : input;
      for (int64_t r = 0; r < rows; ++r) add_row(layer.bias.grad, above + r * stride, stride);
      mark_columns(layer, rows);
      for_stretches<T>(in, [&](auto panels, int64_t column) {
        constexpr int G = int(decltype(panels)::value);
        T* const grad = layer.weight.grad;
        for (int64_t o = 0; o < layer.width; ++o) {
          sparse_row<G>(grad + o * in, static_cast<const T*>(grad) + o * in,
                        static_cast<const T*>(above) + o, stride, MaskedPlaces{columns[o]},
                        Right<T>{x, in}, column, in);
        }
        for (int64_t r = 0; r < rows; ++r) {
          sparse_row<G>(below + r * in, static_cast<const T*>(nullptr),
                        static_cast<const T*>(above) + r * stride, int64_t{1},
                        ListedPlaces(layer.places + r * layer.room, layer.counts[r]),
                        Right<T>{layer.weight.p, in}, column, in);
        }
      });
      for (int64_t r = 0; l && r < rows; ++r) {
        pass_active(below + r * in, x + r * in, scale, in,
                    [&](int64_t d) { return load(below + r * in + d); });
      }
      T* const swap = above;
      above = below;
      below = swap;
    }
    input_grad = above;
  }

  // After the blocks of a step: the gradients of what reads the user vector, and its own.
  void end(const T* user, T* user_grad) {
    const T* const slope = layers[0].bias.grad;
    for (int64_t o = 0; o < layers[0].width && user_weight.width > 0; ++o) {
      add_scaled(user_weight.grad + o * user_weight.stride, slope[o], user, user_weight.width);
      add_scaled(user_grad, slope[o], user_weight.p + o * user_weight.stride, user_weight.width);
    }
  }

  void step(const LocalStep<T>& step) {
    for_parts([&](DensePart<T>& part, int64_t, int64_t) { part.step(step, T(0)); });
  }

  void add_to(double* const* totals, const Addition& by) {
    for_parts([&](DensePart<T>& part, int64_t tensor, int64_t offset) {
      part.total = {totals[tensor] + offset, nullptr, by};
    });
  }

  // Whether an update was broken.
  bool add_up() {
    bool broken = false;
    for_parts([&](DensePart<T>& part, int64_t, int64_t) {
      part.add_up();
      broken |= part.total.broken;
    });
    return broken;
  }

  // The upload of client c of the call, or the new values of an MLP of its own.
  void write(const LocalTrainArgs& a, int64_t c) {
    for_parts([&](DensePart<T>& part, int64_t tensor, int64_t offset) {
      T* const out = static_cast<T*>(a.d_mlp[tensor]) + c * size_of(tensor) + offset;
      a.own_mlp ? part.write_values(out) : part.write(out);
    });
  }

 private:
  T* first_bias = nullptr;           // of the first layer, with its part of the user vector
  T* grads[2] = {nullptr, nullptr};  // [kMlpBlock, widest]: of a layer's output, and of its input
  uint64_t* columns = nullptr;  // [widest]: rows of a block in which a unit is not zero, as bits
  uint32_t* words = nullptr;

  // out = scale * grad(d) where an activation let it through.
  template <typename Grad>
  static FEDPEFT_INLINE void pass_active(T* out, const T* active, T scale, int64_t n,
                                         const Grad& grad) {
    constexpr int64_t N = kLanes<T>;
    for (int64_t d = 0; d < n; d += N)
      store(out + d, load(active + d) > 0 ? scale * grad(d) : vec_t<T>{});
  }

  // ReLU and dropout of a block in place, and the places of what they leave. Element e of a step's
  // outputs [scores, width] is dropped as in client_dropout.
  void activate(const LocalTrainArgs& a, const Layer& layer, uint32_t client, uint32_t stream,
                int64_t rows, int64_t at) {
    const int64_t width = layer.width;
    const uint32_t threshold = a.drop ? a.drop_threshold : 0;
    const T scale = T(a.drop_scale);
    for (int64_t row = 0; row < rows; row += kMaskedRows) {
      const int64_t group = rows - row < kMaskedRows ? rows - row : kMaskedRows;
      if (a.drop) {
        const int64_t first = (at + row) * width / 4;
        for (int64_t e = 0; e < group * width; e += kElementBatch)
          philox_elements(uint64_t(first + e / 4), client, a.round, stream, a.seed, words + e);
      }
      for (int64_t r = row; r < row + group; ++r) {
        T* const out = layer.out + r * layer.stride;
        layer.counts[r] = activate_row(out, width, words + (r - row) * width, threshold, scale,
                                       layer.places + r * layer.room, layer.bits + r);
        zero_row(out + width, layer.stride - width);  // where infinite numbers left NaNs
      }
    }
  }

  // The condition of ReLU is not x > 0, which would turn a NaN into 0.
  static FEDPEFT_INLINE int64_t activate_row(T* x, int64_t n, const uint32_t* word,
                                             uint32_t threshold, T scale, int32_t* places,
                                             [[maybe_unused]] uint8_t* bits) {
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
      const __m256 factor = _mm256_set1_ps(scale), zero = _mm256_setzero_ps();
      const __m256i least = _mm256_set1_epi32(int(threshold));
      int64_t count = 0;
      for (int64_t i = 0; i < n; i += 8) {
        const __m256 v = _mm256_loadu_ps(x + i);
        __m256 kept =
            _mm256_andnot_ps(_mm256_cmp_ps(v, zero, _CMP_LT_OQ), _mm256_mul_ps(v, factor));
        if (threshold) {
          const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(word + i));
          const __m256i keep = _mm256_cmpeq_epi32(_mm256_max_epu32(w, least), w);
          kept = _mm256_and_ps(kept, _mm256_castsi256_ps(keep));
        }
        if (n - i < 8) {
          const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
          const __m256i inside = _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n - i)), lanes);
          kept = _mm256_and_ps(kept, _mm256_castsi256_ps(inside));
        }
        _mm256_storeu_ps(x + i, kept);
        const int differs = _mm256_movemask_ps(_mm256_cmp_ps(kept, zero, _CMP_NEQ_UQ));
        bits[i / 8 * kMlpBlock] = uint8_t(differs);
        count = add_places(differs, i, places, count);
      }
      return count;
    }
#endif
    for (int64_t i = 0; i < n; ++i) {
      const T positive = x[i] < T(0) ? T(0) : x[i] * scale;
      x[i] = threshold && word[i] < threshold ? T(0) : positive;
    }
    return nonzero_places(static_cast<const T*>(x), n, places);
  }

  FEDPEFT_INLINE void mark_columns(const Layer& layer, int64_t rows) {
    uint64_t* const marks = columns;
#if defined(__AVX2__)
    if constexpr (sizeof(T) ==
                  4) {  // 8 units of 64 rows at a time: a byte's bits one after the other
      const uint64_t there = rows < 64 ? (uint64_t{1} << rows) - 1 : ~uint64_t{0};
      for (int64_t o = 0; o < layer.width; o += 8) {
        const __m256i* const bytes =
            reinterpret_cast<const __m256i*>(layer.bits + o / 8 * kMlpBlock);
        __m256i low = _mm256_loadu_si256(bytes), high = _mm256_loadu_si256(bytes + 1);
        for (int64_t bit = 7; bit >= 0; --bit) {
          const uint64_t front = uint32_t(_mm256_movemask_epi8(low)),
                         back = uint32_t(_mm256_movemask_epi8(high));
          marks[o + bit] = (front | back << 32) & there;
          low = _mm256_add_epi8(low, low);
          high = _mm256_add_epi8(high, high);
        }
      }
      return;
    }
#endif
    for (int64_t o = 0; o < layer.width; ++o) marks[o] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t* const mine = layer.places + r * layer.room;
      for (int64_t i = 0; i < layer.counts[r]; ++i) marks[mine[i]] |= uint64_t{1} << r;
    }
  }
};

}  // namespace fedpeft::FEDPEFT_ISA
