// Binding of dot_scores and its gradient: checks, allocation, dispatch.
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "losses/dot_scores_cpu.h"
#include "losses/dot_scores_cuda.h"

namespace fedpeft {
namespace {

// Sizes of [(C,) P, D] and [(C,) D]; without C there is one client.
DotScoresArgs shapes(const Tensor& vectors, const Tensor& user, int64_t* clients) {
  check_value(vectors.dim() == 2 || vectors.dim() == 3,
              "vectors: expected shape [P, D] or [C, P, D], got ", shape_text(vectors));
  const bool batched = vectors.dim() == 3;
  check_dim(user, vectors.dim() - 1, "user", batched ? "[C, D]" : "[D]");
  if (batched) check_size(user, 0, vectors.size(0), "user", "C, the clients of vectors");
  check_size(user, user.dim() - 1, vectors.size(vectors.dim() - 1), "user",
             "D, the width of vectors");
  check_same_dtype(user, vectors, "user", "vectors");
  check_same_device(user, vectors, "user", "vectors");
  DotScoresArgs a{};
  *clients = batched ? vectors.size(0) : 1;
  a.positions = vectors.size(vectors.dim() - 2);
  a.D = vectors.size(vectors.dim() - 1);
  a.blocks = std::max<int64_t>(1, (a.positions + kScoreBlock - 1) / kScoreBlock);
  return a;
}

Tensor dot_scores(const Tensor& vectors, const Tensor& user) {
  const DType dtype = dtype_of(vectors, "vectors");
  int64_t clients;
  DotScoresArgs a = shapes(vectors, user, &clients);
  const Tensor vectors_ = dense(vectors), user_ = dense(user);
  const std::vector<int64_t> shape = vectors.dim() == 3 ? std::vector<int64_t>{clients, a.positions}
                                                        : std::vector<int64_t>{a.positions};
  Tensor out = allocate(vectors, shape);
  a.vectors = vectors_.const_data_ptr();
  a.user = user_.const_data_ptr();
  a.out = out.mutable_data_ptr();
  run_on(
      vectors,
      [&](auto) {
        const auto kernel = select_dot_scores_kernels().forward[int(dtype)];
        parallel_ranges(clients * a.blocks, std::min(a.positions, kScoreBlock) * a.D,
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::dot_scores(a, dtype, clients, stream); });
  return out;
}

std::tuple<Tensor, Tensor> dot_scores_backward(const Tensor& grad, const Tensor& vectors,
                                               const Tensor& user) {
  const DType dtype = dtype_of(vectors, "vectors");
  int64_t clients;
  DotScoresArgs a = shapes(vectors, user, &clients);
  bool ok = grad.dim() == vectors.dim() - 1;
  for (int64_t d = 0; ok && d < grad.dim(); ++d) ok = grad.size(d) == vectors.size(d);
  check_value(ok, "grad: expected the shape of vectors ", shape_text(vectors), " without D, got ",
              shape_text(grad));
  check_same_dtype(grad, vectors, "grad", "vectors");
  check_same_device(grad, vectors, "grad", "vectors");
  const Tensor grad_ = dense(grad), vectors_ = dense(vectors), user_ = dense(user);
  Tensor grad_vectors = allocate_like(vectors_);
  Tensor grad_user = allocate_like(user_);
  a.grad = grad_.const_data_ptr();
  a.vectors = vectors_.const_data_ptr();
  a.user = user_.const_data_ptr();
  a.grad_vectors = grad_vectors.mutable_data_ptr();
  a.grad_user = grad_user.mutable_data_ptr();
  const ScalarType accumulator = accumulator_type(vectors);
  run_on(
      vectors,
      [&](auto) {
        Tensor partial = allocate(vectors, {clients * a.blocks, a.D}, accumulator);
        a.partial = partial.mutable_data_ptr();
        const DotScoresKernels& kernels = select_dot_scores_kernels();
        parallel_ranges(
            clients * a.blocks, 2 * std::min(a.positions, kScoreBlock) * a.D,
            [&](int64_t begin, int64_t end) { kernels.backward[int(dtype)](a, begin, end); });
        parallel_ranges(clients, a.blocks * a.D, [&](int64_t begin, int64_t end) {
          kernels.backward_user[int(dtype)](a, begin, end);
        });
      },
      [&](auto stream) {
        const gpu::PositionSum sum = gpu::dot_scores_shape_user(a, clients);
        Tensor partial = allocate(vectors, {sum.partial_size()}, accumulator);
        gpu::dot_scores_backward(a, dtype, sum, partial.mutable_data_ptr(), stream);
      });
  return {grad_vectors, grad_user};
}

}  // namespace

FEDPEFT_IMPL(m) {
  m.impl("dot_scores", TORCH_BOX(&dot_scores));
  m.impl("dot_scores_backward", TORCH_BOX(&dot_scores_backward));
}

}  // namespace fedpeft
