// hash_lookup with SENet, a block a client, in phases that all of its threads share.
#pragma once

#include "hash_lookup/senet.cuh"

namespace fedpeft::gpu {
namespace {

// SENet of one client for a whole block, its weights in shared memory as accumulators. Rows of
// weights and of hidden values have odd strides, so that lanes at different rows meet different
// banks.
template <typename T>
struct BlockNet {
  using A = acc_t<T>;
  int H, S, row1, row2;  // row2 is the stride of a position's hidden values too
  A *w1, *b1, *w2, *b2;  // [S, row1], [S], [H, row2], [H]

  static int64_t size(int64_t H, int64_t S) { return S * (H | 1) + S + H * (S | 1) + H; }

  FEDPEFT_DEVICE BlockNet(const HashLookupArgs& a, void* to)
      : H(int(a.H)), S(int(a.S)), row1(H | 1), row2(S | 1) {
    w1 = static_cast<A*>(to);
    b1 = w1 + S * row1;
    w2 = b1 + S;
    b2 = w2 + H * row2;
  }

  FEDPEFT_DEVICE void load(const HashLookupArgs& a, int64_t client) {
    const int64_t c = a.per_client ? client : 0;
    const T* from1 = static_cast<const T*>(a.w1) + c * S * H;
    const T* from2 = static_cast<const T*>(a.w2) + c * H * S;
    for (int i = int(threadIdx.x); i < S * H; i += int(blockDim.x)) {
      const int s = int(unsigned(i) / unsigned(H)), h = int(unsigned(i) / unsigned(S));
      w1[s * row1 + i - s * H] = to_acc(from1[i]);
      w2[h * row2 + i - h * S] = to_acc(from2[i]);
    }
    for (int s = int(threadIdx.x); s < S; s += int(blockDim.x))
      b1[s] = to_acc(static_cast<const T*>(a.b1)[c * S + s]);
    for (int h = int(threadIdx.x); h < H; h += int(blockDim.x))
      b2[h] = to_acc(static_cast<const T*>(a.b2)[c * H + h]);
  }

  // Hidden values of `count` positions, whose buckets (-1 at padding) and squeezed values (of an
  // entry) are given; 0 at padding.
  template <typename Squeezed>
  FEDPEFT_DEVICE void hide(A* hidden, int count, const int* bucket, const Squeezed& squeezed) {
    for (int i = int(threadIdx.x); i < count * S; i += int(blockDim.x)) {
      const int p = int(unsigned(i) / unsigned(S)), s = i - p * S;
      A sum = 0;
      if (bucket[p * H] >= 0) {
        sum = b1[s];
        for (int h = 0; h < H; ++h) sum += w1[s * row1 + h] * squeezed(p * H + h);
      }
      hidden[p * row2 + s] = sum > A(0) ? sum : A(0);
    }
  }
  FEDPEFT_DEVICE A gate(const A* hidden, int p, int h) const {
    A sum = b2[h];
#pragma unroll 4
    for (int s = 0; s < S; ++s) sum += w2[h * row2 + s] * hidden[p * row2 + s];
    return sigmoid(sum);
  }
};

// With SENet, all columns: means of rows, hidden values and gates, in shared memory too.
struct GatedStagedPlan {
  StagedPlan rows;
  int64_t gate, mean, hidden, net;
};

template <typename T, int V>
struct GatedEntries {
  using A = acc_t<T>;
  const HashLookupArgs& a;
  const Modulus& modulus;
  BlockNet<T> net;
  A *gate, *mean, *hidden;
  int width;

  FEDPEFT_DEVICE GatedEntries(const HashLookupArgs& a_, const Modulus& modulus_,
                              const GatedStagedPlan& plan, unsigned char* shared)
      : a(a_),
        modulus(modulus_),
        net(a_, shared + plan.net),
        gate(reinterpret_cast<A*>(shared + plan.gate)),
        mean(reinterpret_cast<A*>(shared + plan.mean)),
        hidden(reinterpret_cast<A*>(shared + plan.hidden)),
        width(plan.rows.width) {}
  FEDPEFT_DEVICE void start(int64_t client) { net.load(a, client); }
  FEDPEFT_DEVICE void find(int64_t n, int count, int* bucket) const {
    hash_entries<1>(a, modulus, n, count * int(a.H), bucket, nullptr);
  }
  FEDPEFT_DEVICE void ready(const T* rows, const int* bucket, int count, bool first) {
    const int H = int(a.H), M = int(a.M);
    const int lanes = lanes_for(width / V), groups = int(blockDim.x) / lanes;
    const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
    if (first) {
      for (int m = group; m - group < M; m += groups) {
        A sum = 0;
        if (m < M) {
          for (int column = lane * V; column < width; column += lanes * V) {
            Sum<A, V> v;
            v.set(rows + m * width + column);
#pragma unroll
            for (int i = 0; i < V; ++i) sum += v.at[i];
          }
        }
        sum = group_sum(sum, lanes);
        if (m < M && lane == 0) mean[m] = sum / A(width);
      }
      __syncthreads();
    }
    net.hide(hidden, count, bucket, [&](int e) { return mean[bucket[e]]; });
    __syncthreads();
    for (int e = int(threadIdx.x); e < count * H; e += int(blockDim.x)) {
      const int p = int(unsigned(e) / unsigned(H));
      gate[e] = net.gate(hidden, p, e - p * H);
    }
    __syncthreads();
  }
  FEDPEFT_DEVICE A scale(int e) const { return gate[e]; }
};

template <typename T, int V>
__global__ void __launch_bounds__(1024, 1)
    forward_staged_gated(HashLookupArgs a, Modulus modulus, GatedStagedPlan plan) {
  FEDPEFT_DYNAMIC_SHARED(shared);
  GatedEntries<T, V> source(a, modulus, plan, shared);
  sum_staged_rows<V, V == 1 ? 1 : 2, T>(row_sums(a), plan.rows, source, shared);
}

// With SENet; false where it does not pay, or shared memory does not hold a whole table.
template <typename T>
bool plan_gated_stage(const HashLookupArgs& a, int64_t clients, GatedStagedPlan* plan) {
  using A = acc_t<T>;
  if (!a.per_client || !StagedPlan::pays(a.positions, a.H, a.M, a.D)) return false;
  int64_t chunk = StagedPlan::chunk_of(a.positions, a.H);
  while (chunk > 1 && chunk * a.S > 8192) chunk = (chunk + 1) / 2;
  Carve carve;
  carve.take<T>(a.M * a.D);
  plan->rows.list = carve.take<int>(chunk * a.H);
  plan->gate = carve.take<A>(chunk * a.H);
  plan->mean = carve.take<A>(a.M);
  plan->hidden = carve.take<A>(chunk * (a.S | 1));
  plan->net = carve.take<A>(BlockNet<T>::size(a.H, a.S));
  plan->rows.bytes = carve.used;
  plan->rows.blocks = clients;
  plan->rows.slices = 1;
  plan->rows.width = int(a.D);
  plan->rows.chunk = int(chunk);
  // About 32 warps a multiprocessor, however many blocks fit.
  plan->rows.threads = carve.used > 100 * 1024 ? 1024 : carve.used > 40 * 1024 ? 512 : 256;
  return carve.used <= limits().shared_bytes;
}

// All gradients of a client by one block. Its first warp links the entries of each row while the
// others take the means of the rows that positions read and their products with the gradient; then
// the SENet, forward and backward; then each row's sum.
template <typename T, int V>
__global__ void __launch_bounds__(384, FEDPEFT_TWO_OR_THREE - 1)
    backward_whole(HashLookupArgs a, int64_t clients, Modulus modulus, WholePlan plan, T* out,
                   SENetOutputs<T> weights) {
  using A = acc_t<T>;
  FEDPEFT_DYNAMIC_SHARED(shared);
  T* staged = reinterpret_cast<T*>(shared + plan.grad);
  auto* coefficients = reinterpret_cast<Coefficients<A>*>(shared + plan.coefficients);
  A* squeezed = reinterpret_cast<A*>(shared + plan.squeezed);
  A* product = reinterpret_cast<A*>(shared + plan.product);  // then the gates' gradient
  A* hidden = reinterpret_cast<A*>(shared + plan.hidden);
  A* grad_hidden = reinterpret_cast<A*>(shared + plan.grad_hidden);
  A* partial = reinterpret_cast<A*>(shared + plan.partial);  // [strips, outputs], then a one
  int* head = reinterpret_cast<int*>(shared + plan.head);
  int* next = reinterpret_cast<int*>(shared + plan.next);
  int* bucket = reinterpret_cast<int*>(shared + plan.bucket);
  int* work = reinterpret_cast<int*>(shared + plan.work);
  BlockNet<T> net(a, shared + plan.net);
  const int H = net.H, S = net.S, M = int(a.M), P = int(a.positions), entries = P * H;
  const int outputs = 2 * S * H + S + H;
  const int thread = int(threadIdx.x), threads = int(blockDim.x), lanes = plan.lanes;
  const int lane = thread % lanes;

  for (int64_t client = blockIdx.x; client < clients; client += gridDim.x) {
    const T* rows = static_cast<const T*>(a.table) + client * a.M * a.D;
    const T* grad = static_cast<const T*>(a.grad) + client * P * a.D;
    net.load(a, client);
    for (int r = thread; r < M; r += threads) head[r] = -1;
    for (int i = thread; i < plan.strips * outputs; i += threads) partial[i] = A(0);
    if (thread == 0) {
      partial[plan.strips * outputs] = A(1);
      *work = 0;
    }
    hash_entries<4>(a, modulus, client * P, entries, bucket, next);
    __syncthreads();

    if (thread < kWarp) link_entries(head, M, next, entries, 0, 1);
    const int at_once = kWarp / lanes;
    for (;;) {
      int first = 0;
      if (thread % kWarp == 0) first = atomicAdd(work, at_once);
      first = __shfl_sync(kFullMask, first, 0);
      if (first >= P) break;
      const int p = first + thread % kWarp / lanes;
      const bool active = p < P && bucket[p * H] >= 0;
      for (int h = 0; h < H; h += 4) {
        A sums[8] = {};  // of four rows, then of their products
        if (active) {
          int64_t row[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) row[j] = bucket[p * H + (h + j < H ? h + j : H - 1)] * a.D;
          for (int64_t column = lane * V; column < a.D; column += lanes * V) {
            Pack<T, V> values[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = load_pack<V>(rows + row[j] + column);
            const Pack<T, V> g = load_pack<V>(grad + p * a.D + column);
            if (plan.staged && h == 0) store_pack<V>(staged + p * a.D + column, g);
#pragma unroll
            for (int i = 0; i < V; ++i) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const A x = to_acc(values[j].at[i]);
                sums[j] += x;
                sums[4 + j] += x * to_acc(g.at[i]);
              }
            }
          }
        }
        const A sum = sums_of_eight(sums, lane, lanes);
        const int to = h + (lane & 3);
        if (lane < 8 && p < P && to < H) {
          if (lane < 4) {
            squeezed[p * H + to] = sum / A(a.D);
          } else {
            product[p * H + to] = sum;
          }
        }
      }
    }
    __syncthreads();

    for (int first = 0; first < P; first += plan.chunk) {
      const int count = P - first < plan.chunk ? P - first : plan.chunk;
      const int entry = first * H;  // the chunk's first
      net.hide(hidden, count, bucket + entry, [&](int e) { return squeezed[entry + e]; });
      __syncthreads();
      for (int e = thread; e < count * H; e += threads) {
        const int p = int(unsigned(e) / unsigned(H));
        const A gate = net.gate(hidden, p, e - p * H);
        coefficients[entry + e].gate = gate;
        product[entry + e] =
            bucket[entry + e] >= 0 ? product[entry + e] * gate * (A(1) - gate) : A(0);
      }
      __syncthreads();
      for (int i = thread; i < count * S; i += threads) {
        const int p = int(unsigned(i) / unsigned(S)), s = i - p * S;
        A sum = 0;
        if (hidden[p * net.row2 + s] > A(0)) {
          for (int h = 0; h < H; ++h) sum += product[entry + p * H + h] * net.w2[h * net.row2 + s];
        }
        grad_hidden[p * net.row2 + s] = sum;
      }
      __syncthreads();
      for (int e = thread; e < count * H; e += threads) {
        const int p = int(unsigned(e) / unsigned(H)), h = e - p * H;
        A sum = 0;
#pragma unroll 4
        for (int s = 0; s < S; ++s) sum += grad_hidden[p * net.row2 + s] * net.w1[s * net.row1 + h];
        coefficients[entry + e].shift = sum / A(a.D);
      }
      // Output i of [w1 (S, H), b1 (S), w2 (H, S), b2 (H)] sums a product of two values a position.
      for (int task = thread; task < plan.strips * outputs; task += threads) {
        const int strip = int(unsigned(task) / unsigned(outputs));
        int i = task - strip * outputs;
        const A *x = partial + plan.strips * outputs, *y;
        int x_step = 0, y_step = H;
        if (i < S * H + S) {
          const int s = i < S * H ? int(unsigned(i) / unsigned(H)) : i - S * H;
          y = grad_hidden + s;
          y_step = net.row2;
          if (i < S * H) {
            x = squeezed + entry + i - s * H;
            x_step = H;
          }
        } else {
          i -= S * H + S;
          const int h = i < H * S ? int(unsigned(i) / unsigned(S)) : i - H * S;
          y = product + entry + h;
          if (i < H * S) {
            x = hidden + i - h * S;
            x_step = net.row2;
          }
        }
        A sum = partial[task];
#pragma unroll 4
        for (int p = strip; p < count; p += plan.strips) sum += x[p * x_step] * y[p * y_step];
        partial[task] = sum;
      }
      __syncthreads();
    }

    for (int i = thread; i < outputs; i += threads) {
      A sum = 0;
      for (int strip = 0; strip < plan.strips; ++strip) sum += partial[strip * outputs + i];
      *weights(client, i) = from_acc<T>(sum);
    }
    sum_rows<V>(out + client * a.M * a.D, plan.staged ? staged : grad, a, head, next, lanes,
                [&](int e) { return coefficients[e]; });
    __syncthreads();
  }
}

// False where shared memory does not hold it.
template <typename T, int V>
bool plan_whole(const HashLookupArgs& a, WholePlan* plan) {
  using A = acc_t<T>;
  const int64_t entries = a.positions * a.H, outputs = a.senet_size();
  int64_t chunk = a.positions < 64 ? a.positions : 64;
  while (chunk > 1 && chunk * a.S > 4096) chunk = (chunk + 1) / 2;
  int strips = 1;
  while (strips < 8 && strips * outputs < 1024) strips *= 2;
  Carve carve;
  plan->coefficients = carve.take<A>(2 * entries);
  plan->squeezed = carve.take<A>(entries);
  plan->product = carve.take<A>(entries);
  plan->net = carve.take<A>(BlockNet<T>::size(a.H, a.S));
  plan->hidden = carve.take<A>(chunk * (a.S | 1));
  plan->grad_hidden = carve.take<A>(chunk * (a.S | 1));
  plan->partial = carve.take<A>(strips * outputs + 1);
  plan->head = carve.take<int>(a.M);
  plan->next = carve.take<int>(entries);
  plan->bucket = carve.take<int>(entries);
  plan->work = carve.take<int>(1);
  stage_gradient<T>(a, &carve, plan);
  plan->chunk = int(chunk);
  plan->strips = strips;
  const int lanes = lanes_for(a.D / V);
  plan->lanes = lanes < 8 ? 8 : lanes;
  plan->threads = carve.used > 72 * 1024 ? 384 : 256;
  return carve.used <= limits().shared_bytes;
}

}  // namespace
}  // namespace fedpeft::gpu
