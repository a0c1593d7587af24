// A call of local_train and its kin: its checked arguments, and how threads share its clients. For
// the binding files.
#pragma once

#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "local_train/local_train_cpu.h"

namespace fedpeft {

using Optional = std::optional<Tensor>;

// What is trained, on what, and how: the arguments that the ops share, in their order.
struct Training {
  const Tensor &indptr, &items, &positives;
  int64_t num_items;
  const Tensor& user;
  const Optional &base, &table, &A, &B, &codes, &codebooks, &buckets, &hashes, &w1, &b1, &w2, &b2;
  const std::vector<Tensor>& mlp;
  double dropout;
  bool mean, graph;
  int64_t epochs, batch_size;
  bool bpr, adam;
  double lr, beta1, beta2, eps, l2_user, l2_items, prox;
  int64_t seed, round;
};

// An MLP: weight and bias of each layer, then the output's weights.
struct Mlp {
  std::vector<Tensor> tensors;  // contiguous
  std::vector<const void*> data;
  std::vector<int64_t> widths;  // of the layers
  bool own;                     // [C, ...]
};

// A checked call: contiguous arguments, and views of them for the kernels.
struct Call {
  Tensor clients, indptr, items, positives, user;
  Optional base, table, A, B, codes, codebooks, buckets, hashes, w1, b1, w2, b2;
  DType dtype;
  LocalTrainArgs args{};
  FirstError bad_item, bad_order, no_negative, bad_code;
  Mlp mlp{};
  std::vector<int64_t> sizes;  // items of each client

  // The results for an MLP, [C, ...] each, which the kernels write.
  std::vector<Tensor> mlp_updates() {
    std::vector<Tensor> results;
    for (const Tensor& t : mlp.tensors) {
      std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
      if (!mlp.own) shape.insert(shape.begin(), clients.size(0));
      results.push_back(allocate(user, shape));
      mlp_results.push_back(results.back().mutable_data_ptr());
    }
    args.d_mlp = mlp_results.data();
    return results;
  }
  // The same for clients' own MLPs, one after the other: torch.compile takes no list of results
  // from an op that writes to arguments.
  Tensor own_mlps() {
    int64_t all = 0;
    for (const Tensor& t : mlp.tensors) all += mlp.own ? t.numel() : 0;
    Tensor result = allocate(user, {all});
    if (!mlp.own) return result;
    char* at = static_cast<char*>(result.mutable_data_ptr());
    for (const Tensor& t : mlp.tensors) {
      mlp_results.push_back(at);
      at += t.numel() * element_size(dtype);
    }
    args.d_mlp = mlp_results.data();
    return result;
  }

 private:
  std::vector<void*> mlp_results;
};

void prepare(Call& call, const Tensor& clients, const Training& training);

// What the kernels reported, as an exception.
// `read(indices, at)`: an element of an index array, wherever it is.
template <typename Read>
void raise_errors(const LocalTrainArgs& a, const Read& read) {
  if (a.bad_item->any()) {
    const int64_t at = a.bad_item->position;
    throw std::out_of_range(text("items: item ", read(a.items, at), " at position ", at,
                                 " is out of range: expected 0 to ", a.num_items - 1));
  }
  check_value(!a.bad_order->any(),
              "positives: expected each client's items, distinct and ascending, got ",
              a.bad_order->any() ? read(a.positives, a.bad_order->position) : 0, " at position ",
              a.bad_order->position);
  check_value(!a.no_negative->any(), "clients: client ", a.no_negative->position, " has met all ",
              a.num_items, " items: there is no negative to draw");
  if (a.bad_code->any())
    throw_bad_code(read(a.codes, a.bad_code->position), a.bad_code->position, a.L, a.K);
}
inline void raise_errors(const LocalTrainArgs& a) {
  raise_errors(a, [](const IndexArray& indices, int64_t at) { return indices[at]; });
}

// Places of `sizes` from the largest to the smallest, equal ones in order.
std::vector<int64_t> largest_first(const std::vector<int64_t>& sizes);

// Calls f(task) for tasks [0, n) on torch's threads.
template <typename F>
void parallel_tasks(int64_t n, const F& f) {
  const auto range = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  };
  if (n <= 1) {
    range(0, n);
  } else {
    torch::stable::parallel_for(0, n, 1, range);
  }
}

// Trains the clients of the call in `order`, each as one task taken by whichever of `threads` is
// free. A thread draws for its next client before it trains the present one, which then asks for
// the next one's rows on the way. `train(thread, c, draws, ahead, scratch)`: as the kernel, with
// memory of the thread's own.
template <typename Train>
void train_on_cpu(const LocalTrainArgs& a, const std::vector<int64_t>& sizes,
                  const std::vector<int64_t>& order, int64_t threads, DType dtype,
                  const Tensor& like, const Train& train) {
  const LocalTrainKernels& kernels = local_train_kernels_for(a);
  const int64_t C = int64_t(order.size());
  // Not always the most for the most items: the maps of rows change their kind.
  int64_t bytes = 0, draws_bytes = 0, known = -1;
  for (const int64_t c : order) {
    const int64_t n = sizes[size_t(c)];
    if (n == known) continue;
    bytes = std::max(bytes, kernels.scratch[int(dtype)](a, known = n));
    draws_bytes = std::max(draws_bytes, kernels.draws_room(a, n));
  }
  const int64_t room_bytes = bytes + 2 * draws_bytes;
  Tensor room = allocate(like, {threads, room_bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(room.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  parallel_tasks(threads, [&](int64_t t) {
    char *const scratch = memory + t * room_bytes, *draws = scratch + bytes,
                *ahead_draws = draws + draws_bytes;
    bool drawn = false;
    for (int64_t i = next++; i < C;) {
      const int64_t c = order[size_t(i)];
      if (!drawn) kernels.draw(a, c, draws);
      // The last clients are left to whoever is free first.
      drawn = threads == 1 || i + 2 * threads < C;
      i = drawn ? next++ : C;
      drawn = i < C;
      if (drawn) kernels.draw(a, order[size_t(i)], ahead_draws);
      if (i + threads < C) kernels.ask(a, order[size_t(i + threads)]);
      train(t, c, draws, drawn ? ahead_draws : nullptr, scratch);
      if (!drawn) i = next++;
      std::swap(draws, ahead_draws);
    }
  });
}

inline int64_t threads_for(int64_t C) {
  return std::min<int64_t>(torch::stable::get_num_threads(), C);
}

}  // namespace fedpeft
