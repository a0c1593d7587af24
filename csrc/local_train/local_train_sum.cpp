// Binding of local_train_sum_ and train_round_, on the CPU alone: training into sums over clients,
// and what a server does before and after it.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <numeric>
#include <tuple>
#include <vector>

#include "aggregate/aggregate_cpu.h"
#include "local_train/call.h"
#include "sampling/sample_clients.h"

namespace fedpeft {
namespace {

// Trained parts, in the order of BrokenPart.
constexpr size_t kParts = broken_parts;

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

// Sums of the ops, in the order of BrokenPart, then of an MLP that all share.
struct Sums {
  const Optional &table, &A, &B, &codebooks, &buckets, &w1, &b1, &w2, &b2;
  const std::vector<Tensor>& mlp;
};

std::vector<SharedSums::Part> parts_of(const Call& call, const Training& t, const Sums& sums) {
  const LocalTrainArgs& a = call.args;
  std::vector<SharedSums::Part> parts = {
      {sum_of(sums.table, t.table, "sum_table", "table"), t.num_items, a.D, 1},
      {sum_of(sums.A, t.A, "sum_A", "A"), t.num_items, a.rank, 1},
      {sum_of(sums.B, t.B, "sum_B", "B"), a.D, a.rank, 0},
      {sum_of(sums.codebooks, t.codebooks, "sum_codebooks", "codebooks"), a.L * a.K, a.D, a.L},
      {sum_of(sums.buckets, t.buckets, "sum_buckets", "buckets"), a.M, a.D, a.H},
      {sum_of(sums.w1, t.w1, "sum_w1", "w1"), a.S, a.H, 0},
      {sum_of(sums.b1, t.b1, "sum_b1", "b1"), 1, a.S, 0},
      {sum_of(sums.w2, t.w2, "sum_w2", "w2"), a.H, a.S, 0},
      {sum_of(sums.b2, t.b2, "sum_b2", "b2"), 1, a.H, 0},
  };
  const size_t shared = call.mlp.own ? 0 : t.mlp.size();
  check_value(sums.mlp.size() == shared, "sum_mlp: expected ", shared,
              " tensors, as what is added up of mlp, got ", sums.mlp.size());
  for (size_t i = 0; i < shared; ++i)
    parts.push_back({sum_of(sums.mlp[i], t.mlp[i], "sum_mlp", "mlp"), 1, t.mlp[i].numel(), 0});
  return parts;
}

// Rows that a thread added to, with bits of its own: threads that marked rows together would wait
// for each other's cache lines.
struct alignas(64) Seen {
  std::vector<uint64_t> bits;
  std::vector<int64_t> rows;  // the first `count` are filled
  int64_t count = 0;

  // Keeps the rows that `take` takes.
  template <typename Take>
  void keep(const Take& take) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows[size_t(i)];
      rows[size_t(kept)] = row;
      kept += take(row);
    }
    count = kept;
  }
};

struct Added {
  uint32_t broken;         // bits of BrokenPart
  std::vector<Seen> seen;  // of each thread, where rows are asked for
};

// Trains the clients of the call, and adds their updates to the sums.
Added train_and_add(const Call& call, const std::vector<SharedSums::Part>& parts,
                    const double* weights, double grid, bool by_row) {
  const LocalTrainArgs& a = call.args;
  const int64_t C = int64_t(call.sizes.size());
  LocalSums sums{};
  for (size_t part = 0; part < kParts; ++part) sums.totals[part] = parts[part].total;
  sums.shift = shift_of(grid);
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
  for (const int64_t n : call.sizes) draws += n * (1 + a.epochs);
  SharedSums shared(parts, sums, draws, threads);
  std::vector<Seen> seen(static_cast<size_t>(threads));
  const auto train = local_train_kernels_for(a).train[int(call.dtype)];
  train_on_cpu(a, call.sizes, order, threads, call.dtype, call.user,
               [&](int64_t t, int64_t c, const void* drawn, const void* ahead, void* scratch) {
                 LocalSums& mine = shared.of(t);
                 Seen& by = seen[size_t(t)];
                 if (by_row) {
                   const int64_t most =
                       std::min(a.num_items, call.sizes[size_t(c)] * (1 + a.epochs));
                   if (int64_t(by.rows.size()) < by.count + most)
                     by.rows.resize(size_t(2 * by.count + most));
                   by.bits.resize(size_t(a.num_items / 64 + 1));
                   mine.fresh = by.rows.data() + by.count;
                   mine.seen = by.bits.data();
                 }
                 train(a, c, drawn, ahead, scratch, &mine, weights[c]);
                 if (by_row) by.count = mine.fresh - by.rows.data();
               });
  const uint32_t broken = shared.gather();
  raise_errors(a);
  return {broken, std::move(seen)};
}

Tensor broken_flags(uint32_t broken, const Tensor& like) {
  Tensor flags = allocate(like, {broken_mlp + 1}, ScalarType::Bool);
  for (int part = 0; part <= int(broken_mlp); ++part)
    static_cast<bool*>(flags.mutable_data_ptr())[part] = broken >> part & 1;
  return flags;
}

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
  const Training training = {indptr, items,      positives, num_items, user,    base,   table,
                             A,      B,          codes,     codebooks, buckets, hashes, w1,
                             b1,     w2,         b2,        mlp,       dropout, mean,   graph,
                             epochs, batch_size, bpr,       adam,      lr,      beta1,  beta2,
                             eps,    l2_user,    l2_items,  prox,      seed,    round};
  Call call;
  prepare(call, clients, training);
  LocalTrainArgs& a = call.args;
  const int64_t C = clients.size(0);
  check_weights(weights, C, user, "user");
  const Tensor weights_ = dense(weights);
  const std::vector<SharedSums::Part> parts =
      parts_of(call, training,
               {sum_table, sum_A, sum_B, sum_codebooks, sum_buckets, sum_w1, sum_b1, sum_w2, sum_b2,
                sum_mlp});
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
  Tensor new_user = allocate(user, {C, a.user_width});
  a.new_user = new_user.mutable_data_ptr();
  Tensor own_mlps = call.own_mlps();
  Tensor losses = allocate(user, {C}, ScalarType::Double);
  a.losses = static_cast<double*>(losses.mutable_data_ptr());

  Added added = train_and_add(call, parts, static_cast<const double*>(weights_.const_data_ptr()),
                              grid, marks != nullptr);

  int64_t marked = 0;
  for (Seen& by : added.seen) {
    by.keep([&](int64_t row) {
      const bool fresh = marks[row] == 0;
      marks[row] = 1;
      return fresh;
    });
    marked += by.count;
  }
  Tensor rows = allocate(user, {marked}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(rows.mutable_data_ptr());
  for (const Seen& by : added.seen) out = std::copy_n(by.rows.begin(), by.count, out);
  return {new_user, losses, rows, broken_flags(added.broken, user), own_mlps};
}

// The power of two on which float64 sums of updates are exact, whose weights sum to `weight`: as
// ops.exact_grid.
double exact_grid(double weight) {
  constexpr double kLargestMean = 16;
  return weight > 0 ? std::ldexp(1.0, int(std::ceil(std::log2(weight * kLargestMean))) - 52) : 0;
}

// `count` of the clients, drawn as by sample_clients, ascending by (items, id).
Tensor choose_clients(const Tensor& clients, int64_t count, int64_t attempt, const Training& t) {
  check_dim(clients, 1, "clients", "[n]");
  check_dim(t.indptr, 1, "indptr", "[U + 1]");
  check_same_device(clients, t.indptr, "clients", "indptr");
  Tensor chosen = sample_clients_on_cpu(clients, count, t.seed, t.round, attempt);
  int64_t* const ids = static_cast<int64_t*>(chosen.mutable_data_ptr());
  const Tensor indptr_ = dense(t.indptr);
  const IndexArray indptr = indices_of(indptr_, "indptr");
  const int64_t users = t.indptr.size(0) - 1;
  for (int64_t c = 0; c < count; ++c) {
    if (ids[c] >= users)
      throw std::out_of_range(
          text("clients: id ", ids[c], " is out of range: expected 0 to ", users - 1));
  }
  std::vector<std::pair<int64_t, int64_t>> sized;
  sized.reserve(size_t(count));
  for (int64_t c = 0; c < count; ++c)
    sized.emplace_back(indptr[ids[c] + 1] - indptr[ids[c]], ids[c]);
  std::sort(sized.begin(), sized.end());
  for (int64_t c = 0; c < count; ++c) ids[c] = sized[size_t(c)].second;
  return chosen;
}

// A parameter that the round changes; null where there is none.
void* written(const Optional& parameter, const char* name) {
  if (!parameter) return nullptr;
  check_value(parameter->is_contiguous(), name, ": expected a contiguous tensor");
  return Tensor(*parameter).mutable_data_ptr();
}

// The server's step along rows of a sum, which becomes zero: all rows, or those that were added to
// where they are so few that this is faster. A row of several threads is zero after the first.
void step(const SharedSums::Part& part, void* parameter, double scale, DType dtype,
          const std::vector<Seen>* rows) {
  constexpr int64_t kRowCost = 3;  // of a row that was picked out, in rows of a whole table
  ApplyArgs a{};
  a.parameter = parameter;
  a.total = part.total;
  a.num_rows = part.rows;
  a.width = part.width;
  a.scale = scale;
  const auto apply = [&](int64_t n) {
    const auto kernel = select_aggregate_kernels().apply[int(dtype)];
    parallel_ranges(n, 2 * a.width, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  };
  int64_t count = 0;
  if (rows) {
    for (const Seen& by : *rows) count += by.count;
  }
  if (!rows || kRowCost * count >= part.rows) {
    apply(part.rows);
    return;
  }
  for (const Seen& by : *rows) {
    a.rows = {by.rows.data(), 8};
    apply(by.count);
  }
}

std::tuple<Tensor, Tensor, Tensor> train_round_(
    const Tensor& clients, int64_t count, bool by_items, double server_lr, const Tensor& indptr,
    const Tensor& items, const Tensor& positives, int64_t num_items, Tensor user,
    const Optional& base, const Optional& table, const Optional& A, const Optional& B,
    const Optional& codes, const Optional& codebooks, const Optional& buckets,
    const Optional& hashes, const Optional& w1, const Optional& b1, const Optional& w2,
    const Optional& b2, std::vector<Tensor> mlp, double dropout, const Optional& sum_table,
    const Optional& sum_A, const Optional& sum_B, const Optional& sum_codebooks,
    const Optional& sum_buckets, const Optional& sum_w1, const Optional& sum_b1,
    const Optional& sum_w2, const Optional& sum_b2, std::vector<Tensor> sum_mlp, bool mean,
    bool graph, int64_t epochs, int64_t batch_size, bool bpr, bool adam, double lr, double beta1,
    double beta2, double eps, double l2_user, double l2_items, double prox, int64_t seed,
    int64_t round, int64_t attempt) {
  const Training training = {indptr, items,      positives, num_items, user,    base,   table,
                             A,      B,          codes,     codebooks, buckets, hashes, w1,
                             b1,     w2,         b2,        mlp,       dropout, mean,   graph,
                             epochs, batch_size, bpr,       adam,      lr,      beta1,  beta2,
                             eps,    l2_user,    l2_items,  prox,      seed,    round};
  check_value(server_lr >= 0, "server_lr: expected at least 0, got ", server_lr);
  const Tensor chosen = choose_clients(clients, count, attempt, training);
  Call call;
  prepare(call, chosen, training);
  check_value(!call.mlp.own, "mlp: expected one that all clients share, got one a client");
  LocalTrainArgs& a = call.args;
  const std::vector<SharedSums::Part> parts =
      parts_of(call, training,
               {sum_table, sum_A, sum_B, sum_codebooks, sum_buckets, sum_w1, sum_b1, sum_w2, sum_b2,
                sum_mlp});
  std::vector<void*> parameters = {written(table, "table"),
                                   written(A, "A"),
                                   written(B, "B"),
                                   written(codebooks, "codebooks"),
                                   written(buckets, "buckets"),
                                   written(w1, "w1"),
                                   written(b1, "b1"),
                                   written(w2, "w2"),
                                   written(b2, "b2")};
  for (const Tensor& t : mlp) parameters.push_back(written(t, "mlp"));
  char* const users = static_cast<char*>(written(user, "user"));

  Tensor new_user = allocate(user, {count, a.user_width});
  a.new_user = new_user.mutable_data_ptr();
  call.own_mlps();
  Tensor losses = allocate(user, {count}, ScalarType::Double);
  a.losses = static_cast<double*>(losses.mutable_data_ptr());
  std::vector<double> weights(call.sizes.begin(), call.sizes.end());
  if (!by_items) weights.assign(weights.size(), 1.0);
  const double weight = std::accumulate(weights.begin(), weights.end(), 0.0);

  const auto forget = [&] {
    for (const auto& [total, rows, width, reads] : parts) {
      if (total) std::fill_n(total, rows * width, 0.0);
    }
  };
  Added added;
  try {
    added = train_and_add(call, parts, weights.data(), exact_grid(weight), table || A);
  } catch (...) {
    forget();
    throw;
  }
  const bool good = added.broken == 0 && std::all_of(a.losses, a.losses + count, [](double loss) {
                      return std::isfinite(loss);
                    });
  if (!good || weight == 0) forget();
  if (good && weight > 0) {
    for (size_t part = 0; part < parts.size(); ++part) {
      if (!parts[part].total) continue;
      const bool by_row = part == broken_table || part == broken_A;
      step(parts[part], parameters[part], server_lr / weight, call.dtype,
           by_row ? &added.seen : nullptr);
    }
  }
  if (good) {
    const int64_t bytes = a.user_width * element_size(call.dtype);
    const char* const from = static_cast<const char*>(a.new_user);
    for (int64_t c = 0; bytes > 0 && c < count; ++c)
      std::memcpy(users + a.clients[c] * bytes, from + c * bytes, size_t(bytes));
  }
  return {chosen, losses, broken_flags(added.broken, user)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(FEDPEFT_LIBRARY, CPU, m) {
  m.impl("local_train_sum_", TORCH_BOX(&local_train_sum_));
  m.impl("train_round_", TORCH_BOX(&train_round_));
}

}  // namespace fedpeft
