// CUDA kernels of sample_negatives (a thread a draw), client_dropout (a thread a Philox block, four
// elements) and sample_clients (a thread a client, in two passes that make its key anew: keys are
// counted by their first bits, which shows the bin where the sample ends; clients before it are
// chosen, those in it ranked by a third launch; of few clients a thread a place that is drawn).
#include "common/negatives.cuh"
#include "sampling/sampling_cuda.h"

namespace fedpeft::gpu {
namespace {

constexpr int kThreads = 256;

struct Positives {
  int64_t user, first, count;
};

// The positives of a client, which lie in memory and leave an item to draw.
FEDPEFT_DEVICE Positives positives_of(const SampleNegativesArgs& a, int64_t c, int64_t users,
                                      int64_t nnz) {
  const int64_t user = a.clients[c];
  if (uint64_t(user) >= uint64_t(users)) FEDPEFT_BAD_INDEX("clients", user, c, users);
  const int64_t first = a.indptr[user], last = a.indptr[user + 1];
  if (first < 0 || last < first || last > nnz)
    FEDPEFT_BAD_VALUE("indptr: expected ascending offsets");
  if (last - first >= a.num_items)
    FEDPEFT_BAD_VALUE("clients: a client has met all items: there is no negative to draw",
                      "clients: client " + std::to_string(user) + " has met all " +
                          std::to_string(a.num_items) + " items: there is no negative to draw");
  return {user, first, last - first};
}

// The first `checks` blocks see that the positives of each client ascend; the others draw.
template <typename Item>
__global__ void __launch_bounds__(kThreads, 4)
    negatives(SampleNegativesArgs a, int64_t clients, int64_t users, int64_t nnz, int64_t checks) {
  if (blockIdx.x < checks) {
    for (int64_t c = blockIdx.x; c < clients; c += checks) {
      const Positives met = positives_of(a, c, users, nnz);
      for (int64_t i = met.first + threadIdx.x; i < met.first + met.count; i += kThreads) {
        const int64_t item = a.indices[i];
        if (uint64_t(item) >= uint64_t(a.num_items))
          FEDPEFT_BAD_INDEX("indices", item, i, a.num_items);
        if (i > met.first && item <= a.indices[i - 1])
          FEDPEFT_BAD_VALUE("indices: expected distinct items in ascending order within a client");
      }
    }
    return;
  }
  const int64_t draws = a.epochs * a.positions, total = clients * draws;
  for (int64_t e = (blockIdx.x - checks) * kThreads + threadIdx.x; e < total;
       e += (gridDim.x - checks) * kThreads) {
    const int64_t c = divide(e, draws), epoch = divide(e - c * draws, a.positions);
    const int64_t p = e - c * draws - epoch * a.positions, n = c * a.positions + p;
    const int64_t item = a.items[n];
    const Position kind = classify(item, a.num_items);
    if (kind == Position::bad) FEDPEFT_BAD_INDEX("items", item, n, a.num_items);
    int64_t negative = -1;
    if (kind == Position::item) {
      const Positives met = positives_of(a, c, users, nnz);
      negative = draw_negative(a.indices, met.first, met.count, a.num_items, uint32_t(p),
                               uint32_t(met.user), a.round, uint32_t(epoch), a.seed);
    }
    static_cast<Item*>(a.out)[e] = Item(negative);
  }
}

// Whole: the elements of a client are a multiple of four and aligned to four.
template <typename T, bool Whole>
__global__ void __launch_bounds__(kThreads, 4) dropout(ClientDropoutArgs a, int64_t clients) {
  using A = acc_t<T>;
  const int64_t blocks = (a.size + 3) / 4, total = clients * blocks;
  const A scale = A(a.scale);
  for (int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x; b < total;
       b += int64_t(gridDim.x) * kThreads) {
    const int64_t c = divide(b, blocks), block = b - c * blocks, client = a.clients[c];
    if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, c, int64_t{1} << 32);
    const PhiloxBlock words = philox(uint32_t(block), uint32_t(client), a.round,
                                     philox_stream(Purpose::dropout, a.layer, a.epoch), a.seed);
    const int64_t at = c * a.size + block * 4;
    const T* x = static_cast<const T*>(a.x) + at;
    T* out = static_cast<T*>(a.out) + at;
    if constexpr (Whole) {
      Sum<A, 4> v;
      v.set(x);
#pragma unroll
      for (int i = 0; i < 4; ++i) v.at[i] = words.word[i] >= a.threshold ? v.at[i] * scale : A(0);
      v.store(out);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (block * 4 + i < a.size)
          out[i] = from_acc<T>(words.word[i] >= a.threshold ? to_acc(x[i]) * scale : A(0));
      }
    }
  }
}

constexpr int kBins = SampleClientsRoom::kBins;
constexpr int kBinBits = 11;
static_assert(kBins == 1 << kBinBits && kBins % kThreads == 0);

FEDPEFT_DEVICE uint64_t client_key(const ClientKeysArgs& a, int64_t client) {
  return philox(a.attempt, uint32_t(client), a.round, philox_stream(Purpose::client_sampling, 0, 0),
                a.seed)
      .low64();
}
FEDPEFT_DEVICE int bin_of(uint64_t key) { return int(key >> (64 - kBinBits)); }

__global__ void __launch_bounds__(kThreads, 4)
    count_keys(ClientKeysArgs a, int64_t n, SampleClientsRoom room) {
  FEDPEFT_SHARED(unsigned, bins, kBins);
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) bins[b] = 0;
  __syncthreads();
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n;
       i += int64_t(gridDim.x) * kThreads) {
    const int64_t client = a.clients[i];
    if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, i, int64_t{1} << 32);
    atomicAdd(bins + bin_of(client_key(a, client)), 1u);
  }
  __syncthreads();
  for (int b = int(threadIdx.x); b < kBins; b += kThreads) {
    if (bins[b]) atomicAdd(room.bins + b, bins[b]);
  }
}

// Room for one element of each lane that says so: its place behind what `used` counts. All lanes of
// a warp call.
FEDPEFT_DEVICE unsigned next_place(bool mine, unsigned* used) {
  const unsigned votes = __ballot_sync(kFullMask, mine);
  if (votes == 0) return 0;
  const int lane = int(threadIdx.x) % kWarp, leader = __ffs(votes) - 1;
  unsigned first = 0;
  if (lane == leader) first = atomicAdd(used, unsigned(__popc(votes)));
  return __shfl_sync(kFullMask, first, leader) + unsigned(__popc(votes & ((1u << lane) - 1)));
}

// room.bins[kBins + ...]: chosen so far, clients in the last bin, how many of these are to be
// chosen.
__global__ void __launch_bounds__(kThreads, 4)
    choose_bins(ClientKeysArgs a, int64_t n, int64_t count, SampleClientsRoom room,
                int64_t* chosen) {
  FEDPEFT_SHARED(unsigned, sums, kThreads / kWarp);
  FEDPEFT_SHARED(int, last_bin, 1);
  constexpr int kOwn = kBins / kThreads;
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp;
  const unsigned* own = room.bins + int(threadIdx.x) * kOwn;
  unsigned mine = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) mine += own[b];
  unsigned until = mine;  // sum over the threads up to this one
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned below = __shfl_up_sync(kFullMask, until, distance);
    if (lane >= distance) until += below;
  }
  if (lane == kWarp - 1) sums[warp] = until;
  if (threadIdx.x == 0) last_bin[0] = -1;  // of an empty sample
  __syncthreads();
  for (int w = 0; w < warp; ++w) until += sums[w];
  int64_t before = int64_t(until) - mine;
  if (before < count && count <= int64_t(until)) {
    int b = 0;
    while (before + own[b] < count) before += own[b++];
    last_bin[0] = int(threadIdx.x) * kOwn + b;
    if (blockIdx.x == 0) room.bins[kBins + 2] = unsigned(count - before);
  }
  __syncthreads();
  const int last = last_bin[0];
  for (int64_t first = int64_t(blockIdx.x) * kThreads + warp * kWarp; first < n;
       first += int64_t(gridDim.x) * kThreads) {
    const int64_t i = first + lane;
    const int64_t client = i < n ? a.clients[i] : 0;
    const int bin = i < n ? bin_of(client_key(a, client)) : kBins;
    const unsigned place = next_place(bin < last, room.bins + kBins);
    if (bin < last) chosen[place] = client;
    const unsigned near_place = next_place(bin == last, room.bins + kBins + 1);
    if (bin == last) room.near[near_place] = unsigned(i);
  }
}

// Of the clients in the last bin, a thread each, those that few enough come before: equal keys go
// by place. Ranks are places behind what is chosen.
__global__ void __launch_bounds__(kThreads, 4)
    choose_near(ClientKeysArgs a, int64_t count, SampleClientsRoom room, int64_t* chosen) {
  FEDPEFT_SHARED(uint64_t, keys, kThreads);
  FEDPEFT_SHARED(unsigned, places, kThreads);
  const unsigned near = room.bins[kBins + 1], wanted = room.bins[kBins + 2];
  for (unsigned first = blockIdx.x * kThreads; first < near; first += gridDim.x * kThreads) {
    const bool there = first + threadIdx.x < near;
    const unsigned place = there ? room.near[first + threadIdx.x] : 0;
    const int64_t client = a.clients[place];
    const uint64_t key = client_key(a, client);
    unsigned rank = 0;
    for (unsigned tile = 0; tile < near; tile += kThreads) {
      __syncthreads();
      if (tile + threadIdx.x < near) {
        places[threadIdx.x] = room.near[tile + threadIdx.x];
        keys[threadIdx.x] = client_key(a, a.clients[places[threadIdx.x]]);
      }
      __syncthreads();
      const int filled = int(near - tile < kThreads ? near - tile : kThreads);
      for (int j = 0; j < filled; ++j)
        rank += keys[j] < key || (keys[j] == key && places[j] < place);
    }
    if (there && rank < wanted) chosen[count - wanted + rank] = client;
  }
}

// Draw `draw` of a place, and the client there where it was not drawn before, in the lanes with
// `there`. All lanes of a warp call.
FEDPEFT_DEVICE void choose_place(const ClientKeysArgs& a, int64_t n, int64_t draw, bool there,
                                 unsigned* room, int64_t* chosen) {
  int64_t place = 0;
  bool found = false;
  if (there) {
    const PhiloxBlock block =
        philox(uint32_t(draw), a.attempt, a.round,
               philox_stream(Purpose::client_sampling, kPlacesLayer, 0), a.seed);
    place = int64_t(multiply_high(block.low64(), uint64_t(n)));
    const unsigned bit = 1u << int(place % 32);
    found = (atomicOr(room + 1 + place / 32, bit) & bit) == 0;
  }
  const unsigned at = next_place(found, room);
  if (!found) return;
  chosen[at] = a.clients[place];
  if (uint64_t(chosen[at]) >> 32) FEDPEFT_BAD_INDEX("clients", chosen[at], place, int64_t{1} << 32);
}

__global__ void __launch_bounds__(kThreads, 4)
    choose_places(ClientKeysArgs a, int64_t n, int64_t count, unsigned* room, int64_t* chosen) {
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < count;
       first += int64_t(gridDim.x) * kThreads) {
    const int64_t draw = first + threadIdx.x;
    choose_place(a, n, draw, draw < count, room, chosen);
  }
}

// One block: as many draws as are missing, which never find too many, until none is.
__global__ void __launch_bounds__(kThreads, 4)
    choose_missing(ClientKeysArgs a, int64_t n, int64_t count, unsigned* room, int64_t* chosen) {
  FEDPEFT_SHARED(unsigned, found, 1);
  for (int64_t drawn = count;;) {
    if (threadIdx.x == 0) found[0] = atomicAdd(room, 0u);
    __syncthreads();
    const int64_t missing = count - int64_t(found[0]);
    if (missing == 0) break;
    for (int64_t first = 0; first < missing; first += kThreads) {
      const int64_t i = first + threadIdx.x;
      choose_place(a, n, drawn + i, i < missing, room, chosen);
    }
    drawn += missing;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads, 4)
    choose_below(ClientKeysArgs a, int64_t n, uint64_t limit, unsigned* found, int64_t* chosen) {
  for (int64_t first = int64_t(blockIdx.x) * kThreads; first < n;
       first += int64_t(gridDim.x) * kThreads) {
    const int64_t i = first + threadIdx.x, client = i < n ? a.clients[i] : 0;
    if (uint64_t(client) >> 32) FEDPEFT_BAD_INDEX("clients", client, i, int64_t{1} << 32);
    const bool mine = i < n && key_below(client_key(a, client), limit);
    const unsigned place = next_place(mine, found);
    if (mine) chosen[place] = client;
  }
}

}  // namespace

void sample_negatives(const SampleNegativesArgs& a, int64_t clients, int64_t users, int64_t nnz,
                      Stream stream) {
  const int64_t checks = grid_half(clients);
  const int64_t grid =
      checks + grid_half((clients * a.epochs * a.positions + kThreads - 1) / kThreads);
  launch(a.items.bytes == 8 ? negatives<int64_t> : negatives<int32_t>, grid, kThreads, 0, stream, a,
         clients, users, nnz, checks);
}

void client_dropout(const ClientDropoutArgs& a, DType dtype, int64_t clients, Stream stream) {
  const int64_t grid = (clients * ((a.size + 3) / 4) + kThreads - 1) / kThreads;
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto aligned = [](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, 4>) == 0;
    };
    if (a.size % 4 == 0 && aligned(a.x) && aligned(a.out)) {
      launch(dropout<T, true>, grid, kThreads, 0, stream, a, clients);
    } else {
      launch(dropout<T, false>, grid, kThreads, 0, stream, a, clients);
    }
  });
}

void sample_clients(const ClientKeysArgs& a, int64_t n, int64_t count,
                    const SampleClientsRoom& room, int64_t* chosen, Stream stream) {
  // A block counts more clients than there are bins, which it adds to everybody's.
  const int64_t blocks = (n + 2 * kBins - 1) / (2 * kBins), most = 4 * limits().multiprocessors;
  const int64_t grid = blocks < most ? blocks : most;
  launch(count_keys, grid, kThreads, 0, stream, a, n, room);
  if (count == 0) return;
  launch(choose_bins, grid, kThreads, 0, stream, a, n, count, room, chosen);
  // Keys are uniform: a bin holds about so many.
  launch(choose_near, n / kBins / kThreads + 1, kThreads, 0, stream, a, count, room, chosen);
}

void sample_places(const ClientKeysArgs& a, int64_t n, int64_t count, unsigned* room,
                   int64_t* chosen, Stream stream) {
  const int64_t blocks = (count + kThreads - 1) / kThreads, most = 4 * limits().multiprocessors;
  launch(choose_places, blocks < most ? blocks : most, kThreads, 0, stream, a, n, count, room,
         chosen);
  launch(choose_missing, 1, kThreads, 0, stream, a, n, count, room, chosen);
}

int64_t sample_below(const ClientKeysArgs& a, int64_t n, uint64_t limit, unsigned* found,
                     int64_t* chosen, Stream stream) {
  const int64_t blocks = (n + kThreads - 1) / kThreads, most = 8 * limits().multiprocessors;
  launch(choose_below, blocks < most ? blocks : most, kThreads, 0, stream, a, n, limit, found,
         chosen);
  unsigned count = 0;
  copy_to_host(&count, found, sizeof(count), stream);
  return int64_t(count);
}

}  // namespace fedpeft::gpu
