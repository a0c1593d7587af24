// Binding of sample_negatives, client_dropout and the samples of clients: checks, allocation,
// dispatch.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <mutex>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "sampling/sample_clients.h"
#include "sampling/sampling_cpu.h"
#include "sampling/sampling_cuda.h"

namespace fedpeft {
namespace {

[[maybe_unused]] void check_positives(const SampleNegativesArgs& a, int64_t clients, int64_t nnz) {
  FirstError full, bad_range, bad_index;
  parallel_ranges(clients, 64, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t first = a.indptr[a.clients[c]], last = a.indptr[a.clients[c] + 1];
      if (first < 0 || last < first || last > nnz) {
        bad_range.report(c);
        continue;
      }
      int64_t before = -1;
      for (int64_t i = first; i < last; ++i) {
        const int64_t item = a.indices[i];
        if (item <= before || item >= a.num_items) bad_index.report(i);
        before = item;
      }
      if (last - first >= a.num_items) full.report(c);
    }
  });
  if (bad_range.any()) {
    const int64_t user = a.clients[bad_range.position];
    throw std::invalid_argument(text("indptr: expected ascending offsets of 0 to ", nnz, ", got ",
                                     a.indptr[user], " and ", a.indptr[user + 1], " for client ",
                                     user));
  }
  if (bad_index.any()) {
    const int64_t at = bad_index.position, item = a.indices[at];
    if (item < 0 || item >= a.num_items) {
      throw std::out_of_range(text("indices: item ", item, " at position ", at,
                                   " is out of range: expected 0 to ", a.num_items - 1));
    }
    throw std::invalid_argument(
        text("indices: expected distinct items in ascending order within a client, got ", item,
             " at position ", at));
  }
  check_value(!full.any(), "clients: client ", full.any() ? a.clients[full.position] : 0,
              " has met all ", a.num_items, " items: there is no negative to draw");
}

Tensor sample_negatives(const Tensor& items, const Tensor& clients, const Tensor& indptr,
                        const Tensor& indices, int64_t num_items, int64_t epochs, int64_t seed,
                        int64_t round) {
  check_dim(items, 2, "items", "[C, P]");
  check_dim(clients, 1, "clients", "[C]");
  check_size(clients, 0, items.size(0), "clients", "C, the rows of items");
  check_dim(indptr, 1, "indptr", "[U + 1]");
  check_value(indptr.size(0) >= 1, "indptr: expected shape [U + 1], got ", shape_text(indptr));
  check_dim(indices, 1, "indices", "[nnz]");
  check_same_device(clients, items, "clients", "items");
  check_same_device(indptr, items, "indptr", "items");
  check_same_device(indices, items, "indices", "items");
  check_value(num_items >= 0, "num_items: expected at least 0, got ", num_items);
  check_uint(epochs, (1 << 16) + 1, "epochs");

  const Tensor items_ = dense(items), clients_ = dense(clients), indptr_ = dense(indptr);
  const Tensor indices_ = dense(indices);
  FirstError bad_item;
  SampleNegativesArgs a{};
  a.items = indices_of(items_, "items");
  a.clients = indices_of(clients_, "clients");
  a.indptr = indices_of(indptr_, "indptr");
  a.indices = indices_of(indices_, "indices");
  a.positions = items.size(1);
  a.epochs = epochs;
  a.num_items = num_items;
  a.blocks = (a.positions + kNegativesBlock - 1) / kNegativesBlock;
  a.seed = uint64_t(seed);
  a.round = check_uint(round, int64_t{1} << 32, "round");
  a.bad_item = &bad_item;

  Tensor out = allocate(items, {items.size(0), epochs, a.positions});
  a.out = out.mutable_data_ptr();
  run_on(
      items,
      [&](auto) {
        check_clients(a.clients, items.size(0), indptr.size(0) - 1);
        check_positives(a, items.size(0), indices.size(0));
        const auto kernel = select_wide_sampling_kernels().negatives;
        parallel_ranges(items.size(0) * epochs * a.blocks,
                        30 * std::min(a.positions, kNegativesBlock),
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
        raise_bad_index(bad_item, a.items, num_items, "items");
      },
      [&](auto stream) {
        gpu::sample_negatives(a, items.size(0), indptr.size(0) - 1, indices.size(0), stream);
      });
  return out;
}

Tensor client_dropout(const Tensor& x, const Tensor& clients, double p, int64_t seed, int64_t round,
                      int64_t epoch, int64_t layer) {
  check_value(x.dim() >= 1, "x: expected shape [C, ...], got ", shape_text(x));
  check_dim(clients, 1, "clients", "[C]");
  check_size(clients, 0, x.size(0), "clients", "C, the first dimension of x");
  check_same_device(clients, x, "clients", "x");
  check_value(p >= 0 && p <= 1, "p: expected a probability from 0 to 1, got ", p);

  const Tensor x_ = dense(x), clients_ = dense(clients);
  ClientDropoutArgs a{};
  a.x = x_.const_data_ptr();
  a.clients = indices_of(clients_, "clients");
  a.size = x.size(0) ? x.numel() / x.size(0) : 0;
  check_value(a.size <= int64_t{1} << 34, "x: expected at most 2^34 elements a client, got ",
              a.size);
  a.blocks = (a.size + kDropoutBlock - 1) / kDropoutBlock;
  a.threshold = p < 1 ? uint32_t(std::floor(std::ldexp(p, 32))) : 0;
  a.scale = 1 / (1 - p);
  a.seed = uint64_t(seed);
  a.round = check_uint(round, int64_t{1} << 32, "round");
  a.epoch = check_uint(epoch, 1 << 16, "epoch");
  a.layer = check_uint(layer, 1 << 8, "layer");
  const DType dtype = dtype_of(x, "x");
  if (p == 1) return torch::stable::new_zeros(x, x.sizes());
  Tensor out = allocate_like(x_);
  a.out = out.mutable_data_ptr();
  run_on(
      x,
      [&](auto) {
        check_clients(a.clients, x.size(0), int64_t{1} << 32);
        const auto kernel = select_wide_sampling_kernels().dropout[int(dtype)];
        parallel_ranges(x.size(0) * a.blocks, 4 * std::min(a.size, kDropoutBlock),
                        [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
      },
      [&](auto stream) { gpu::client_dropout(a, dtype, x.size(0), stream); });
  return out;
}

using Keyed = std::pair<uint64_t, int64_t>;  // key, place: equal keys go by place

// The clients whose keys have high halves of at most `bound`, in any order.
[[maybe_unused]] std::vector<Keyed> smallest_keys(const ClientKeysArgs& a, int64_t n,
                                                  uint32_t bound) {
  const SamplingKernels& kernels = select_wide_sampling_kernels();
  std::vector<Keyed> smallest;
  std::mutex mutex;
  std::atomic<bool> bad_id = false;
  parallel_ranges(n, 4, [&](int64_t begin, int64_t end) {
    std::vector<Keyed> own;
    std::array<int64_t, kKeysBlock> places, ids;
    std::array<uint64_t, kKeysBlock> keys;
    for (int64_t block = begin; block < end; block += kKeysBlock) {
      bool bad = false;
      const int64_t found = kernels.smallest_keys(a, block, std::min(block + kKeysBlock, end),
                                                  bound, places.data(), &bad);
      if (bad) bad_id = true;
      for (int64_t i = 0; i < found; ++i) ids[size_t(i)] = a.clients[places[size_t(i)]];
      ClientKeysArgs of_found = a;
      of_found.clients = {ids.data(), 8};
      of_found.keys = keys.data();
      kernels.client_keys(of_found, 0, found);
      for (int64_t i = 0; i < found; ++i) own.emplace_back(keys[size_t(i)], places[size_t(i)]);
    }
    const std::lock_guard lock(mutex);
    smallest.insert(smallest.end(), own.begin(), own.end());
  });
  if (bad_id) check_clients(a.clients, n, int64_t{1} << 32);  // which names the first
  return smallest;
}

// The clients at the first `count` places drawn that differ. As many draws as are missing never
// find too many, so that they may be made at once.
[[maybe_unused]] void sample_places(const ClientKeysArgs& a, int64_t n, int64_t count,
                                    int64_t* ids) {
  const auto draw = select_wide_sampling_kernels().client_places;
  std::vector<uint64_t> chosen(size_t(n / 64 + 1));  // a bit a place
  std::array<int64_t, kKeysBlock> places;
  int64_t drawn = 0;
  for (int64_t missing = count; missing > 0;) {
    const int64_t draws = std::min(missing, kKeysBlock);
    draw(a, n, drawn, drawn + draws, places.data());
    drawn += draws;
    for (int64_t i = 0; i < draws; ++i) {
      a.clients.prefetch(places[size_t(i)]);
      uint64_t& word = chosen[size_t(places[size_t(i)] / 64)];
      const uint64_t bit = uint64_t{1} << places[size_t(i)] % 64;
      missing -= (word & bit) == 0;
      word |= bit;
    }
  }
  bool ascending = true, good = true;
  int64_t* next = ids;
  for (size_t w = 0; w < chosen.size(); ++w) {
    for (uint64_t bits = chosen[w]; bits; bits &= bits - 1) {
      *next = a.clients[int64_t(w) * 64 + std::countr_zero(bits)];
      good &= uint64_t(*next) >> 32 == 0;
      ascending &= next == ids || next[-1] <= *next;
      ++next;
    }
  }
  if (!good) check_clients(a.clients, n, int64_t{1} << 32);  // which names the first
  if (!ascending) std::sort(ids, ids + count);
}

// The `count` clients of the smallest keys, ascending by id. Keys are uniform, so that those below
// a bound hold the smallest ones but for one call in many thousands, which looks at all.
[[maybe_unused]] void sample_keys(const ClientKeysArgs& a, int64_t n, int64_t count, int64_t* ids) {
  const double likely = double(count) + 6 * std::sqrt(double(count)) + 16;
  const bool few = likely < double(n);
  std::vector<Keyed> smallest =
      smallest_keys(a, n, few ? uint32_t(likely / double(n) * 0x1p32) : UINT32_MAX);
  if (int64_t(smallest.size()) < count) smallest = smallest_keys(a, n, UINT32_MAX);
  std::nth_element(smallest.begin(), smallest.begin() + count, smallest.end());
  for (int64_t i = 0; i < count; ++i) ids[i] = a.clients[smallest[size_t(i)].second];
  std::sort(ids, ids + count);
}

// Everything but the keys' room.
ClientKeysArgs client_keys_args(const Tensor& clients, int64_t seed, int64_t round,
                                int64_t attempt) {
  ClientKeysArgs a{};
  a.clients = indices_of(clients, "clients");
  a.seed = uint64_t(seed);
  a.round = check_uint(round, int64_t{1} << 32, "round");
  a.attempt = check_uint(attempt, int64_t{1} << 32, "attempt");
  return a;
}

Tensor sample_clients(const Tensor& clients, int64_t count, int64_t seed, int64_t round,
                      int64_t attempt) {
  check_dim(clients, 1, "clients", "[n]");
  const int64_t n = clients.size(0);
  check_value(count >= 0 && count <= n, "count: expected 0 to ", n, ", the clients, got ", count);
  const Tensor clients_ = dense(clients);
  const ClientKeysArgs a = client_keys_args(clients_, seed, round, attempt);

  Tensor out = allocate(clients, {count}, ScalarType::Long);
  int64_t* ids = static_cast<int64_t*>(out.mutable_data_ptr());
  const bool few = sampled_by_places(count, n);
  run_on(
      clients, [&](auto) { (few ? sample_places : sample_keys)(a, n, count, ids); },
      [&](auto stream) {
        check_value(n <= INT32_MAX, "clients: expected at most 2^31 - 1 on a GPU, got ", n);
        if (few) {
          Tensor room = torch::stable::new_zeros(clients, {n / 32 + 2}, ScalarType::Int);
          gpu::sample_places(a, n, count, static_cast<unsigned*>(room.mutable_data_ptr()), ids,
                             stream);
          out = sort_stable(out).first;
          return;
        }
        using Room = gpu::SampleClientsRoom;
        Tensor bins =
            torch::stable::new_zeros(clients, {Room::kBins + Room::kNumbers}, ScalarType::Int);
        Tensor near = allocate(clients, {n}, ScalarType::Int);
        const Room room = {static_cast<unsigned*>(bins.mutable_data_ptr()),
                           static_cast<unsigned*>(near.mutable_data_ptr())};
        gpu::sample_clients(a, n, count, room, ids, stream);
        out = sort_stable(out).first;
      });
  return out;
}

// The clients whose keys, as numbers in [0, 1) of 53 bits, are below the probability.
Tensor sample_clients_independently(const Tensor& clients, double probability, int64_t seed,
                                    int64_t round, int64_t attempt) {
  check_dim(clients, 1, "clients", "[n]");
  check_value(probability >= 0 && probability <= 1, "probability: expected 0 to 1, got ",
              probability);
  const int64_t n = clients.size(0);
  const Tensor clients_ = dense(clients);
  const ClientKeysArgs a = client_keys_args(clients_, seed, round, attempt);
  const uint64_t limit = uint64_t(std::ceil(std::ldexp(probability, kKeyBits)));

  Tensor out;
  run_on(
      clients,
      [&](auto) {
        // At the probability 1 the shift leaves zero, and one less is the largest key.
        const uint64_t largest = limit ? (limit << (64 - kKeyBits)) - 1 : 0;
        std::vector<Keyed> below = smallest_keys(a, n, uint32_t(largest >> 32));
        std::erase_if(below, [&](const Keyed& x) { return !key_below(x.first, limit); });
        out = allocate(clients, {int64_t(below.size())}, ScalarType::Long);
        int64_t* const ids = static_cast<int64_t*>(out.mutable_data_ptr());
        std::transform(below.begin(), below.end(), ids,
                       [&](const Keyed& x) { return a.clients[x.second]; });
        std::sort(ids, ids + below.size());
      },
      [&](auto stream) {
        check_value(n <= INT32_MAX, "clients: expected at most 2^31 - 1 on a GPU, got ", n);
        Tensor found = torch::stable::new_zeros(clients, {1}, ScalarType::Int);
        Tensor chosen = allocate(clients, {n}, ScalarType::Long);
        const int64_t count =
            gpu::sample_below(a, n, limit, static_cast<unsigned*>(found.mutable_data_ptr()),
                              static_cast<int64_t*>(chosen.mutable_data_ptr()), stream);
        out = sort_stable(torch::stable::narrow(chosen, 0, 0, count)).first;
      });
  return out;
}

}  // namespace

#if !defined(FEDPEFT_EMULATOR)
Tensor sample_clients_on_cpu(const Tensor& clients, int64_t count, int64_t seed, int64_t round,
                             int64_t attempt) {
  return sample_clients(clients, count, seed, round, attempt);
}
#endif

FEDPEFT_IMPL(m) {
  m.impl("sample_negatives", TORCH_BOX(&sample_negatives));
  m.impl("client_dropout", TORCH_BOX(&client_dropout));
  m.impl("sample_clients", TORCH_BOX(&sample_clients));
  m.impl("sample_clients_independently", TORCH_BOX(&sample_clients_independently));
}

}  // namespace fedpeft
