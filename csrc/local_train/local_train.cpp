// Binding of local_train: checks, allocation, dispatch.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "local_train/local_train_cpu.h"

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

const void* data_of(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// Trains clients [0, C), the largest first, each as one task taken by whichever thread is free.
[[maybe_unused]] void train_on_cpu(const LocalTrainArgs& a, int64_t C, int dtype,
                                   const Tensor& like) {
  const LocalTrainKernels& kernels = select_local_train_kernels();
  std::vector<int64_t> sizes(static_cast<size_t>(C)), order(static_cast<size_t>(C));
  for (int64_t c = 0; c < C; ++c) {
    const int64_t client = a.clients[c];
    sizes[size_t(c)] = a.indptr[client + 1] - a.indptr[client];
  }
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return sizes[size_t(x)] > sizes[size_t(y)]; });
  int64_t bytes = 0;  // not always the most for the most items: the maps of rows change their kind
  for (int64_t i = 0; i < C; ++i) {
    if (i == 0 || sizes[size_t(order[size_t(i)])] != sizes[size_t(order[size_t(i - 1)])])
      bytes = std::max(bytes, kernels.scratch[dtype](a, sizes[size_t(order[size_t(i)])]));
  }
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), C);
  Tensor scratch = torch::stable::new_empty(like, {threads, bytes}, ScalarType::Byte);
  char* memory = static_cast<char*>(scratch.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t i = next++; i < C; i = next++)
        kernels.train[dtype](a, order[size_t(i)], memory + t * bytes);
    }
  };
  if (threads <= 1) {
    work(0, threads);
  } else {
    torch::stable::parallel_for(0, threads, 1, work);
  }
}

void check_ranges(const LocalTrainArgs& a, int64_t C) {
  for (int64_t c = 0; c < C; ++c) {
    const int64_t client = a.clients[c];
    const int64_t first = a.indptr[client], last = a.indptr[client + 1];
    check_value(0 <= first && first <= last && last <= a.nnz,
                "indptr: expected ascending offsets of 0 to ", a.nnz, ", got ", first, " and ",
                last, " for client ", client);
    check_value(last - first < int64_t{1} << 28,
                "indptr: expected fewer than 2^28 items a client, got ", last - first,
                " for client ", client);
  }
}

[[maybe_unused]] void raise_errors(const LocalTrainArgs& a) {
  if (a.bad_item->any()) {
    const int64_t at = a.bad_item->position;
    throw std::out_of_range(text("items: item ", a.items[at], " at position ", at,
                                 " is out of range: expected 0 to ", a.num_items - 1));
  }
  check_value(!a.bad_order->any(),
              "positives: expected each client's items, distinct and ascending, got ",
              a.bad_order->any() ? a.positives[a.bad_order->position] : 0, " at position ",
              a.bad_order->position);
  check_value(!a.no_negative->any(), "clients: client ", a.no_negative->position, " has met all ",
              a.num_items, " items: there is no negative to draw");
  raise_bad_code(*a.bad_code, a.codes, a.L, a.K);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
           Tensor>
local_train(const Tensor& clients, const Tensor& indptr, const Tensor& items,
            const Tensor& positives, int64_t num_items, const Tensor& user, const Optional& base,
            const Optional& table, const Optional& A, const Optional& B, const Optional& codes,
            const Optional& codebooks, const Optional& buckets, const Optional& hashes,
            const Optional& w1, const Optional& b1, const Optional& w2, const Optional& b2,
            bool mean, int64_t epochs, int64_t batch_size, bool bpr, bool adam, double lr,
            double beta1, double beta2, double eps, double l2_user, double l2_items, double prox,
            int64_t seed, int64_t round) {
  check_dim(clients, 1, "clients", "[C]");
  check_dim(indptr, 1, "indptr", "[U + 1]");
  check_value(indptr.size(0) >= 1, "indptr: expected shape [U + 1], got ", shape_text(indptr));
  check_dim(items, 1, "items", "[nnz]");
  check_dim(positives, 1, "positives", "[nnz]");
  check_size(positives, 0, items.size(0), "positives", "nnz, as items");
  check_dim(user, 2, "user", "[U, D]");
  check_size(user, 0, indptr.size(0) - 1, "user", "U, the users of indptr");
  check_value(num_items >= 0 && num_items < int64_t{1} << 62, "num_items: expected 0 to 2^62, got ",
              num_items);
  const int64_t D = user.size(1), I = num_items;
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
  check_value(epochs >= 0 && epochs < 1 << 16, "epochs: expected 0 to ", (1 << 16) - 1, ", got ",
              epochs);
  check_value(batch_size >= 0, "batch_size: expected at least 0 (0: all positives), got ",
              batch_size);
  check_value(round >= 0 && round < int64_t{1} << 32, "round: expected 0 to 2^32 - 1, got ", round);

  const Tensor clients_ = dense(clients), indptr_ = dense(indptr), items_ = dense(items),
               positives_ = dense(positives), user_ = dense(user);
  const Optional base_ = dense(base), table_ = dense(table), A_ = dense(A), B_ = dense(B),
                 codes_ = dense(codes), codebooks_ = dense(codebooks), buckets_ = dense(buckets),
                 hashes_ = dense(hashes), w1_ = dense(w1), b1_ = dense(b1), w2_ = dense(w2),
                 b2_ = dense(b2);
  FirstError bad_item, bad_order, no_negative, bad_code;
  LocalTrainArgs a{};
  a.clients = indices_of(clients_, "clients");
  a.indptr = indices_of(indptr_, "indptr");
  a.items = indices_of(items_, "items");
  a.positives = indices_of(positives_, "positives");
  a.users = indptr.size(0) - 1;
  a.nnz = items.size(0);
  a.num_items = I;
  a.D = D;
  a.user = user_.const_data_ptr();
  a.base = data_of(base_);
  a.table = data_of(table_);
  a.A = data_of(A_);
  a.B = data_of(B_);
  a.rank = A ? A->size(1) : 0;
  if (codes_) a.codes = codes_of(*codes_, "codes");
  a.codebooks = data_of(codebooks_);
  a.L = codebooks ? codebooks->size(0) : 0;
  a.K = codebooks ? codebooks->size(1) : 0;
  a.buckets = data_of(buckets_);
  a.hashes = static_cast<const int64_t*>(data_of(hashes_));
  a.w1 = data_of(w1_);
  a.b1 = data_of(b1_);
  a.w2 = data_of(w2_);
  a.b2 = data_of(b2_);
  a.M = buckets ? buckets->size(0) : 0;
  a.H = H;
  a.S = S;
  a.mean = mean;
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
  a.bad_item = &bad_item;
  a.bad_order = &bad_order;
  a.no_negative = &no_negative;
  a.bad_code = &bad_code;

  const int64_t C = clients.size(0);
  const bool by_row = table || A;
  if (host_readable(clients)) {
    check_clients(a.clients, C, a.users);
    check_ranges(a, C);
    if (by_row) {
      for (int64_t c = 0; c < C; ++c) {
        const int64_t client = a.clients[c];
        a.R = std::max(a.R, std::min(I, (a.indptr[client + 1] - a.indptr[client]) * (1 + epochs)));
      }
    }
  }
  const auto result = [&](bool there, std::vector<int64_t> shape) {
    if (!there) return torch::stable::new_empty(user, {0});
    shape.insert(shape.begin(), C);
    return torch::stable::new_empty(user, shape);
  };
  Tensor new_user = result(true, {D});
  Tensor losses = torch::stable::new_empty(user, {C}, ScalarType::Double);
  Tensor rows = torch::stable::new_empty(user, {C, a.R}, ScalarType::Long);
  Tensor d_table = result(table.has_value(), {a.R, D}), d_A = result(A.has_value(), {a.R, a.rank}),
         d_B = result(B.has_value(), {D, a.rank}),
         d_codebooks = result(codebooks.has_value(), {a.L, a.K, D}),
         d_buckets = result(buckets.has_value(), {a.M, D}), d_w1 = result(w1.has_value(), {S, H}),
         d_b1 = result(w1.has_value(), {S}), d_w2 = result(w1.has_value(), {H, S}),
         d_b2 = result(w1.has_value(), {H});
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
  train_on_cpu(a, C, int(dtype), user);
  raise_errors(a);
  return {new_user,    losses,    rows, d_table, d_A,  d_B,
          d_codebooks, d_buckets, d_w1, d_b1,    d_w2, d_b2};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CPU, m) {
  m.impl("local_train", TORCH_BOX(&local_train));
}

}  // namespace fedpeft
