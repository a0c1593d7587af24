// CPU kernels of bpr_loss and bce_loss: chunks of positions through branch-free element loops,
// which the compiler vectorizes.
#include "losses/losses_cpu.h"

#include "common/logistic.h"
#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kFill =
    16;  // a chunk is filled up to a multiple of this, so that loops are whole vectors
static_assert(kLossBlock % kChunk == 0 && kChunk % kFill == 0 && kFill % kLossLanes == 0);

FEDPEFT_INLINE int64_t filled(int64_t count) { return (count + kFill - 1) / kFill * kFill; }

template <typename T>
FEDPEFT_INLINE void load_chunk(const T* from, int64_t count, acc_t<T>* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_acc(from[i]);
  for (int64_t i = count; i < filled(count); ++i) to[i] = 0;
}

template <typename Item>
FEDPEFT_INLINE int64_t mark_items(const Item* items, int64_t count, int32_t* valid) {
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    valid[i] = items[i] != -1;
    total += valid[i];
  }
  for (int64_t i = count; i < filled(count); ++i) valid[i] = 0;
  return total;
}

// Marks the positions with an item and returns their number.
FEDPEFT_INLINE int64_t mark_items(const LossArgs& a, int64_t at, int64_t count, int32_t* valid) {
  return a.items.bytes == 8
             ? mark_items(static_cast<const int64_t*>(a.items.data) + at, count, valid)
             : mark_items(static_cast<const int32_t*>(a.items.data) + at, count, valid);
}

// Calls chunk(at, count) for every chunk of work item `item`.
template <typename Chunk>
FEDPEFT_INLINE void for_chunks(const LossArgs& a, int64_t item, const Chunk& chunk) {
  const int64_t client = item / a.blocks, first = (item % a.blocks) * kLossBlock;
  const int64_t last = first + kLossBlock < a.positions ? first + kLossBlock : a.positions;
  for (int64_t p = first; p < last; p += kChunk) {
    chunk(client * a.positions + p, last - p < kChunk ? last - p : kChunk);
  }
}

template <bool Bpr, typename T>
void forward(const LossArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t item = begin; item < end; ++item) {
    double lanes[kLossLanes] = {};
    int64_t count_all = 0;
    for_chunks(a, item, [&](int64_t at, int64_t count) {
      A positive[kChunk], negative[kChunk];
      int32_t valid[kChunk];
      const int64_t with_item = mark_items(a, at, count, valid);
      if (with_item == 0) return;
      count_all += with_item;
      load_chunk(static_cast<const T*>(a.positive) + at, count, positive);
      load_chunk(static_cast<const T*>(a.negative) + at, count, negative);
      double terms[kChunk];
      for (int64_t i = 0; i < filled(count); ++i) {
        // Padding may hold anything, NaN too.
        const A x = valid[i] ? positive[i] : A(0), y = valid[i] ? negative[i] : A(0);
        const A term = Bpr ? softplus(y - x) : softplus(-x) + softplus(y);
        terms[i] = valid[i] ? double(term) : 0.0;
      }
      for (int64_t i = 0; i < filled(count); i += kLossLanes) {
        for (int64_t j = 0; j < kLossLanes; ++j) lanes[j] += terms[i + j];
      }
    });
    for (int64_t width = kLossLanes / 2; width > 0; width /= 2) {
      for (int64_t j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    }
    a.sums[item] = lanes[0];
    a.counts[item] = count_all;
  }
}

template <bool Bpr, typename T>
void backward(const LossArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t item = begin; item < end; ++item) {
    const A scale = A(a.scale[item / a.blocks]);
    for_chunks(a, item, [&](int64_t at, int64_t count) {
      A positive[kChunk], negative[kChunk];
      int32_t valid[kChunk];
      mark_items(a, at, count, valid);
      load_chunk(static_cast<const T*>(a.positive) + at, count, positive);
      load_chunk(static_cast<const T*>(a.negative) + at, count, negative);
      for (int64_t i = 0; i < filled(count); ++i) {
        const A x = positive[i], y = negative[i];
        const A up = scale * (Bpr ? sigmoid(y - x) : sigmoid(-x));
        const A down = Bpr ? up : scale * sigmoid(y);
        positive[i] = valid[i] ? -up : A(0);
        negative[i] = valid[i] ? down : A(0);
      }
      T* grad_positive = static_cast<T*>(a.grad_positive) + at;
      T* grad_negative = static_cast<T*>(a.grad_negative) + at;
      for (int64_t i = 0; i < count; ++i) from_acc(positive[i], grad_positive + i);
      for (int64_t i = 0; i < count; ++i) from_acc(negative[i], grad_negative + i);
    });
  }
}

void count_items(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    int64_t total = 0;
    for_chunks(a, item, [&](int64_t at, int64_t count) {
      int32_t valid[kChunk];
      total += mark_items(a, at, count, valid);
    });
    a.counts[item] = total;
  }
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
