// hash_lookup with SENet where a group of lanes keeps the rows of two positions in registers.
#pragma once

#include "hash_lookup/senet.cuh"

namespace fedpeft::gpu {
namespace {

constexpr int kLaneHashes = 4, kLaneSlots = 2;

// Whether a group of lanes may hold the rows of two positions in registers, and their SENet, of
// which lane s has the hidden values s and s + lanes.
template <int V>
bool suits_lanes(const HashLookupArgs& a) {
  const int lanes = lanes_for(a.D / V);
  return a.H <= kLaneHashes && lanes >= 2 * kLaneHashes && a.D <= lanes * V &&
         a.S <= kLaneSlots * lanes && a.M * a.D < INT32_MAX;
}

// The SENet of one client as its lanes read it, in shared memory as accumulators: of each hidden
// value w1, w2 and b1 side by side, at strides that keep lanes apart; zeros for hashes that there
// are not.
template <typename T>
struct LaneWeights {
  using A = acc_t<T>;
  static constexpr int kStride = 2 * kLaneHashes + 4;
  int H, S;
  A *rows, *b2;

  static int64_t size(int64_t S) { return S * kStride + kLaneHashes; }

  FEDPEFT_DEVICE LaneWeights(const HashLookupArgs& a, void* to)
      : H(int(a.H)), S(int(a.S)), rows(static_cast<A*>(to)), b2(rows + S * kStride) {}

  FEDPEFT_DEVICE void load(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    const T* from1 = static_cast<const T*>(a.w1) + c * S * H;
    const T* from2 = static_cast<const T*>(a.w2) + c * H * S;
    for (int i = int(threadIdx.x); i < S * kLaneHashes; i += int(blockDim.x)) {
      const int s = i / kLaneHashes, h = i % kLaneHashes;
      A* const row = rows + s * kStride;
      row[h] = h < H ? to_acc(from1[s * H + h]) : A(0);
      row[kLaneHashes + h] = h < H ? to_acc(from2[h * S + s]) : A(0);
      if (h == 0) row[2 * kLaneHashes] = to_acc(static_cast<const T*>(a.b1)[c * S + s]);
    }
    if (const int h = int(threadIdx.x); h < kLaneHashes)
      b2[h] = h < H ? to_acc(static_cast<const T*>(a.b2)[c * H + h]) : A(0);
  }

  FEDPEFT_DEVICE Sum<A, kLaneHashes> w1(int s) const { return four(s * kStride); }
  FEDPEFT_DEVICE Sum<A, kLaneHashes> w2(int s) const { return four(s * kStride + kLaneHashes); }
  FEDPEFT_DEVICE A b1(int s) const { return rows[s * kStride + 2 * kLaneHashes]; }

 private:
  FEDPEFT_DEVICE Sum<A, kLaneHashes> four(int at) const {
    Sum<A, kLaneHashes> all;
#pragma unroll
    for (int h = 0; h < kLaneHashes; h += kWide<A>) {
      const Pack<A, kWide<A>> pack = load_pack<kWide<A>>(rows + at + h);
#pragma unroll
      for (int i = 0; i < kWide<A>; ++i) all.at[h + i] = pack.at[i];
    }
    return all;
  }
};

// SENet of two positions by a group of at least eight lanes. Of eight values for (position k, hash
// h) lane i has that of k = i / 4 % 2 and h = i % 4, or each lane has all, at [4 k + h].
template <typename T>
struct LaneNet {
  using A = acc_t<T>;
  const LaneWeights<T>& net;
  int lane, lanes;
  A hidden[kLaneSlots][2];

  FEDPEFT_DEVICE LaneNet(const LaneWeights<T>& n, int own, int of) : net(n), lane(own), lanes(of) {}

  FEDPEFT_DEVICE void spread(A mine, A (&all)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) all[i] = __shfl_sync(kFullMask, mine, i, lanes);
  }

  // The lane's gate, from the means of all rows; fills `hidden`, with zeros at padding.
  FEDPEFT_DEVICE A gate(const A (&means)[8], const bool (&active)[2]) {
    A part[8] = {};
#pragma unroll
    for (int slot = 0; slot < kLaneSlots; ++slot) {
      const int s = lane + slot * lanes;
      hidden[slot][0] = hidden[slot][1] = A(0);
      if (s >= net.S) continue;
      const Sum<A, kLaneHashes> w1 = net.w1(s), w2 = net.w2(s);
      const A b1 = net.b1(s);
      A sum[2] = {b1, b1};
#pragma unroll
      for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
        for (int k = 0; k < 2; ++k) sum[k] += w1.at[h] * means[4 * k + h];
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) hidden[slot][k] = active[k] && sum[k] > A(0) ? sum[k] : A(0);
#pragma unroll
      for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
        for (int k = 0; k < 2; ++k) part[4 * k + h] += w2.at[h] * hidden[slot][k];
      }
    }
    const A sum = sums_of_eight(part, lane, lanes);
    const int h = lane % kLaneHashes;
    return h < net.H ? sigmoid(net.b2[h] + sum) : A(0);
  }
};

// Blocks that a multiprocessor must have registers for.
template <typename T, int V>
constexpr int kLaneBlocks = sizeof(T) == 8 || V > 4 ? 1 : 2;

// With SENet, tables through L2: blocks of one client take `span` positions each, a group two at a
// time, whose rows are read once.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kLaneBlocks<T, V>)
    forward_lanes(HashLookupArgs a, int64_t clients, int64_t span, Modulus modulus) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  const int lanes = lanes_for(a.D / V), groups = kThreads / lanes, H = int(a.H);
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int own_h = lane % kLaneHashes, own_k = lane / kLaneHashes;
  const int64_t column = lane * V;
  const bool mine = column < a.D;
  const Hash hash(a.hashes, own_h < H ? own_h : 0);
  const int64_t spans = (a.positions + span - 1) / span, tasks = clients * spans;
  LaneWeights<T> net(a, shared);
  LaneNet<T> own(net, lane, lanes);
  const int bytes = a.items.bytes, row_bytes = int(a.D) * int(sizeof(T));
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t client = divide(task, spans), begin = (task - client * spans) * span;
    const int64_t end = begin + span < a.positions ? begin + span : a.positions;
    const T* table = static_cast<const T*>(a.table) + (a.per_client ? client * a.M * a.D : 0);
    // The item of the lane's own position and hash is on its way two turns ahead; where its row
    // begins is known one turn ahead, so that the row may come to L2.
    Late come;
    const char* from =
        static_cast<const char*>(a.items.data) + (client * a.positions + own_k) * bytes;
    const auto load_item = [&](int64_t p) {
      come.load(from + p * bytes, bytes, own_k < 2 && own_h < H && p + own_k < end);
    };
    int64_t item, next_item = -1;
    int row, next_row = 0;  // at padding one that is read for nothing
    const auto find_row = [&](int64_t p) {
      next_item = come.come(bytes);
      check_item(a, next_item, client * a.positions + p + own_k);
      next_row = 0;
      if (next_item < 0) return;
      next_row = int(modulus(hash_of(hash.a, hash.b, uint64_t(next_item)))) * int(a.D);
      ask_ahead(table + next_row, row_bytes, 0, 1);
    };
    load_item(begin + 2 * group);
    __syncthreads();  // the readers of the task before
    net.load(a, client);
    find_row(begin + 2 * group);
    load_item(begin + 2 * group + 2 * groups);
    __syncthreads();
    // All lanes of a warp take as many turns, since they exchange values.
    for (int64_t turn = begin; turn < end; turn += 2 * groups) {
      const int64_t p = turn + 2 * group, n = client * a.positions + p;
      item = next_item;
      row = next_row;
      Pack<T, V> pack[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        pack[i] = load_pack<V>(table + __shfl_sync(kFullMask, row, i, lanes) + (mine ? column : 0));
      }
      bool active[2];
      Pack<T, V> base[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int64_t of = __shfl_sync(kFullMask, item, k * kLaneHashes, lanes);
        active[k] = of >= 0;
        base[k] = base_at<V, T>(a, mine ? of : -1, column);
      }
      find_row(p + 2 * groups);
      load_item(p + 4 * groups);
      A of[8], all[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        of[i] = A(0);
        if (i % kLaneHashes >= H || !mine) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) of[i] += to_acc(pack[i].at[v]);
      }
      own.spread(sums_of_eight(of, lane, lanes) / A(a.D), all);
      const A gate = own.gate(all, active);
      own.spread(gate, all);
      Sum<A, V> sum[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) sum[k].set(base[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i % kLaneHashes >= H) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[i / 4].at[v] += all[i] * to_acc(pack[i].at[v]);
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (!active[k]) sum[k].clear();
        if (mine && p + k < end) sum[k].store_once(static_cast<T*>(a.out) + (n + k) * a.D + column);
      }
    }
  }
}

// As backward_whole where suits_lanes: groups of all warps but the first take two positions through
// the SENet and back in registers, those of the weights' gradients among them.
template <typename T, int V>
__global__ void __launch_bounds__(kThreads, kLaneBlocks<T, V>)
    backward_lanes(HashLookupArgs a, int64_t clients, Modulus modulus, WholePlan plan, T* out,
                   SENetOutputs<T> weights) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.grad);
  auto* coefficients = reinterpret_cast<Coefficients<A>*>(shared + plan.coefficients);
  A* partial = reinterpret_cast<A*>(shared + plan.partial);  // [groups, outputs]
  int* head = reinterpret_cast<int*>(shared + plan.head);
  int* next = reinterpret_cast<int*>(shared + plan.next);
  int* bucket = reinterpret_cast<int*>(shared + plan.bucket);
  LaneWeights<T> net(a, shared + plan.net);
  const int H = net.H, S = net.S, M = int(a.M), D = int(a.D), P = int(a.positions);
  const int outputs = 2 * S * H + S + H;
  const int thread = int(threadIdx.x), lanes = plan.lanes, lane = thread % lanes;
  const int groups = (kThreads - kWarp) / lanes, group = (thread - kWarp) / lanes;
  const int own_h = lane % kLaneHashes, own_k = lane / kLaneHashes, column = lane * V;
  const bool mine = column < D;
  LaneNet<T> own(net, lane, lanes);

  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* rows = static_cast<const T*>(a.table) + client * a.M * a.D;
    const T* grad = static_cast<const T*>(a.grad) + client * P * a.D;
    net.load(a, client);
    for (int r = thread; r < M; r += kThreads) head[r] = -1;
    hash_entries<4>(a, modulus, client * P, P * H, bucket, next);
    __syncthreads();

    if (thread < kWarp) {
      link_entries(head, M, next, P * H, 0, 1);
    } else {
      A grad_w1[kLaneSlots][kLaneHashes] = {}, grad_w2[kLaneSlots][kLaneHashes] = {};
      A grad_b1[kLaneSlots] = {}, grad_b2 = 0;
      for (int turn = 0; turn < P; turn += 2 * groups) {
        const int p = turn + 2 * group;
        bool active[2];
        Pack<T, V> pack[8], g[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          active[k] = p + k < P && bucket[(p + k) * H] >= 0;
          g[k] = zero_pack<V, T>();
          if (active[k] && mine) g[k] = load_pack<V>(grad + (p + k) * D + column);
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
            pack[4 * k + h] = zero_pack<V, T>();
            if (active[k] && mine && h < H)
              pack[4 * k + h] = load_pack<V>(rows + int64_t(bucket[(p + k) * H + h]) * D + column);
          }
        }
        A sums[8], products[8], means[8], slopes[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sums[i] = products[i] = A(0);
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A x = to_acc(pack[i].at[v]);
            sums[i] += x;
            products[i] += x * to_acc(g[i / 4].at[v]);
          }
        }
        if (plan.staged && mine) {
#pragma unroll
          for (int k = 0; k < 2; ++k)
            if (active[k]) store_pack<V>(staged + (p + k) * D + column, g[k]);
        }
        own.spread(sums_of_eight(sums, lane, lanes) / A(D), means);
        const A gate = own.gate(means, active);
        const A product = sums_of_eight(products, lane, lanes);
        // The gradient before the sigmoid; zero at padding, of whose rows the products are.
        const A slope = product * gate * (A(1) - gate);
        own.spread(slope, slopes);
        if (own_k < 2) grad_b2 += slope;
        A part[8] = {};
#pragma unroll
        for (int slot = 0; slot < kLaneSlots; ++slot) {
          const int s = lane + slot * lanes;
          if (s >= S) continue;
          A before[2] = {};  // the ReLU
          const Sum<A, kLaneHashes> w1 = net.w1(s), w2 = net.w2(s);
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              before[k] += slopes[4 * k + h] * w2.at[h];
              grad_w2[slot][h] += slopes[4 * k + h] * own.hidden[slot][k];
            }
          }
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            if (!(own.hidden[slot][k] > A(0))) before[k] = A(0);
            grad_b1[slot] += before[k];
          }
#pragma unroll
          for (int h = 0; h < kLaneHashes; ++h) {
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              part[4 * k + h] += before[k] * w1.at[h];
              grad_w1[slot][h] += before[k] * means[4 * k + h];
            }
          }
        }
        const A shift = sums_of_eight(part, lane, lanes) / A(D);
        if (own_k < 2 && own_h < H && p + own_k < P)
          coefficients[(p + own_k) * H + own_h] = {gate, shift};
      }
      A* to = partial + group * outputs;
#pragma unroll
      for (int slot = 0; slot < kLaneSlots; ++slot) {
        const int s = lane + slot * lanes;
        if (s >= S) continue;
#pragma unroll
        for (int h = 0; h < kLaneHashes; ++h) {
          if (h >= H) break;
          to[s * H + h] = grad_w1[slot][h];
          to[S * H + S + h * S + s] = grad_w2[slot][h];
        }
        to[S * H + s] = grad_b1[slot];
      }
      grad_b2 += __shfl_xor_sync(kFullMask, grad_b2, kLaneHashes, lanes);
      if (lane < H) to[2 * S * H + S + lane] = grad_b2;
    }
    __syncthreads();
    for (int i = thread; i < outputs; i += kThreads) {
      A sum = 0;
#pragma unroll 4
      for (int j = 0; j < groups; ++j) sum += partial[j * outputs + i];
      *weights(client, i) = from_acc<T>(sum);
    }
    const auto entry = [&](int e) { return coefficients[e]; };
    T* to = out + client * a.M * a.D;
    if (plan.staged) {
      sum_rows<V, 1>(to, staged, a, head, next, lanes, entry);
    } else {
      sum_rows<V>(to, grad, a, head, next, lanes, entry);
    }
    __syncthreads();
  }
}

// False where shared memory does not hold it, or its registers.
template <typename T, int V>
bool plan_lanes(const HashLookupArgs& a, WholePlan* plan) {
  using A = acc_t<T>;
  if (!suits_lanes<V>(a)) return false;
  const int64_t entries = a.positions * a.H;
  *plan = {};
  plan->threads = kThreads;
  plan->lanes = lanes_for(a.D / V);
  Carve carve;
  plan->coefficients = carve.take<A>(2 * entries);
  plan->net = carve.take<A>(LaneWeights<T>::size(a.S));
  plan->partial = carve.take<A>((kThreads - kWarp) / plan->lanes * a.senet_size());
  plan->head = carve.take<int>(a.M);
  plan->next = carve.take<int>(entries);
  plan->bucket = carve.take<int>(entries);
  stage_gradient<T>(a, &carve, plan);
  return carve.used <= limits().shared_bytes;
}

}  // namespace
}  // namespace fedpeft::gpu
