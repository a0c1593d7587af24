// Binding of bpr_loss, bce_loss and their gradients: checks, allocation, dispatch.
#include <tuple>
#include <type_traits>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "losses/losses_cpu.h"
#include "losses/losses_cuda.h"

namespace fedpeft {
namespace {

enum class Loss { bpr, bce };

// Contiguous inputs of one call and what the kernels need to know of them.
struct Inputs {
  Tensor positive, negative, items;
  int64_t clients;
  int kernel;
  LossArgs args{};
  std::vector<int64_t> counts;

  Inputs(const Tensor& positive_, const Tensor& negative_, const Tensor& items_) {
    check_value(positive_.dim() == 1 || positive_.dim() == 2,
                "positive: expected shape [P] or [C, P], got ", shape_text(positive_));
    kernel = int(dtype_of(positive_, "positive"));
    check_same_shape(negative_, positive_, "negative", "positive");
    check_same_dtype(negative_, positive_, "negative", "positive");
    check_same_device(negative_, positive_, "negative", "positive");
    check_same_shape(items_, positive_, "items", "positive");
    check_same_device(items_, positive_, "items", "positive");
    positive = dense(positive_);
    negative = dense(negative_);
    items = dense(items_);
    clients = positive.dim() == 2 ? positive.size(0) : 1;
    args.positive = positive.const_data_ptr();
    args.negative = negative.const_data_ptr();
    args.items = indices_of(items, "items");
    args.positions = positive.size(positive.dim() - 1);
    args.blocks = std::max<int64_t>(1, (args.positions + kLossBlock - 1) / kLossBlock);
  }
  Inputs(const Inputs&) = delete;

  // Room on the host for the counts of each work item.
  void host_counts() {
    counts.resize(size_t(clients * args.blocks));
    args.counts = counts.data();
  }
  // On the device, for the clients that are more than one work item; it must outlive the kernels.
  Tensor device_counts() {
    Tensor room = allocate(positive, {clients * args.blocks}, ScalarType::Long);
    args.counts = static_cast<int64_t*>(room.mutable_data_ptr());
    return room;
  }

  template <typename Kernel>
  void run(const Kernel& kernel_function, int64_t cost) {
    parallel_ranges(clients * args.blocks, cost * std::min(args.positions, kLossBlock),
                    [&](int64_t begin, int64_t end) { kernel_function(args, begin, end); });
  }

  int64_t count(int64_t client) const {
    int64_t n = 0;
    for (int64_t b = 0; b < args.blocks; ++b) n += counts[size_t(client * args.blocks + b)];
    return n;
  }

  std::vector<int64_t> client_shape() const {
    return positive.dim() == 2 ? std::vector<int64_t>{clients} : std::vector<int64_t>{};
  }
};

template <Loss loss>
Tensor forward(const Tensor& positive, const Tensor& negative, const Tensor& items) {
  Inputs in(positive, negative, items);
  Tensor out;
  run_on(
      positive,
      [&](auto) {
        in.host_counts();
        std::vector<double> sums(in.counts.size());
        in.args.sums = sums.data();
        const LossKernels& kernels = select_wide_loss_kernels();
        in.run((loss == Loss::bpr ? kernels.bpr : kernels.bce)[in.kernel], 20);
        const auto write_means = [&](auto* means) {
          using T = std::remove_pointer_t<decltype(means)>;
          for (int64_t c = 0; c < in.clients; ++c) {
            double sum = 0;
            for (int64_t b = 0; b < in.args.blocks; ++b)
              sum += sums[size_t(c * in.args.blocks + b)];
            const int64_t n = in.count(c);
            means[c] = n == 0 ? T(0) : T(sum / double(loss == Loss::bpr ? n : 2 * n));
          }
        };
        if (positive.scalar_type() == ScalarType::Float) {
          out = allocate(in.positive, in.client_shape());
          write_means(static_cast<float*>(out.mutable_data_ptr()));
        } else {
          const Tensor mean = allocate(in.positive, in.client_shape(), ScalarType::Double);
          write_means(static_cast<double*>(mean.mutable_data_ptr()));
          out = as_dtype(mean, positive.scalar_type());
        }
      },
      [&](auto stream) {
        const Tensor counts = in.device_counts();
        Tensor sums = allocate(in.positive, {in.clients * in.args.blocks}, ScalarType::Double);
        in.args.sums = static_cast<double*>(sums.mutable_data_ptr());
        out = allocate(in.positive, in.client_shape());
        gpu::ranking_loss(in.args, DType(in.kernel), loss == Loss::bpr, in.clients,
                          out.mutable_data_ptr(), stream);
      });
  return out;
}

template <Loss loss>
std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& positive,
                                    const Tensor& negative, const Tensor& items) {
  Inputs in(positive, negative, items);
  const bool ok =
      grad.dim() == in.positive.dim() - 1 && (grad.dim() == 0 || grad.size(0) == in.clients);
  check_value(ok, "grad: expected the shape of the loss, ", in.positive.dim() == 2 ? "[C]" : "[]",
              ", got ", shape_text(grad));
  check_same_dtype(grad, positive, "grad", "positive");
  check_same_device(grad, positive, "grad", "positive");
  Tensor grad_positive = allocate_like(in.positive);
  Tensor grad_negative = allocate_like(in.negative);
  in.args.grad_positive = grad_positive.mutable_data_ptr();
  in.args.grad_negative = grad_negative.mutable_data_ptr();
  run_on(
      positive,
      [&](auto) {
        in.host_counts();
        const LossKernels& kernels = select_wide_loss_kernels();
        in.run(kernels.count, 1);
        const bool single = grad.scalar_type() == ScalarType::Float;
        const Tensor grad_ = dense(single ? grad : as_dtype(grad, ScalarType::Double));
        std::vector<double> scale(static_cast<size_t>(in.clients));
        const auto read_scale = [&](const auto* g) {
          for (int64_t c = 0; c < in.clients; ++c) {
            const int64_t n = in.count(c);
            scale[size_t(c)] = n == 0 ? 0 : double(g[c]) / double(loss == Loss::bpr ? n : 2 * n);
          }
        };
        if (single) {
          read_scale(static_cast<const float*>(grad_.const_data_ptr()));
        } else {
          read_scale(static_cast<const double*>(grad_.const_data_ptr()));
        }
        in.args.scale = scale.data();
        in.run((loss == Loss::bpr ? kernels.bpr_backward : kernels.bce_backward)[in.kernel], 20);
      },
      [&](auto stream) {
        const Tensor counts = in.device_counts(), grad_ = dense(grad);
        gpu::ranking_loss_backward(in.args, DType(in.kernel), loss == Loss::bpr, in.clients,
                                   grad_.const_data_ptr(), stream);
      });
  return {grad_positive, grad_negative};
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("bpr_loss", TORCH_BOX(&forward<Loss::bpr>));
  m.impl("bpr_loss_backward", TORCH_BOX(&backward<Loss::bpr>));
  m.impl("bce_loss", TORCH_BOX(&forward<Loss::bce>));
  m.impl("bce_loss_backward", TORCH_BOX(&backward<Loss::bce>));
}

}  // namespace fedpeft
