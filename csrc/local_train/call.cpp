// Checks of a call of local_train and its kin.
#include "local_train/call.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "local_train/local_train_cuda.h"

namespace fedpeft {

std::vector<int64_t> largest_first(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> order(sizes.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t x, int64_t y) {
    const int64_t of_x = sizes[size_t(x)], of_y = sizes[size_t(y)];
    return of_x != of_y ? of_x > of_y : x < y;
  });
  return order;
}

namespace {

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

// Null where there is no such part; one without elements is there, though torch has no address for
// it.
const void* data_of(const Optional& t) {
  static constexpr char nothing = 0;
  if (!t) return nullptr;
  const void* data = t->const_data_ptr();
  return data ? data : &nothing;
}

int64_t items_of(const LocalTrainArgs& a, int64_t c) {
  const int64_t client = a.clients[c];
  return a.indptr[client + 1] - a.indptr[client];
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

}  // namespace

void prepare(Call& call, const Tensor& clients, const Training& training) {
  const auto& [indptr, items, positives, num_items, user_, base, table, A, B, codes, codebooks,
               buckets, hashes, w1, b1, w2, b2, mlp, dropout, mean, graph, epochs, batch_size, bpr,
               adam, lr, beta1, beta2, eps, l2_user, l2_items, prox, seed, round] = training;
  const Tensor& user = user_;  // lambdas of older compilers capture no binding
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
  if (A) check_rank(*A);
  check_table(B, {D, A ? A->size(1) : 0}, user, "B", "[D, r]");
  check_table(codebooks, {-1, -1, D}, user, "codebooks", "[L, K, D]");
  check_together(codebooks, codes, "codebooks", "codes");
  if (codes) {
    check_dim(*codes, 2, "codes", "[I, L]");
    check_size(*codes, 0, I, "codes", "I, the number of items");
    check_size(*codes, 1, codebooks->size(0), "codes", "L, the levels of codebooks");
    check_same_device(*codes, user, "codes", "user");
    check_rows(*codebooks, "codebooks");
  }
  check_table(buckets, {-1, D}, user, "buckets", "[M, D]");
  check_together(buckets, hashes, "buckets", "hashes");
  int64_t H = 0, S = 0;
  if (hashes) {
    check_hashes(*hashes);
    check_same_device(*hashes, user, "hashes", "user");
    check_rows(*buckets, "buckets");
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
  if (call.hashes) check_hash_values(*call.hashes);
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

}  // namespace fedpeft
