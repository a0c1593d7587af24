// Binding of client_mlp and its gradient, for the CPU alone: the kernels of client_layer and
// dot_scores, called client by client through all layers of an MLP, so that what one layer leaves
// the next finds in the core's cache. Layer by layer over all clients it would be in memory.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "client_layer/client_layer_cpu.h"
#include "common/buffer.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/philox.h"
#include "losses/dot_scores_cpu.h"

#if !defined(FEDPEFT_EMULATOR)
namespace fedpeft {
namespace {

// Contiguous arguments of all clients, and their sizes.
struct Mlp {
  Tensor x, output, items;
  std::vector<Tensor> weights, biases;
  DType dtype;
  int64_t element;  // bytes
  int64_t clients, positions, in;
  std::vector<int64_t> widths;  // O of each layer
  int64_t hidden;               // their sum
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
    m.work += m.positions * weight.size(1) * width;
    width = weight.size(1);
    check_value(m.positions * width <= int64_t{1} << 34,
                "x: expected at most 2^34 elements of a layer a client, got ", m.positions * width);
    m.widths.push_back(width);
    m.hidden += width;
    m.weights.push_back(dense(weight));
  }
  check_dim(output, 2, "output", "[C, O]");
  check_size(output, 0, m.clients, "output", "C, the clients of x");
  check_size(output, 1, width, "output", "O, the width of the last layer");
  check_same_dtype(output, x, "output", "x");
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
int64_t in_turn(int64_t n, int64_t clients) { return n % 2 ? clients - 1 - n / 2 : n / 2; }

// Arguments of one layer of one client; `hidden` has the outputs [P, O] of all layers.
ClientLayerArgs layer_args(const Mlp& m, size_t layer, int64_t client, double p, void* hidden) {
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
    outputs += m.positions * m.widths[l] * m.element;
  }
  if (layer == 0) a.x = at(m.x, client, m.element);
  a.out = outputs;
  a.kept = outputs;
  return a;
}

DotScoresArgs score_args(const Mlp& m, int64_t client, void* hidden) {
  DotScoresArgs a{};
  a.positions = m.positions;
  a.D = m.widths.back();
  a.blocks = std::max<int64_t>(1, (a.positions + kScoreBlock - 1) / kScoreBlock);
  a.user = at(m.output, client, m.element);
  a.vectors = static_cast<char*>(hidden) + m.positions * (m.hidden - a.D) * m.element;
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
    m.biases.push_back(dense(biases[l]));
  }
  check_dim(clients, 1, "clients", "[C]");
  check_size(clients, 0, m.clients, "clients", "C, the clients of x");
  const Tensor clients_ = dense(clients);
  const IndexArray ids = indices_of(clients_, "clients");
  check_clients(ids, m.clients, int64_t{1} << 32);
  const uint32_t round_ = check_uint(round, int64_t{1} << 32, "round");
  const uint32_t epoch_ = check_uint(epoch, 1 << 16, "epoch");
  check_uint(int64_t(weights.size()), (1 << 8) + 1, "weights");

  Tensor scores = torch::stable::new_empty(x, {m.clients, m.positions});
  Tensor hidden = torch::stable::new_empty(x, {m.clients, m.positions * m.hidden});
  int64_t packed = 0, scratch = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    packed = std::max(packed, layer_packed_size(m.inputs(l), m.widths[l]));
    scratch = std::max(scratch, layer_forward_scratch(m.inputs(l), m.widths[l]));
  }
  const int64_t accumulator = std::max<int64_t>(m.element, 4);
  const ClientLayerKernels& layers = select_wide_client_layer_kernels();
  const DotScoresKernels& dots = select_dot_scores_kernels();
  const int dtype = int(m.dtype);
  parallel_ranges(m.clients, m.work / 8, [&](int64_t begin, int64_t end) {
    const Buffer packed_room = aligned_buffer(packed * accumulator),
                 scratch_room = aligned_buffer(scratch * accumulator);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t c = in_turn(n, m.clients);
      void* outputs = at(hidden, c, m.element);
      for (size_t l = 0; l < m.widths.size(); ++l) {
        ClientLayerArgs a = layer_args(m, l, c, p, outputs);
        a.bias = at(m.biases[l], c, m.element);
        a.clients = {static_cast<const char*>(ids.data) + c * ids.bytes, ids.bytes};
        a.tasks = (m.positions + kLayerTask - 1) / kLayerTask;
        a.packed = packed_room.get();
        a.scratch = scratch_room.get();
        a.sparse = l > 0;
        a.drop = p > 0;
        a.threshold = uint32_t(std::floor(std::ldexp(p, 32)));
        a.seed = uint64_t(seed);
        a.round = round_;
        a.stream = philox_stream(Purpose::dropout, uint32_t(l), epoch_);
        layers.pack[dtype](a, 0, 1);
        layers.forward[dtype](a, 0, a.tasks);
      }
      DotScoresArgs a = score_args(m, c, outputs);
      a.out = at(scores, c, m.element);
      dots.forward[dtype](a, 0, a.blocks);
    }
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
  check_dim(hidden, 2, "hidden", "[C, P sum O]");
  check_size(hidden, 0, m.clients, "hidden", "C, the clients of x");
  check_size(hidden, 1, m.positions * m.hidden, "hidden", "all that the layers gave");
  check_same_dtype(hidden, x, "hidden", "x");
  const Tensor grad_ = dense(grad), hidden_ = dense(hidden);

  Tensor grad_x = torch::stable::empty_like(m.x), grad_output = torch::stable::empty_like(m.output);
  std::vector<Tensor> grad_weights, grad_biases;
  int64_t scratch = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    grad_weights.push_back(torch::stable::empty_like(m.weights[l]));
    grad_biases.push_back(torch::stable::new_empty(x, {m.clients, m.widths[l]}));
    scratch = std::max(scratch, layer_backward_scratch(m.inputs(l), m.widths[l]));
  }
  const int64_t accumulator = std::max<int64_t>(m.element, 4);
  const ClientLayerKernels& layers = select_wide_client_layer_kernels();
  const DotScoresKernels& dots = select_dot_scores_kernels();
  const int dtype = int(m.dtype);
  parallel_ranges(m.clients, m.work / 4, [&](int64_t begin, int64_t end) {
    const Buffer scratch_room = aligned_buffer(scratch * accumulator);
    const int64_t widest = m.positions * m.widest() * m.element;
    const Buffer above = aligned_buffer(widest),  // gradients of a layer's output
        below = aligned_buffer(widest);           // and of its input
    for (int64_t n = begin; n < end; ++n) {
      const int64_t c = in_turn(n, m.clients);
      // The kernels read `hidden` alone, through a pointer that the forward writes by.
      void* outputs = const_cast<void*>(at(hidden_, c, m.element));
      DotScoresArgs score = score_args(m, c, outputs);
      const Buffer partial = aligned_buffer(score.blocks * score.D * accumulator);
      std::array<void*, 2> grads{above.get(), below.get()};
      score.grad = at(grad_, c, m.element);
      score.grad_vectors = grads[0];
      score.partial = partial.get();
      score.grad_user = at(grad_output, c, m.element);
      dots.backward[dtype](score, 0, score.blocks);
      dots.backward_user[dtype](score, 0, 1);
      for (size_t l = m.widths.size(); l-- > 0;) {
        ClientLayerArgs a = layer_args(m, l, c, p, outputs);
        a.grad = grads[0];
        a.grad_x = l ? grads[1] : at(grad_x, c, m.element);
        a.grad_weight = at(grad_weights[l], c, m.element);
        a.grad_bias = at(grad_biases[l], c, m.element);
        a.scratch = scratch_room.get();
        a.scratch_size = scratch;
        layers.backward[dtype](a, 0, 1);
        std::swap(grads[0], grads[1]);
      }
    }
  });
  return {grad_x, grad_weights, grad_biases, grad_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CPU, m) {
  m.impl("client_mlp", TORCH_BOX(&client_mlp));
  m.impl("client_mlp_backward", TORCH_BOX(&client_mlp_backward));
}

}  // namespace fedpeft
#endif
