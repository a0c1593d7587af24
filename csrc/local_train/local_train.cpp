// Binding of local_train: checks, allocation, dispatch.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <functional>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "local_train/local_train_cpu.h"
#include "local_train/local_train_cuda.h"

namespace fedpeft {
namespace {

using Optional = std::optional<Tensor>;

void check_table(const Optional& t, std::vector<int64_t> shape, const Tensor& user,
                 const char* name, const char* meaning) {
  if (!t.has_value()) return;
  bool ok = t->dim() == int64_t(shape.size());
  for (size_t d = 0; ok && d < shape.size(); ++d)
    ok = shape[d] < 0 || t->size(int64_t(d)) == shape[d];
  check_value(ok, name, ": expected shape ", meaning, ", got ", shape_text(*t));
  check_same_dtype(*t, user, name, "user");
  check_same_device(*t, user, name, "user");
}

void check_together(const Optional& a, const Optional& b, const char* a_name, const char* b_name) {
  check_value(a.has_value() == b.has_value(), a_name, ": expected together with ", b_name,
              ", got only ", a.has_value() ? a_name : b_name);
}

int64_t items_of(const LocalTrainArgs& a, int64_t c) {
  const int64_t client = a.clients[c];
  return a.indptr[client + 1] - a.indptr[client];
}

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

// Places of `sizes` from the largest to the smallest, equal ones in order.
std::vector<int64_t> largest_first(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> order(sizes.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return sizes[size_t(x)] > sizes[size_t(y)]; });
  return order;
}

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// Trains the clients of the call in `order`, each as one task taken by whichever of `threads` is
// free. A thread draws for its next client before it trains the present one, which then asks for
// the next one's rows on the way. `train(thread, c, draws, ahead, scratch)`: as the kernel, with
// memory of the thread's own.
template <typename Train>
[[maybe_unused]] void train_on_cpu(const LocalTrainArgs& a, const std::vector<int64_t>& sizes,
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

[[maybe_unused]] int64_t threads_for(int64_t C) {
  return std::min<int64_t>(torch::stable::get_num_threads(), C);
}

void check_range(const LocalTrainArgs& a, int64_t client, int64_t first, int64_t last) {
  check_value(0 <= first && first <= last && last <= a.nnz,
              "indptr: expected ascending offsets of 0 to ", a.nnz, ", got ", first, " and ", last,
              " for client ", client);
  check_value(last - first < int64_t{1} << 28,
              "indptr: expected fewer than 2^28 items a client, got ", last - first, " for client ",
              client);
}

// Items of each client of the call.
[[maybe_unused]] std::vector<int64_t> sizes_on_cpu(const LocalTrainArgs& a, int64_t C) {
  check_clients(a.clients, C, a.users);
  std::vector<int64_t> sizes(static_cast<size_t>(C));
  for (int64_t c = 0; c < C; ++c) {
    const int64_t client = a.clients[c];
    check_range(a, client, a.indptr[client], a.indptr[client + 1]);
    sizes[size_t(c)] = items_of(a, c);
  }
  return sizes;
}

// The same where the arrays are on the device, which is waited for: sizes of outputs are known from
// them.
[[maybe_unused]] std::vector<int64_t> sizes_on_gpu(const LocalTrainArgs& a, int64_t C,
                                                   const Tensor& like, gpu::Stream stream) {
  Tensor ranges = allocate(like, {C, 3}, ScalarType::Long);
  const auto found = gpu::local_train_ranges(
      a, C, static_cast<gpu::ClientRange*>(ranges.mutable_data_ptr()), stream);
  std::vector<int64_t> sizes(static_cast<size_t>(C));
  for (int64_t c = 0; c < C; ++c) {
    const auto [client, first, last] = found[size_t(c)];
    if (client < 0 || client >= a.users) throw_bad_client(client, c, a.users);
    check_range(a, client, first, last);
    check_value(last - first < a.num_items || last == first, "clients: client ", client,
                " has met all ", a.num_items, " items: there is no negative to draw");
    const int64_t reads = std::max({int64_t{1}, a.L, a.H}), most = int64_t{1} << 30;
    check_value((last - first) * (1 + a.epochs) <= most / reads,
                "indptr: expected at most 2^30 rows read by a client's draws, got ", last - first,
                " items of ", reads, " rows and ", a.epochs, " epochs for client ", client);
    sizes[size_t(c)] = last - first;
  }
  return sizes;
}

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
[[maybe_unused]] void raise_errors(const LocalTrainArgs& a) {
  raise_errors(a, [](const IndexArray& indices, int64_t at) { return indices[at]; });
}

// Trains all clients of the call, the largest first, each as a block taken by whichever
// multiprocessor is free.
[[maybe_unused]] void train_on_gpu(const LocalTrainArgs& a, std::vector<int64_t> sizes, DType dtype,
                                   const Tensor& like, gpu::Stream stream) {
  const int64_t C = int64_t(sizes.size());
  const std::vector<int64_t> order = largest_first(sizes);
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  const gpu::LocalTrainPlan plan = gpu::plan_local_train(a, dtype, sizes);
  const auto bytes = [&](int64_t count) { return allocate(like, {count}, ScalarType::Byte); };
  Tensor scratch = bytes(plan.blocks * plan.scratch_bytes), places = bytes(8 * C),
         state = bytes(sizeof(gpu::LocalTrainState)), lists = bytes(gpu::lists_bytes(a));
  gpu::copy_to_device(places.mutable_data_ptr(), order.data(), 8 * C, stream);
  const gpu::LocalTrainErrors errors = gpu::local_train(
      a, dtype, C, plan, static_cast<const int64_t*>(places.const_data_ptr()),
      scratch.mutable_data_ptr(), static_cast<gpu::LocalTrainState*>(state.mutable_data_ptr()),
      lists.mutable_data_ptr(), stream);
  a.bad_item->report(errors.item);
  a.bad_order->report(errors.order);
  a.bad_code->report(errors.code);
  raise_errors(a, [&](const IndexArray& indices, int64_t at) {
    return gpu::read_index(indices, at, stream);
  });
}

// An MLP: weight and bias of each layer, then the output's weights.
struct Mlp {
  std::vector<Tensor> tensors;  // contiguous
  std::vector<const void*> data;
  std::vector<int64_t> widths;  // of the layers
  bool own;                     // [C, ...]
};

// The width of an item's vector: that of the user's, or what the first layer takes beside it.
int64_t item_width(const Tensor& user, const std::vector<Tensor>& mlp) {
  if (mlp.empty()) return user.size(1);
  check_value(mlp[0].dim() == 2 || mlp[0].dim() == 3,
              "mlp: expected a first weight [O, I] or [C, O, I], got ", shape_text(mlp[0]));
  const int64_t width = mlp[0].size(mlp[0].dim() - 1) - user.size(1);
  check_value(width >= 0, "mlp: expected a first layer at least as wide as user, ", user.size(1),
              ", got ", shape_text(mlp[0]));
  return width;
}

void check_mlp(Mlp& checked, const std::vector<Tensor>& mlp, const Tensor& user, int64_t D,
               int64_t C, double dropout) {
  check_value(dropout >= 0 && dropout < 1,
              "dropout: expected a probability from 0 to below 1, got ", dropout);
  if (mlp.empty()) return;
  check_value(mlp.size() % 2 == 1 && mlp.size() >= 3 && mlp.size() < 2 * (1 << 8),
              "mlp: expected weight and bias of 1 to 255 layers and the output, got ", mlp.size(),
              " tensors");
  checked.own = mlp[0].dim() == 3;
  int64_t in = user.size(1) + D;
  const auto check = [&](const Tensor& t, std::vector<int64_t> shape, const char* meaning) {
    if (checked.own) shape.insert(shape.begin(), C);
    check_value(has_shape(t, shape), "mlp: expected ", meaning, ", with C before all or none, got ",
                shape_text(t));
    check_same_dtype(t, user, "mlp", "user");
    check_same_device(t, user, "mlp", "user");
    checked.tensors.push_back(dense(t));
    checked.data.push_back(checked.tensors.back().const_data_ptr());
  };
  for (size_t i = 0; i + 1 < mlp.size(); i += 2) {
    const int64_t dims = checked.own ? 3 : 2;
    const int64_t out = mlp[i].dim() == dims ? mlp[i].size(dims - 2) : -1;
    check(mlp[i], {out, in}, "a weight [O, I] for the I that the layer before gives");
    check_value(out >= 1, "mlp: expected layers of at least one unit, got ", shape_text(mlp[i]));
    check(mlp[i + 1], {out}, "a bias [O] for its weight");
    checked.widths.push_back(in = out);
  }
  check(mlp.back(), {in}, "an output [O] for the O of the last layer");
}

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

// Trained parts, in the order of the results.
constexpr size_t kParts = broken_parts;

void prepare(Call& call, const Tensor& clients, const Tensor& indptr, const Tensor& items,
             const Tensor& positives, int64_t num_items, const Tensor& user, const Optional& base,
             const Optional& table, const Optional& A, const Optional& B, const Optional& codes,
             const Optional& codebooks, const Optional& buckets, const Optional& hashes,
             const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
             const std::vector<Tensor>& mlp, double dropout, bool mean, bool graph, int64_t epochs,
             int64_t batch_size, bool bpr, bool adam, double lr, double beta1, double beta2,
             double eps, double l2_user, double l2_items, double prox, int64_t seed,
             int64_t round) {
  check_dim(clients, 1, "clients", "[C]");
  check_dim(indptr, 1, "indptr", "[U + 1]");
  check_value(indptr.size(0) >= 1, "indptr: expected shape [U + 1], got ", shape_text(indptr));
  check_dim(items, 1, "items", "[nnz]");
  check_dim(positives, 1, "positives", "[nnz]");
  check_size(positives, 0, items.size(0), "positives", "nnz, as items");
  check_dim(user, 2, "user", mlp.empty() ? "[U, D]" : "[U, V]");
  check_size(user, 0, indptr.size(0) - 1, "user", "U, the users of indptr");
  check_value(num_items >= 0 && num_items < int64_t{1} << 62, "num_items: expected 0 to 2^62, got ",
              num_items);
  const int64_t I = num_items, D = item_width(user, mlp);
  const DType dtype = dtype_of(user, "user");
  check_type(dtype == DType::f32 || dtype == DType::f64, "user: expected float32 or float64, got ",
             torch::headeronly::toString(user.scalar_type()));
  for (const auto& [t, name] : {std::pair(&clients, "clients"),
                                {&indptr, "indptr"},
                                {&items, "items"},
                                {&positives, "positives"}})
    check_same_device(*t, user, name, "user");
  check_table(base, {I, D}, user, "base", "[I, D]");
  check_table(table, {I, D}, user, "table", "[I, D]");
  check_table(A, {I, -1}, user, "A", "[I, r]");
  check_together(A, B, "A", "B");
  check_table(B, {D, A ? A->size(1) : 0}, user, "B", "[D, r]");
  check_table(codebooks, {-1, -1, D}, user, "codebooks", "[L, K, D]");
  check_together(codebooks, codes, "codebooks", "codes");
  if (codes) {
    check_dim(*codes, 2, "codes", "[I, L]");
    check_size(*codes, 0, I, "codes", "I, the number of items");
    check_size(*codes, 1, codebooks->size(0), "codes", "L, the levels of codebooks");
    check_same_device(*codes, user, "codes", "user");
  }
  check_table(buckets, {-1, D}, user, "buckets", "[M, D]");
  check_together(buckets, hashes, "buckets", "hashes");
  int64_t H = 0, S = 0;
  if (hashes) {
    check_dim(*hashes, 2, "hashes", "[H, 2]");
    check_size(*hashes, 1, 2, "hashes", "a and b");
    check_type(hashes->scalar_type() == ScalarType::Long, "hashes: expected int64, got ",
               torch::headeronly::toString(hashes->scalar_type()));
    check_same_device(*hashes, user, "hashes", "user");
    check_value(buckets->size(0) > 0, "buckets: expected at least one row, got ",
                shape_text(*buckets));
    H = hashes->size(0);
  }
  if (w1) {
    check_value(buckets.has_value(), "w1: expected together with buckets, got only w1");
    check_dim(*w1, 2, "w1", "[S, H]");
    S = w1->size(0);
  }
  for (const auto& [t, name] : {std::pair(&b1, "b1"), {&w2, "w2"}, {&b2, "b2"}})
    check_together(w1, *t, "w1", name);
  check_table(w1, {S, H}, user, "w1", "[S, H]");
  check_table(b1, {S}, user, "b1", "[S]");
  check_table(w2, {H, S}, user, "w2", "[H, S]");
  check_table(b2, {H}, user, "b2", "[H]");
  check_value(!graph || !w1, "graph: expected false with SENet");
  check_mlp(call.mlp, mlp, user, D, clients.size(0), dropout);
  check_value(mlp.empty() || !w1, "mlp: expected none with SENet, got ", mlp.size(), " tensors");
  check_value(mlp.empty() || !graph, "graph: expected false with an MLP");
  check_value(epochs >= 0 && epochs < 1 << 16, "epochs: expected 0 to ", (1 << 16) - 1, ", got ",
              epochs);
  check_value(batch_size >= 0, "batch_size: expected at least 0 (0: all positives), got ",
              batch_size);
  check_value(round >= 0 && round < int64_t{1} << 32, "round: expected 0 to 2^32 - 1, got ", round);

  call.clients = dense(clients);
  call.indptr = dense(indptr);
  call.items = dense(items);
  call.positives = dense(positives);
  call.user = dense(user);
  call.base = dense(base);
  call.table = dense(table);
  call.A = dense(A);
  call.B = dense(B);
  call.codes = dense(codes);
  call.codebooks = dense(codebooks);
  call.buckets = dense(buckets);
  call.hashes = dense(hashes);
  call.w1 = dense(w1);
  call.b1 = dense(b1);
  call.w2 = dense(w2);
  call.b2 = dense(b2);
  call.dtype = dtype;
  LocalTrainArgs& a = call.args;
  a.clients = indices_of(call.clients, "clients");
  a.indptr = indices_of(call.indptr, "indptr");
  a.items = indices_of(call.items, "items");
  a.positives = indices_of(call.positives, "positives");
  a.users = indptr.size(0) - 1;
  a.nnz = items.size(0);
  a.num_items = I;
  a.D = D;
  a.user = call.user.const_data_ptr();
  a.base = data_of(call.base);
  a.table = data_of(call.table);
  a.A = data_of(call.A);
  a.B = data_of(call.B);
  a.rank = A ? A->size(1) : 0;
  if (call.codes) a.codes = codes_of(*call.codes, "codes");
  a.codebooks = data_of(call.codebooks);
  a.L = codebooks ? codebooks->size(0) : 0;
  a.K = codebooks ? codebooks->size(1) : 0;
  a.buckets = data_of(call.buckets);
  a.hashes = static_cast<const int64_t*>(data_of(call.hashes));
  a.w1 = data_of(call.w1);
  a.b1 = data_of(call.b1);
  a.w2 = data_of(call.w2);
  a.b2 = data_of(call.b2);
  a.M = buckets ? buckets->size(0) : 0;
  a.H = H;
  a.S = S;
  a.mean = mean;
  a.graph = graph;
  a.user_width = user.size(1);
  a.layers = int64_t(call.mlp.widths.size());
  a.widths = call.mlp.widths.data();
  a.mlp = call.mlp.data.data();
  a.own_mlp = call.mlp.own;
  a.drop = dropout > 0;
  a.drop_threshold = uint32_t(std::floor(std::ldexp(dropout, 32)));
  a.drop_scale = 1 / (1 - dropout);
  a.epochs = epochs;
  a.batch = batch_size;
  a.bpr = bpr;
  a.adam = adam;
  a.lr = lr;
  a.beta1 = beta1;
  a.beta2 = beta2;
  a.eps = eps;
  a.l2_user = l2_user;
  a.l2_items = l2_items;
  a.prox = prox;
  a.seed = uint64_t(seed);
  a.round = uint32_t(round);
  a.bad_item = &call.bad_item;
  a.bad_order = &call.bad_order;
  a.no_negative = &call.no_negative;
  a.bad_code = &call.bad_code;
  run_on(
      user, [&](auto) { call.sizes = sizes_on_cpu(a, clients.size(0)); },
      [&](auto stream) {
        int64_t in = D;
        for (const int64_t out : call.mlp.widths) {
          check_value(out <= int64_t{1} << 23 && in <= int64_t{1} << 23 &&
                          out * (in + a.user_width) <= int64_t{1} << 30,
                      "mlp: expected layers of at most 2^23 units and 2^30 weights on a GPU, got ",
                      out, " of ", in);
          in = out;
        }
        call.sizes = sizes_on_gpu(a, clients.size(0), user, stream);
      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor, std::vector<Tensor>>
local_train(const Tensor& clients, const Tensor& indptr, const Tensor& items,
            const Tensor& positives, int64_t num_items, const Tensor& user, const Optional& base,
            const Optional& table, const Optional& A, const Optional& B, const Optional& codes,
            const Optional& codebooks, const Optional& buckets, const Optional& hashes,
            const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
            std::vector<Tensor> mlp, double dropout, bool mean, bool graph, int64_t epochs,
            int64_t batch_size, bool bpr, bool adam, double lr, double beta1, double beta2,
            double eps, double l2_user, double l2_items, double prox, int64_t seed, int64_t round) {
  Call call;
  prepare(call, clients, indptr, items, positives, num_items, user, base, table, A, B, codes,
          codebooks, buckets, hashes, w1, b1, w2, b2, mlp, dropout, mean, graph, epochs, batch_size,
          bpr, adam, lr, beta1, beta2, eps, l2_user, l2_items, prox, seed, round);
  LocalTrainArgs& a = call.args;
  const int64_t C = clients.size(0), D = a.D, S = a.S, H = a.H;
  if (table || A) {
    for (const int64_t size : call.sizes)
      a.R = std::max(a.R, std::min(num_items, size * (1 + epochs)));
  }
  const auto result = [&](bool there, std::vector<int64_t> shape) {
    if (!there) return allocate(user, {0});
    shape.insert(shape.begin(), C);
    return allocate(user, shape);
  };
  Tensor new_user = result(true, {a.user_width});
  Tensor losses = allocate(user, {C}, ScalarType::Double);
  Tensor rows = allocate(user, {C, a.R}, ScalarType::Long);
  Tensor d_table = result(table.has_value(), {a.R, D}), d_A = result(A.has_value(), {a.R, a.rank}),
         d_B = result(B.has_value(), {D, a.rank}),
         d_codebooks = result(codebooks.has_value(), {a.L, a.K, D}),
         d_buckets = result(buckets.has_value(), {a.M, D}), d_w1 = result(w1.has_value(), {S, H}),
         d_b1 = result(w1.has_value(), {S}), d_w2 = result(w1.has_value(), {H, S}),
         d_b2 = result(w1.has_value(), {H});
  std::vector<Tensor> d_mlp = call.mlp_updates();
  a.new_user = new_user.mutable_data_ptr();
  a.losses = static_cast<double*>(losses.mutable_data_ptr());
  a.rows = static_cast<int64_t*>(rows.mutable_data_ptr());
  a.d_table = d_table.mutable_data_ptr();
  a.d_A = d_A.mutable_data_ptr();
  a.d_B = d_B.mutable_data_ptr();
  a.d_codebooks = d_codebooks.mutable_data_ptr();
  a.d_buckets = d_buckets.mutable_data_ptr();
  a.d_w1 = d_w1.mutable_data_ptr();
  a.d_b1 = d_b1.mutable_data_ptr();
  a.d_w2 = d_w2.mutable_data_ptr();
  a.d_b2 = d_b2.mutable_data_ptr();
  run_on(
      user,
      [&](auto) {
        const auto train = local_train_kernels_for(call.args).train[int(call.dtype)];
        train_on_cpu(a, call.sizes, largest_first(call.sizes), threads_for(C), call.dtype, user,
                     [&](int64_t, int64_t c, const void* drawn, const void* ahead, void* scratch) {
                       train(a, c, drawn, ahead, scratch, nullptr, 0.0);
                     });
        raise_errors(a);
      },
      [&](auto stream) { train_on_gpu(a, call.sizes, call.dtype, user, stream); });
  return {new_user,  losses, rows, d_table, d_A,  d_B,  d_codebooks,
          d_buckets, d_w1,   d_b1, d_w2,    d_b2, d_mlp};
}

#if !defined(FEDPEFT_EMULATOR)  // on the CPU alone

// A sum over clients: float64 in the shape of the parameter, written in place.
double* sum_of(const Optional& total, const Optional& parameter, const char* name, const char* of) {
  check_value(total.has_value() == parameter.has_value(), name, ": expected one where there is ",
              of, ", and only there");
  if (!total) return nullptr;
  check_same_shape(*total, *parameter, name, of);
  check_float64(*total, name);
  check_same_device(*total, *parameter, name, of);
  check_value(total->is_contiguous(), name, ": expected a contiguous tensor");
  return static_cast<double*>(Tensor(*total).mutable_data_ptr());
}

// Sums over clients that several threads add to, in any order, since they are exact. A thread has
// its own copy of a small one, of which its clients fill a good part; one of many rows is shared,
// behind locks.
class SharedSums {
 public:
  struct Part {
    double* total;
    int64_t rows, width, reads;  // rows that one draw touches
  };

  // `parts`: first those of BrokenPart, then the tensors of an MLP.
  SharedSums(const std::vector<Part>& parts, const LocalSums& alone, int64_t draws, int64_t threads)
      : parts_(parts), threads_(size_t(threads), alone), at_(parts.size(), -1) {
    mlp_.resize(threads_.size());
    for (size_t t = 0; t < threads_.size(); ++t) {
      for (size_t part = kParts; part < parts.size(); ++part) mlp_[t].push_back(parts[part].total);
      threads_[t].mlp = mlp_[t].data();
    }
    if (threads == 1) return;
    for (size_t part = 0; part < parts.size(); ++part) {
      const auto [total, rows, width, reads] = parts[part];
      if (!total) continue;
      const bool own = rows * width * int64_t(sizeof(double)) <= kOwnBytes &&
                       2 * rows * threads <= draws * reads;
      if (own || reads == 0) {
        at_[part] = room_;
        room_ += (rows * width + kLine - 1) / kLine * kLine;
      } else {
        locks_[part].resize(size_t(kTotalLocks));
        for (LocalSums& sums : threads_) sums.locks[part] = locks_[part].data();
      }
    }
    own_.resize(size_t(threads));
  }

  // Of a thread, which makes its copies itself, at its first client.
  LocalSums& of(int64_t thread) {
    LocalSums& sums = threads_[size_t(thread)];
    if (own_.empty() || !own_[size_t(thread)].empty()) return sums;
    std::vector<double>& own = own_[size_t(thread)];
    own.resize(size_t(room_ + kLine));
    for (size_t part = 0; part < at_.size(); ++part) {
      if (at_[part] < 0) continue;
      double*& total = part < kParts ? sums.totals[part] : mlp_[size_t(thread)][part - kParts];
      total = own.data() + at_[part];
    }
    return sums;
  }

  // Brings the threads' own copies together, and returns which parts were broken.
  uint32_t gather() {
    uint32_t broken = 0;
    for (const LocalSums& sums : threads_) broken |= sums.broken;
    const int64_t tasks = int64_t(own_.size());
    parallel_tasks(tasks, [&](int64_t task) {
      for (size_t part = 0; part < at_.size(); ++part) {
        const int64_t at = at_[part];
        if (at < 0) continue;
        const auto [total, rows, width, reads] = parts_[part];
        const int64_t begin = rows * width * task / tasks, end = rows * width * (task + 1) / tasks;
        for (const std::vector<double>& own : own_) {
          if (own.empty()) continue;
          const double* const mine = own.data() + at;
          for (int64_t i = begin; i < end; ++i) total[i] += mine[i];
        }
      }
    });
    return broken;
  }

 private:
  static constexpr int64_t kOwnBytes = 1 << 20;
  static constexpr int64_t kLine = 8;  // doubles of a cache line

  std::vector<Part> parts_;
  std::vector<LocalSums> threads_;
  std::vector<std::vector<double*>> mlp_;  // LocalSums::mlp of the threads
  std::vector<int64_t> at_;
  std::array<std::vector<uint8_t>, kParts> locks_;
  std::vector<std::vector<double>> own_;
  int64_t room_ = 0;  // doubles of the copies
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> local_train_sum_(
    const Tensor& clients, const Tensor& weights, const Tensor& indptr, const Tensor& items,
    const Tensor& positives, int64_t num_items, const Tensor& user, const Optional& base,
    const Optional& table, const Optional& A, const Optional& B, const Optional& codes,
    const Optional& codebooks, const Optional& buckets, const Optional& hashes, const Optional& w1,
    const Optional& b1, const Optional& w2, const Optional& b2, std::vector<Tensor> mlp,
    double dropout, const Optional& sum_table, const Optional& sum_A, const Optional& sum_B,
    const Optional& sum_codebooks, const Optional& sum_buckets, const Optional& sum_w1,
    const Optional& sum_b1, const Optional& sum_w2, const Optional& sum_b2,
    std::vector<Tensor> sum_mlp, const Optional& touched, bool mean, bool graph, int64_t epochs,
    int64_t batch_size, bool bpr, bool adam, double lr, double beta1, double beta2, double eps,
    double l2_user, double l2_items, double prox, int64_t seed, int64_t round, double grid) {
  Call call;
  prepare(call, clients, indptr, items, positives, num_items, user, base, table, A, B, codes,
          codebooks, buckets, hashes, w1, b1, w2, b2, mlp, dropout, mean, graph, epochs, batch_size,
          bpr, adam, lr, beta1, beta2, eps, l2_user, l2_items, prox, seed, round);
  LocalTrainArgs& a = call.args;
  const int64_t C = clients.size(0);
  check_weights(weights, C, user, "user");
  const Tensor weights_ = dense(weights);
  const double* const weight_of = static_cast<const double*>(weights_.const_data_ptr());
  std::vector<SharedSums::Part> parts = {
      {sum_of(sum_table, table, "sum_table", "table"), num_items, a.D, 1},
      {sum_of(sum_A, A, "sum_A", "A"), num_items, a.rank, 1},
      {sum_of(sum_B, B, "sum_B", "B"), a.D, a.rank, 0},
      {sum_of(sum_codebooks, codebooks, "sum_codebooks", "codebooks"), a.L * a.K, a.D, a.L},
      {sum_of(sum_buckets, buckets, "sum_buckets", "buckets"), a.M, a.D, a.H},
      {sum_of(sum_w1, w1, "sum_w1", "w1"), a.S, a.H, 0},
      {sum_of(sum_b1, b1, "sum_b1", "b1"), 1, a.S, 0},
      {sum_of(sum_w2, w2, "sum_w2", "w2"), a.H, a.S, 0},
      {sum_of(sum_b2, b2, "sum_b2", "b2"), 1, a.H, 0},
  };
  check_value(sum_mlp.size() == (call.mlp.own ? 0 : mlp.size()), "sum_mlp: expected ",
              call.mlp.own ? 0 : mlp.size(), " tensors, as what is added up of mlp, got ",
              sum_mlp.size());
  for (size_t t = 0; t < sum_mlp.size(); ++t)
    parts.push_back({sum_of(sum_mlp[t], mlp[t], "sum_mlp", "mlp"), 1, mlp[t].numel(), 0});
  LocalSums sums{};
  for (size_t part = 0; part < kParts; ++part) sums.totals[part] = parts[part].total;
  uint8_t* marks = nullptr;
  if (touched) {
    check_value(table || A, "touched: expected together with table or A, got only touched");
    check_dim(*touched, 1, "touched", "[I]");
    check_size(*touched, 0, num_items, "touched", "I, the number of items");
    check_type(touched->scalar_type() == ScalarType::Byte, "touched: expected uint8, got ",
               torch::headeronly::toString(touched->scalar_type()));
    check_same_device(*touched, user, "touched", "user");
    check_value(touched->is_contiguous(), "touched: expected a contiguous tensor");
    marks = static_cast<uint8_t*>(Tensor(*touched).mutable_data_ptr());
  }
  sums.shift = shift_of(grid);
  Tensor new_user = allocate(user, {C, a.user_width});
  a.new_user = new_user.mutable_data_ptr();
  Tensor own_mlps = call.own_mlps();
  Tensor losses = allocate(user, {C}, ScalarType::Double);
  a.losses = static_cast<double*>(losses.mutable_data_ptr());

  // Sums that are rounded have an order, that of the clients, and so one thread.
  const int64_t threads = grid > 0 ? threads_for(C) : std::min<int64_t>(C, 1);
  std::vector<int64_t> order;
  if (grid > 0) {
    order = largest_first(call.sizes);
  } else {
    order.resize(size_t(C));
    std::iota(order.begin(), order.end(), int64_t{0});
  }
  int64_t draws = 0;
  for (const int64_t n : call.sizes) draws += n * (1 + epochs);
  SharedSums shared(parts, sums, draws, threads);
  // Rows that a thread added to, with bits of its own: threads that marked rows together would wait
  // for each other's cache lines.
  struct alignas(64) Seen {
    std::vector<uint64_t> bits;
    std::vector<int64_t> rows;  // the first `count` are filled
    int64_t count = 0;
  };
  std::vector<Seen> seen(static_cast<size_t>(threads));
  const auto train = local_train_kernels_for(a).train[int(call.dtype)];
  train_on_cpu(a, call.sizes, order, threads, call.dtype, user,
               [&](int64_t t, int64_t c, const void* drawn, const void* ahead, void* scratch) {
                 LocalSums& mine = shared.of(t);
                 Seen& by = seen[size_t(t)];
                 if (marks) {
                   const int64_t most = std::min(num_items, call.sizes[size_t(c)] * (1 + epochs));
                   if (int64_t(by.rows.size()) < by.count + most)
                     by.rows.resize(size_t(2 * by.count + most));
                   by.bits.resize(size_t(num_items / 64 + 1));
                   mine.fresh = by.rows.data() + by.count;
                   mine.seen = by.bits.data();
                 }
                 train(a, c, drawn, ahead, scratch, &mine, weight_of[c]);
                 if (marks) by.count = mine.fresh - by.rows.data();
               });
  const uint32_t any = shared.gather();
  raise_errors(a);

  int64_t marked = 0;
  for (Seen& by : seen) {
    int64_t* fresh = by.rows.data();
    for (int64_t i = 0; i < by.count; ++i) {
      uint8_t& mark = marks[by.rows[size_t(i)]];
      *fresh = by.rows[size_t(i)];
      fresh += mark == 0;
      mark = 1;
    }
    marked += by.count = fresh - by.rows.data();
  }
  Tensor rows = allocate(user, {marked}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const Seen& by : seen) out = std::copy_n(by.rows.begin(), by.count, out);
  Tensor bad = allocate(user, {broken_mlp + 1}, ScalarType::Bool);
  for (int part = 0; part <= int(broken_mlp); ++part)
    static_cast<bool*>(bad.mutable_data_ptr())[part] = any >> part & 1;
  return {new_user, losses, rows, bad, own_mlps};
}

#endif

}  // namespace

FEDPEFT_IMPL(m) { m.impl("local_train", TORCH_BOX(&local_train)); }

#if !defined(FEDPEFT_EMULATOR)
STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CPU, m) {
  m.impl("local_train_sum_", TORCH_BOX(&local_train_sum_));
}
#endif

}  // namespace fedpeft
