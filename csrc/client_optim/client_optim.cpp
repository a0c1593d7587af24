// Binding of client_adam_ and client_sgd_: checks, dispatch.
#include <algorithm>

#include "client_optim/client_optim_cpu.h"
#include "client_optim/client_optim_cuda.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"

namespace fedpeft {
namespace {

void check_state(const Tensor& state, const Tensor& param, const char* name) {
  check_same_shape(state, param, name, "param");
  check_same_device(state, param, name, "param");
  check_type(state.scalar_type() == accumulator_type(param), name, ": expected ",
             torch::headeronly::toString(accumulator_type(param)), " for a param of ",
             torch::headeronly::toString(param.scalar_type()), ", got ",
             torch::headeronly::toString(state.scalar_type()));
}

void check_param(const Tensor& param, const Tensor& grad) {
  check_value(param.dim() >= 1, "param: expected shape [C, ...], got ", shape_text(param));
  check_same_shape(grad, param, "grad", "param");
  check_same_dtype(grad, param, "grad", "param");
  check_same_device(grad, param, "grad", "param");
}

void check_rate(double value, const char* name) {
  check_value(value >= 0, name, ": expected at least 0, got ", value);
}

// What both rules need of contiguous tensors.
ClientOptimArgs common_args(const Tensor& param, const Tensor& grad, double lr, double l2) {
  ClientOptimArgs a{};
  a.param = param.mutable_data_ptr();
  a.grad = grad.const_data_ptr();
  a.size = param.size(0) ? param.numel() / param.size(0) : 0;
  a.row = std::max<int64_t>(param.dim() >= 2 ? param.size(param.dim() - 1) : 1, 1);
  a.lr = lr;
  a.l2 = l2;
  return a;
}

// Cuts clients into work items of about 4096 elements. Without L2 rows carry no meaning, so that
// short and long ones are regrouped.
[[maybe_unused]] void cut(ClientOptimArgs& a) {
  constexpr int64_t kItem = 4096;
  if (a.l2 == 0) a.row = std::clamp<int64_t>(a.row, 128, kItem);
  a.rows = std::max<int64_t>(1, kItem / a.row);
  a.blocks = (a.size + a.rows * a.row - 1) / (a.rows * a.row);
}

// A contiguous tensor that stands for `t`; write_back copies it over when it is not `t` itself.
void write_back(Tensor t, const Tensor& contiguous) {
  if (!t.is_contiguous()) torch::stable::copy_(t, contiguous);
}

void client_adam_(const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                  const Tensor& exp_avg_sq, const Tensor& steps, double lr, double beta1,
                  double beta2, double eps, double l2) {
  const DType dtype = dtype_of(param, "param");
  check_param(param, grad);
  check_state(exp_avg, param, "exp_avg");
  check_state(exp_avg_sq, param, "exp_avg_sq");
  check_dim(steps, 1, "steps", "[C]");
  check_size(steps, 0, param.size(0), "steps", "C, the clients of param");
  check_same_device(steps, param, "steps", "param");
  check_rate(lr, "lr");
  check_rate(eps, "eps");
  check_rate(l2, "l2");
  check_value(beta1 >= 0 && beta1 < 1, "beta1: expected at least 0 and below 1, got ", beta1);
  check_value(beta2 >= 0 && beta2 < 1, "beta2: expected at least 0 and below 1, got ", beta2);

  const Tensor param_ = dense(param), grad_ = dense(grad), exp_avg_ = dense(exp_avg);
  const Tensor exp_avg_sq_ = dense(exp_avg_sq), steps_ = dense(steps);
  ClientOptimArgs a = common_args(param_, grad_, lr, l2);
  a.exp_avg = exp_avg_.mutable_data_ptr();
  a.exp_avg_sq = exp_avg_sq_.mutable_data_ptr();
  a.steps = indices_of(steps_, "steps");
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  const int64_t clients = param.size(0);
  run_on(
      param,
      [&](auto) {
        cut(a);
        const auto kernel = select_client_optim_kernels().adam[int(dtype)];
        parallel_ranges(clients * a.blocks, 4 * std::min(a.size, a.rows * a.row),
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::client_adam(a, dtype, clients, stream); });
  write_back(param, param_);
  write_back(exp_avg, exp_avg_);
  write_back(exp_avg_sq, exp_avg_sq_);
}

void client_sgd_(const Tensor& param, const Tensor& grad,
                 const std::optional<Tensor>& momentum_buffer, double lr, double momentum,
                 double l2) {
  const DType dtype = dtype_of(param, "param");
  check_param(param, grad);
  check_rate(lr, "lr");
  check_rate(l2, "l2");
  check_rate(momentum, "momentum");
  check_value(momentum == 0 || momentum_buffer.has_value(),
              "momentum_buffer: expected a tensor with momentum ", momentum, ", got None");
  if (momentum_buffer) check_state(*momentum_buffer, param, "momentum_buffer");

  const Tensor param_ = dense(param), grad_ = dense(grad);
  const std::optional<Tensor> buffer_ = dense(momentum_buffer);
  ClientOptimArgs a = common_args(param_, grad_, lr, l2);
  a.momentum_buffer = buffer_ ? buffer_->mutable_data_ptr() : nullptr;
  a.momentum = momentum;
  const int64_t clients = param.size(0);
  run_on(
      param,
      [&](auto) {
        cut(a);
        const auto kernel = select_client_optim_kernels().sgd[int(dtype)];
        parallel_ranges(clients * a.blocks, 2 * std::min(a.size, a.rows * a.row),
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::client_sgd(a, dtype, clients, stream); });
  write_back(param, param_);
  if (buffer_) write_back(*momentum_buffer, *buffer_);
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("client_adam_", TORCH_BOX(&client_adam_));
  m.impl("client_sgd_", TORCH_BOX(&client_sgd_));
}

}  // namespace fedpeft
