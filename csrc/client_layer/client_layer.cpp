// Binding of client_layer and its gradient: checks, allocation, dispatch.
#include <cmath>
#include <tuple>

#include "client_layer/client_layer_cpu.h"
#include "client_layer/client_layer_cuda.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "common/philox.h"

namespace fedpeft {
namespace {

// Sizes of x [(C,) P, I] and weight [(C,) O, I]; without C there is one client.
ClientLayerArgs shapes(const Tensor& x, const Tensor& weight, const Tensor& items, double p,
                       int64_t* clients) {
  check_value(x.dim() == 2 || x.dim() == 3, "x: expected shape [P, I] or [C, P, I], got ",
              shape_text(x));
  const bool batched = x.dim() == 3;
  check_dim(weight, x.dim(), "weight", batched ? "[C, O, I]" : "[O, I]");
  check_dim(items, x.dim() - 1, "items", batched ? "[C, P]" : "[P]");
  if (batched) {
    check_size(weight, 0, x.size(0), "weight", "C, the clients of x");
    check_size(items, 0, x.size(0), "items", "C, the clients of x");
  }
  check_size(weight, weight.dim() - 1, x.size(x.dim() - 1), "weight", "I, the width of x");
  check_size(items, items.dim() - 1, x.size(x.dim() - 2), "items", "P, the positions of x");
  check_same_dtype(weight, x, "weight", "x");
  check_same_device(weight, x, "weight", "x");
  check_same_device(items, x, "items", "x");
  check_value(p >= 0 && p < 1, "p: expected a probability from 0 to below 1, got ", p);
  ClientLayerArgs a{};
  *clients = batched ? x.size(0) : 1;
  a.positions = x.size(x.dim() - 2);
  a.in = x.size(x.dim() - 1);
  a.out_width = weight.size(weight.dim() - 2);
  a.scale = 1 / (1 - p);
  return a;
}

std::vector<int64_t> shape_of(const Tensor& x, int64_t clients, int64_t rows, int64_t columns) {
  return x.dim() == 3 ? std::vector<int64_t>{clients, rows, columns}
                      : std::vector<int64_t>{rows, columns};
}

Tensor client_layer(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& items,
                    const Tensor& clients, double p, int64_t seed, int64_t round, int64_t epoch,
                    int64_t layer) {
  const DType dtype = dtype_of(x, "x");
  int64_t count;
  ClientLayerArgs a = shapes(x, weight, items, p, &count);
  check_dim(bias, x.dim() - 1, "bias", x.dim() == 3 ? "[C, O]" : "[O]");
  check_dim(clients, x.dim() - 2, "clients", x.dim() == 3 ? "[C]" : "[]");
  if (x.dim() == 3) {
    check_size(bias, 0, count, "bias", "C, the clients of x");
    check_size(clients, 0, count, "clients", "C, the clients of x");
  }
  check_size(bias, bias.dim() - 1, a.out_width, "bias", "O, the rows of weight");
  check_same_dtype(bias, x, "bias", "x");
  check_same_device(bias, x, "bias", "x");
  check_same_device(clients, x, "clients", "x");
  check_value(a.positions * a.out_width <= int64_t{1} << 34,
              "x: expected at most 2^34 output elements a client, got ", a.positions * a.out_width);
  const Tensor x_ = dense(x), weight_ = dense(weight), bias_ = dense(bias);
  const Tensor items_ = dense(items), clients_ = dense(clients);
  Tensor out = allocate(x, shape_of(x, count, a.positions, a.out_width));
  a.x = x_.const_data_ptr();
  a.weight = weight_.const_data_ptr();
  a.bias = bias_.const_data_ptr();
  a.items = indices_of(items_, "items");
  a.clients = indices_of(clients_, "clients");
  a.out = out.mutable_data_ptr();
  a.sparse = layer > 0;
  a.drop = p > 0;
  a.threshold = uint32_t(std::floor(std::ldexp(p, 32)));
  a.seed = uint64_t(seed);
  a.round = check_uint(round, int64_t{1} << 32, "round");
  a.stream = philox_stream(Purpose::dropout, check_uint(layer, 1 << 8, "layer"),
                           check_uint(epoch, 1 << 16, "epoch"));
  const ScalarType accumulator = accumulator_type(x);
  run_on(
      x,
      [&](auto) {
        check_clients(a.clients, count, int64_t{1} << 32);
        a.tasks = (a.positions + kLayerTask - 1) / kLayerTask;
        a.packed_size = layer_packed_size(a.in, a.out_width);
        a.scratch_size = layer_forward_scratch(a.in, a.out_width);
        Tensor packed = allocate(x, {count * a.packed_size}, accumulator);
        Tensor scratch = allocate(x, {count * a.tasks * a.scratch_size}, accumulator);
        a.packed = packed.mutable_data_ptr();
        a.scratch = scratch.mutable_data_ptr();
        const ClientLayerKernels& kernels = select_wide_client_layer_kernels();
        parallel_ranges(count, a.in * a.out_width, [&](int64_t begin, int64_t end) {
          kernels.pack[int(dtype)](a, begin, end);
        });
        parallel_ranges(
            count * a.tasks, std::min(a.positions, kLayerTask) * a.in * a.out_width / 8,
            [&](int64_t begin, int64_t end) { kernels.forward[int(dtype)](a, begin, end); });
      },
      [&](auto stream) { gpu::client_layer(a, dtype, count, stream); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> client_layer_backward(const Tensor& grad, const Tensor& x,
                                                         const Tensor& weight, const Tensor& out,
                                                         const Tensor& items, double p) {
  const DType dtype = dtype_of(x, "x");
  int64_t count;
  ClientLayerArgs a = shapes(x, weight, items, p, &count);
  const std::vector<int64_t> shape = shape_of(x, count, a.positions, a.out_width);
  const auto check_output = [&](const Tensor& t, const char* name) {
    check_value(has_shape(t, shape), name, ": expected the shape of the output, that of x ",
                shape_text(x), " with O = ", a.out_width, " in place of I, got ", shape_text(t));
    check_same_dtype(t, x, name, "x");
    check_same_device(t, x, name, "x");
  };
  check_output(grad, "grad");
  check_output(out, "out");
  const Tensor grad_ = dense(grad), x_ = dense(x), weight_ = dense(weight), out_ = dense(out);
  const Tensor items_ = dense(items);
  Tensor grad_x = allocate_like(x_);
  Tensor grad_weight = allocate_like(weight_);
  Tensor grad_bias = allocate(x, x.dim() == 3 ? std::vector<int64_t>{count, a.out_width}
                                              : std::vector<int64_t>{a.out_width});
  a.grad = grad_.const_data_ptr();
  a.x = x_.const_data_ptr();
  a.weight = weight_.const_data_ptr();
  a.kept = out_.const_data_ptr();
  a.items = indices_of(items_, "items");
  a.grad_x = grad_x.mutable_data_ptr();
  a.grad_weight = grad_weight.mutable_data_ptr();
  a.grad_bias = grad_bias.mutable_data_ptr();
  const ScalarType accumulator = accumulator_type(x);
  run_on(
      x,
      [&](auto) {
        a.scratch_size = layer_backward_scratch(a.in, a.out_width);
        Tensor scratch = allocate(x, {count * a.scratch_size}, accumulator);
        a.scratch = scratch.mutable_data_ptr();
        const auto kernel = select_wide_client_layer_kernels().backward[int(dtype)];
        parallel_ranges(count, a.positions * a.in * a.out_width / 4,
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::client_layer_backward(a, dtype, count, stream); });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("client_layer", TORCH_BOX(&client_layer));
  m.impl("client_layer_backward", TORCH_BOX(&client_layer_backward));
}

}  // namespace fedpeft
