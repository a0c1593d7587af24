// Binding of client_mlp and its gradient: the kernels of client_layer and dot_scores. On the CPU
// they are called client by client through all layers of an MLP, so that what one layer leaves the
// next finds in the core's cache; layer by layer over all clients it would be in memory. On a GPU
// they are launched layer by layer, one behind the other.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "client_layer/client_layer_cpu.h"
#include "client_layer/client_layer_cuda.h"
#include "common/buffer.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "losses/dot_scores_cpu.h"
#include "losses/dot_scores_cuda.h"

namespace fedpeft {
namespace {

// Elements of a layer's output of width O in `hidden`: whole packs, so that every layer's begins as
// aligned as a tensor of its own, on which the bits of dot_scores on a GPU depend.
constexpr int64_t room_of(int64_t width) { return (width + 7) / 8 * 8; }

// Contiguous arguments of all clients, and their sizes.
struct Mlp {
  Tensor x, output, items;
  std::vector<Tensor> weights, biases;
  DType dtype;
  int64_t element;  // bytes
  int64_t clients, positions, in;
  std::vector<int64_t> widths;  // O of each layer
  int64_t hidden;               // the sum of their room
  int64_t work;                 // multiply-adds of a client

  int64_t inputs(size_t layer) const { return layer ? widths[layer - 1] : in; }
  int64_t widest() const { return *std::max_element(widths.begin(), widths.end()); }
};

Mlp checked(const Tensor& x, const std::vector<Tensor>& weights, const Tensor& output,
            const Tensor& items, double p) {
  check_dim(x, 3, "x", "[C, P, I]");
  check_value(!weights.empty(), "weights: expected at least one layer, got none");
  check_dim(items, 2, "items", "[C, P]");
  check_size(items, 0, x.size(0), "items", "C, the clients of x");
  check_size(items, 1, x.size(1), "items", "P, the positions of x");
  check_same_device(items, x, "items", "x");
  check_value(p >= 0 && p < 1, "p: expected a probability from 0 to below 1, got ", p);
  Mlp m{};
  m.dtype = dtype_of(x, "x");
  m.element = m.dtype == DType::f64 ? 8 : m.dtype == DType::f32 ? 4 : 2;
  m.x = dense(x);
  m.items = dense(items);
  m.clients = x.size(0);
  m.positions = x.size(1);
  m.in = x.size(2);
  int64_t width = m.in;
  for (const Tensor& weight : weights) {
    check_dim(weight, 3, "weights", "[C, O, I]");
    check_size(weight, 0, m.clients, "weights", "C, the clients of x");
    check_size(weight, 2, width, "weights", "I, what the layer before gives");
    check_same_dtype(weight, x, "weights", "x");
    check_same_device(weight, x, "weights", "x");
    m.work += m.positions * weight.size(1) * width;
    width = weight.size(1);
    check_value(m.positions * width <= int64_t{1} << 34,
                "x: expected at most 2^34 elements of a layer a client, got ", m.positions * width);
    m.widths.push_back(width);
    m.hidden += room_of(width);
    m.weights.push_back(dense(weight));
  }
  check_dim(output, 2, "output", "[C, O]");
  check_size(output, 0, m.clients, "output", "C, the clients of x");
  check_size(output, 1, width, "output", "O, the width of the last layer");
  check_same_dtype(output, x, "output", "x");
  check_same_device(output, x, "output", "x");
  m.output = dense(output);
  return m;
}

const void* at(const Tensor& t, int64_t client, int64_t element) {
  return static_cast<const char*>(t.const_data_ptr()) +
         client * (t.size(0) ? t.numel() / t.size(0) : 0) * element;
}
void* at(Tensor& t, int64_t client, int64_t element, int64_t offset = 0) {
  return static_cast<char*>(t.mutable_data_ptr()) +
         (client * (t.size(0) ? t.numel() / t.size(0) : 0) + offset) * element;
}

// The client that is n-th to be worked on: one from the front and one from the back in turn, so
// that ranges of clients that are sorted by size, as those of a chunk are, take threads equally
// long.
[[maybe_unused]] int64_t in_turn(int64_t n, int64_t clients) {
  return n % 2 ? clients - 1 - n / 2 : n / 2;
}

// Arguments of one layer of `count` clients from `client` on; `hidden` has the outputs [count, P,
// O] of all layers, one behind the other.
ClientLayerArgs layer_args(const Mlp& m, size_t layer, int64_t client, int64_t count, double p,
                           void* hidden) {
  ClientLayerArgs a{};
  a.positions = m.positions;
  a.in = m.inputs(layer);
  a.out_width = m.widths[layer];
  a.scale = 1 / (1 - p);
  a.items = indices_of(m.items, "items");
  a.items.data = static_cast<const char*>(a.items.data) + client * m.positions * a.items.bytes;
  a.weight = at(m.weights[layer], client, m.element);
  char* outputs = static_cast<char*>(hidden);
  for (size_t l = 0; l < layer; ++l) {
    if (l + 1 == layer) a.x = outputs;
    outputs += count * m.positions * room_of(m.widths[l]) * m.element;
  }
  if (layer == 0) a.x = at(m.x, client, m.element);
  a.out = outputs;
  a.kept = outputs;
  return a;
}

// The scores that these clients' last layer gives.
DotScoresArgs score_args(const Mlp& m, int64_t client, int64_t count, void* hidden) {
  DotScoresArgs a{};
  a.positions = m.positions;
  a.D = m.widths.back();
  a.blocks = std::max<int64_t>(1, (a.positions + kScoreBlock - 1) / kScoreBlock);
  a.user = at(m.output, client, m.element);
  a.vectors =
      static_cast<char*>(hidden) + count * m.positions * (m.hidden - room_of(a.D)) * m.element;
  return a;
}

std::tuple<Tensor, Tensor> client_mlp(const Tensor& x, std::vector<Tensor> weights,
                                      std::vector<Tensor> biases, const Tensor& output,
                                      const Tensor& items, const Tensor& clients, double p,
                                      int64_t seed, int64_t round, int64_t epoch) {
  Mlp m = checked(x, weights, output, items, p);
  check_value(biases.size() == weights.size(), "biases: expected ", weights.size(),
              ", one a layer, got ", biases.size());
  for (size_t l = 0; l < biases.size(); ++l) {
    check_dim(biases[l], 2, "biases", "[C, O]");
    check_size(biases[l], 0, m.clients, "biases", "C, the clients of x");
    check_size(biases[l], 1, m.widths[l], "biases", "O, the rows of its weight");
    check_same_dtype(biases[l], x, "biases", "x");
    check_same_device(biases[l], x, "biases", "x");
    m.biases.push_back(dense(biases[l]));
  }
  check_dim(clients, 1, "clients", "[C]");
  check_size(clients, 0, m.clients, "clients", "C, the clients of x");
  check_same_device(clients, x, "clients", "x");
  const Tensor clients_ = dense(clients);
  const IndexArray ids = indices_of(clients_, "clients");
  const uint32_t round_ = check_uint(round, int64_t{1} << 32, "round");
  const uint32_t epoch_ = check_uint(epoch, 1 << 16, "epoch");
  check_uint(int64_t(weights.size()), (1 << 8) + 1, "weights");

  Tensor scores = allocate(x, {m.clients, m.positions});
  const std::vector<int64_t> shape{m.clients, m.positions * m.hidden};
  const bool filled = std::all_of(m.widths.begin(), m.widths.end(),
                                  [](int64_t width) { return room_of(width) == width; });
  Tensor hidden = filled ? allocate(x, shape) : torch::stable::new_zeros(x, shape);
  [[maybe_unused]] const int dtype = int(m.dtype);
  const auto forward_args = [&](size_t l, int64_t c, int64_t count, void* outputs) {
    ClientLayerArgs a = layer_args(m, l, c, count, p, outputs);
    a.bias = at(m.biases[l], c, m.element);
    a.clients = {static_cast<const char*>(ids.data) + c * ids.bytes, ids.bytes};
    a.sparse = l > 0;
    a.drop = p > 0;
    a.threshold = uint32_t(std::floor(std::ldexp(p, 32)));
    a.seed = uint64_t(seed);
    a.round = round_;
    a.stream = philox_stream(Purpose::dropout, uint32_t(l), epoch_);
    return a;
  };
  run_on(
      x,
      [&](auto) {
        check_clients(ids, m.clients, int64_t{1} << 32);
        int64_t packed = 0, scratch = 0;
        for (size_t l = 0; l < weights.size(); ++l) {
          packed = std::max(packed, layer_packed_size(m.inputs(l), m.widths[l]));
          scratch = std::max(scratch, layer_forward_scratch(m.inputs(l), m.widths[l]));
        }
        const int64_t accumulator = std::max<int64_t>(m.element, 4);
        const ClientLayerKernels& layers = select_wide_client_layer_kernels();
        const DotScoresKernels& dots = select_dot_scores_kernels();
        parallel_ranges(m.clients, m.work / 8, [&](int64_t begin, int64_t end) {
          const Buffer packed_room = aligned_buffer(packed * accumulator),
                       scratch_room = aligned_buffer(scratch * accumulator);
          for (int64_t n = begin; n < end; ++n) {
            const int64_t c = in_turn(n, m.clients);
            void* outputs = at(hidden, c, m.element);
            for (size_t l = 0; l < m.widths.size(); ++l) {
              ClientLayerArgs a = forward_args(l, c, 1, outputs);
              a.tasks = (m.positions + kLayerTask - 1) / kLayerTask;
              a.packed = packed_room.get();
              a.scratch = scratch_room.get();
              layers.pack[dtype](a, 0, 1);
              layers.forward[dtype](a, 0, a.tasks);
            }
            DotScoresArgs a = score_args(m, c, 1, outputs);
            a.out = at(scores, c, m.element);
            dots.forward[dtype](a, 0, a.blocks);
          }
        });
      },
      [&](auto stream) {
        void* outputs = hidden.mutable_data_ptr();
        for (size_t l = 0; l < m.widths.size(); ++l)
          gpu::client_layer(forward_args(l, 0, m.clients, outputs), m.dtype, m.clients, stream);
        DotScoresArgs a = score_args(m, 0, m.clients, outputs);
        a.out = scores.mutable_data_ptr();
        gpu::dot_scores(a, m.dtype, m.clients, stream);
      });
  return {scores, hidden};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>, Tensor> client_mlp_backward(
    const Tensor& grad, const Tensor& x, std::vector<Tensor> weights, const Tensor& output,
    const Tensor& hidden, const Tensor& items, double p) {
  const Mlp m = checked(x, weights, output, items, p);
  check_dim(grad, 2, "grad", "[C, P]");
  check_size(grad, 0, m.clients, "grad", "C, the clients of x");
  check_size(grad, 1, m.positions, "grad", "P, the positions of x");
  check_same_dtype(grad, x, "grad", "x");
  check_same_device(grad, x, "grad", "x");
  check_dim(hidden, 2, "hidden", "[C, P sum O]");
  check_size(hidden, 0, m.clients, "hidden", "C, the clients of x");
  check_size(hidden, 1, m.positions * m.hidden, "hidden", "all that the layers gave");
  check_same_dtype(hidden, x, "hidden", "x");
  check_same_device(hidden, x, "hidden", "x");
  const Tensor grad_ = dense(grad), hidden_ = dense(hidden);

  Tensor grad_x = allocate_like(m.x), grad_output = allocate_like(m.output);
  std::vector<Tensor> grad_weights, grad_biases;
  for (size_t l = 0; l < weights.size(); ++l) {
    grad_weights.push_back(allocate_like(m.weights[l]));
    grad_biases.push_back(allocate(x, {m.clients, m.widths[l]}));
  }
  [[maybe_unused]] const int dtype = int(m.dtype);
  // Of `count` clients from c on: the gradients of a layer's output are in grads[0], those of its
  // input go to grads[1], and of the first layer to grad_x.
  const auto backward_args = [&](size_t l, int64_t c, int64_t count, void* outputs,
                                 const std::array<void*, 2>& grads) {
    ClientLayerArgs a = layer_args(m, l, c, count, p, outputs);
    a.grad = grads[0];
    a.grad_x = l ? grads[1] : at(grad_x, c, m.element);
    a.grad_weight = at(grad_weights[l], c, m.element);
    a.grad_bias = at(grad_biases[l], c, m.element);
    return a;
  };
  const auto score_backward_args = [&](int64_t c, int64_t count, void* outputs, void* grads) {
    DotScoresArgs a = score_args(m, c, count, outputs);
    a.grad = at(grad_, c, m.element);
    a.grad_vectors = grads;
    a.grad_user = at(grad_output, c, m.element);
    return a;
  };
  // The kernels read `hidden` alone, through a pointer that the forward writes by.
  const auto outputs_of = [&](int64_t c) { return const_cast<void*>(at(hidden_, c, m.element)); };
  run_on(
      x,
      [&](auto) {
        int64_t scratch = 0;
        for (size_t l = 0; l < weights.size(); ++l)
          scratch = std::max(scratch, layer_backward_scratch(m.inputs(l), m.widths[l]));
        const int64_t accumulator = std::max<int64_t>(m.element, 4);
        const ClientLayerKernels& layers = select_wide_client_layer_kernels();
        const DotScoresKernels& dots = select_dot_scores_kernels();
        parallel_ranges(m.clients, m.work / 4, [&](int64_t begin, int64_t end) {
          const Buffer scratch_room = aligned_buffer(scratch * accumulator);
          const int64_t widest = m.positions * m.widest() * m.element;
          const Buffer above = aligned_buffer(widest), below = aligned_buffer(widest);
          for (int64_t n = begin; n < end; ++n) {
            const int64_t c = in_turn(n, m.clients);
            void* outputs = outputs_of(c);
            std::array<void*, 2> grads{above.get(), below.get()};
            DotScoresArgs score = score_backward_args(c, 1, outputs, grads[0]);
            const Buffer partial = aligned_buffer(score.blocks * score.D * accumulator);
            score.partial = partial.get();
            dots.backward[dtype](score, 0, score.blocks);
            dots.backward_user[dtype](score, 0, 1);
            for (size_t l = m.widths.size(); l-- > 0; std::swap(grads[0], grads[1])) {
              ClientLayerArgs a = backward_args(l, c, 1, outputs, grads);
              a.scratch = scratch_room.get();
              a.scratch_size = scratch;
              layers.backward[dtype](a, 0, 1);
            }
          }
        });
      },
      [&](auto stream) {
        void* outputs = outputs_of(0);
        Tensor above = allocate(x, {m.clients * m.positions * m.widest()});
        Tensor below = allocate(x, {m.clients * m.positions * m.widest()});
        std::array<void*, 2> grads{above.mutable_data_ptr(), below.mutable_data_ptr()};
        const DotScoresArgs score = score_backward_args(0, m.clients, outputs, grads[0]);
        const gpu::PositionSum sum = gpu::dot_scores_shape_user(score, m.clients);
        Tensor partial = allocate(x, {sum.partial_size()}, accumulator_type(m.x));
        gpu::dot_scores_backward(score, m.dtype, sum, partial.mutable_data_ptr(), stream);
        for (size_t l = m.widths.size(); l-- > 0; std::swap(grads[0], grads[1])) {
          gpu::client_layer_backward(backward_args(l, 0, m.clients, outputs, grads), m.dtype,
                                     m.clients, stream);
        }
      });
  return {grad_x, grad_weights, grad_biases, grad_output};
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("client_mlp", TORCH_BOX(&client_mlp));
  m.impl("client_mlp_backward", TORCH_BOX(&client_mlp_backward));
}

}  // namespace fedpeft
