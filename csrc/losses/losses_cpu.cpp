// CPU kernels of bpr_loss and bce_loss: chunks of positions through branch-free element loops,
// which the compiler vectorizes.
#include "losses/losses_cpu.h"

#include "common/logistic.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kFill =
    16;  // a chunk is filled up to a multiple of this, so that loops are whole vectors
static_assert(kLossBlock % kChunk == 0 && kChunk % kFill == 0 && kFill % kLossLanes == 0);

FEDPEFT_INLINE int64_t filled(int64_t count) { return (count + kFill - 1) / kFill * kFill; }

template <typename Item>
FEDPEFT_INLINE void mark_items(const Item* items, int64_t count, int32_t* valid) {
  for (int64_t i = 0; i < count; ++i) valid[i] = items[i] != -1;
  for (int64_t i = count; i < filled(count); ++i) valid[i] = 0;
}

FEDPEFT_INLINE int64_t sum_of(const int32_t* valid, int64_t count) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += valid[i];
  return total;
}

// Positions [at, at + count) of all clients' in a row: several short clients, or a part of one.
template <typename A>
struct Chunk {
  A positive[kChunk], negative[kChunk];
  int32_t valid[kChunk];  // 1: a position with an item

  FEDPEFT_INLINE void mark(const LossArgs& a, int64_t at, int64_t count) {
    if (a.items.bytes == 8) {
      mark_items(static_cast<const int64_t*>(a.items.data) + at, count, valid);
    } else {
      mark_items(static_cast<const int32_t*>(a.items.data) + at, count, valid);
    }
  }
  template <typename T>
  FEDPEFT_INLINE void load(const void* from, int64_t at, int64_t count, A* to) const {
    const T* values = static_cast<const T*>(from) + at;
    for (int64_t i = 0; i < count; ++i) to[i] = to_acc(values[i]);
    for (int64_t i = count; i < filled(count); ++i) to[i] = 0;
  }
  template <typename T>
  FEDPEFT_INLINE void load(const LossArgs& a, int64_t at, int64_t count) {
    mark(a, at, count);
    load<T>(a.positive, at, count, positive);
    load<T>(a.negative, at, count, negative);
  }
};

// Calls chunk(at, count, item, items) for the positions of work items [begin, end): `items` whole
// ones from `item` on, or a part of one (items = 1).
template <typename EachChunk>
FEDPEFT_INLINE void for_chunks(const LossArgs& a, int64_t begin, int64_t end,
                               const EachChunk& chunk) {
  const int64_t P = a.positions;
  if (P > 0 && P <= kChunk / 2) {
    const int64_t together = kChunk / P;
    for (int64_t item = begin; item < end; item += together) {
      const int64_t items = end - item < together ? end - item : together;
      chunk(item * P, items * P, item, items);
    }
    return;
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t client = item / a.blocks, first = (item % a.blocks) * kLossBlock;
    const int64_t last = first + kLossBlock < P ? first + kLossBlock : P;
    for (int64_t p = first; p < last; p += kChunk) {
      chunk(client * P + p, last - p < kChunk ? last - p : kChunk, item, 1);
    }
  }
}

// A client's terms of the sum go into lanes by their position, in order.
struct Lanes {
  double sums[kLossLanes] = {};

  FEDPEFT_INLINE void add(const double* terms, int64_t count) {
    int64_t i = 0;
    for (; i + kLossLanes <= count; i += kLossLanes) {
      for (int64_t j = 0; j < kLossLanes; ++j) sums[j] += terms[i + j];
    }
    for (int64_t j = 0; i + j < count; ++j) sums[j] += terms[i + j];
  }
  FEDPEFT_INLINE double total() const {
    double lanes[kLossLanes];
    for (int64_t j = 0; j < kLossLanes; ++j) lanes[j] = sums[j];
    for (int64_t width = kLossLanes / 2; width > 0; width /= 2) {
      for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    return lanes[0];
  }
};

template <bool Bpr, typename T>
void forward(const LossArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  Lanes lanes;  // of the work item before
  int64_t summed = -1, counted = 0;
  const auto finish = [&] {
    if (summed < 0) return;
    a.sums[summed] = lanes.total();
    a.counts[summed] = counted;
  };
  for (int64_t item = begin; item < end; ++item) a.sums[item] = 0, a.counts[item] = 0;
  for_chunks(a, begin, end, [&](int64_t at, int64_t count, int64_t item, int64_t items) {
    Chunk<A> chunk;
    chunk.template load<T>(a, at, count);
    double terms[kChunk];
    for (int64_t i = 0; i < filled(count); ++i) {
      // Padding may hold anything, NaN too.
      const A x = chunk.valid[i] ? chunk.positive[i] : A(0);
      const A y = chunk.valid[i] ? chunk.negative[i] : A(0);
      const A term = Bpr ? softplus(y - x) : softplus(-x) + softplus(y);
      terms[i] = chunk.valid[i] ? double(term) : 0.0;
    }
    const int64_t each = count / items;
    for (int64_t k = 0; k < items; ++k) {
      if (item + k != summed) {
        finish();
        lanes = Lanes{};
        summed = item + k;
        counted = 0;
      }
      lanes.add(terms + k * each, each);
      counted += sum_of(chunk.valid + k * each, each);
    }
  });
  finish();
}

template <bool Bpr, typename T>
void backward(const LossArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for_chunks(a, begin, end, [&](int64_t at, int64_t count, int64_t item, int64_t items) {
    Chunk<A> chunk;
    chunk.template load<T>(a, at, count);
    A scale[kChunk];
    const int64_t each = count / items;
    for (int64_t k = 0; k < items; ++k) {
      const A of_client = A(a.scale[(item + k) / a.blocks]);
      for (int64_t i = 0; i < each; ++i) scale[k * each + i] = of_client;
    }
    for (int64_t i = count; i < filled(count); ++i) scale[i] = 0;
    for (int64_t i = 0; i < filled(count); ++i) {
      const A x = chunk.positive[i], y = chunk.negative[i];
      const A up = scale[i] * (Bpr ? sigmoid(y - x) : sigmoid(-x));
      const A down = Bpr ? up : scale[i] * sigmoid(y);
      chunk.positive[i] = chunk.valid[i] ? -up : A(0);
      chunk.negative[i] = chunk.valid[i] ? down : A(0);
    }
    T* grad_positive = static_cast<T*>(a.grad_positive) + at;
    T* grad_negative = static_cast<T*>(a.grad_negative) + at;
    for (int64_t i = 0; i < count; ++i) from_acc(chunk.positive[i], grad_positive + i);
    for (int64_t i = 0; i < count; ++i) from_acc(chunk.negative[i], grad_negative + i);
  });
}

void count_items(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) a.counts[item] = 0;
  for_chunks(a, begin, end, [&](int64_t at, int64_t count, int64_t item, int64_t items) {
    Chunk<float> chunk;
    chunk.mark(a, at, count);
    const int64_t each = count / items;
    for (int64_t k = 0; k < items; ++k) a.counts[item + k] += sum_of(chunk.valid + k * each, each);
  });
}

}  // namespace

const LossKernels loss_kernels = {
    {forward<true, float>, forward<true, double>, forward<true, Half>, forward<true, BFloat16>},
    {forward<false, float>, forward<false, double>, forward<false, Half>, forward<false, BFloat16>},
    {backward<true, float>, backward<true, double>, backward<true, Half>, backward<true, BFloat16>},
    {backward<false, float>, backward<false, double>, backward<false, Half>,
     backward<false, BFloat16>},
    count_items,
};

}  // namespace fedpeft::FEDPEFT_ISA
