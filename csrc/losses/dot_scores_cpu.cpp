// CPU kernels of dot_scores. A score's order of summation depends on D alone; the user's gradient
// is summed over positions in order, fixed blocks of them apart.
#include "losses/dot_scores_cpu.h"

#include "common/vec.h"

namespace fedpeft::FEDPEFT_ISA {
namespace {

// Calls run(client, first, last) with the positions of work item `item`.
template <typename Run>
FEDPEFT_INLINE void for_items(const DotScoresArgs& a, int64_t begin, int64_t end, const Run& run) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t client = item / a.blocks, first = (item % a.blocks) * kScoreBlock;
    run(client, first, first + kScoreBlock < a.positions ? first + kScoreBlock : a.positions);
  }
}

template <typename T, int64_t width>
FEDPEFT_INLINE void forward_as(DotScoresArgs a, Fixed<width>, int64_t begin, int64_t end) {
  const int64_t D = Fixed<width>::or_else(a.D);
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    const T* vectors = static_cast<const T*>(a.vectors) + client * a.positions * D;
    const T* user = static_cast<const T*>(a.user) + client * D;
    T* out = static_cast<T*>(a.out) + client * a.positions;
    for (int64_t p = first; p < last; ++p) from_acc(dot(vectors + p * D, user, D), out + p);
  });
}

template <typename T>
void forward(const DotScoresArgs& a, int64_t begin, int64_t end) {
  with_fixed_width<T>(a.D, [&](auto width) { forward_as<T>(a, width, begin, end); });
}

template <typename T, int64_t width>
FEDPEFT_INLINE void backward_as(DotScoresArgs a, Fixed<width>, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  constexpr int64_t N = kLanes<A>;
  const int64_t D = Fixed<width>::or_else(a.D);
  for_items(a, begin, end, [&](int64_t client, int64_t first, int64_t last) {
    const T* vectors = static_cast<const T*>(a.vectors) + (client * a.positions + first) * D;
    const T* user = static_cast<const T*>(a.user) + client * D;
    const T* grad = static_cast<const T*>(a.grad) + client * a.positions + first;
    T* grad_vectors = static_cast<T*>(a.grad_vectors) + (client * a.positions + first) * D;
    A* partial = static_cast<A*>(a.partial) + (client * a.blocks + first / kScoreBlock) * D;
    const int64_t whole = D - D % N;
    for (int64_t p = 0; p < last - first; ++p) {
      const A g = to_acc(grad[p]);
      T* out = grad_vectors + p * D;
      for (int64_t d = 0; d < whole; d += N) store(out + d, g * load(user + d));
      for (int64_t d = whole; d < D; ++d) from_acc(g * to_acc(user[d]), out + d);
    }
    sum_rows<true>(
        partial, static_cast<const A*>(nullptr), D, last - first,
        [&](int64_t p) { return vectors + p * D; }, [&](int64_t p) { return to_acc(grad[p]); });
  });
}

template <typename T>
void backward(const DotScoresArgs& a, int64_t begin, int64_t end) {
  with_fixed_width<T>(a.D, [&](auto width) { backward_as<T>(a, width, begin, end); });
}

template <typename T>
void backward_user(const DotScoresArgs& a, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  for (int64_t client = begin; client < end; ++client) {
    const A* partial = static_cast<const A*>(a.partial) + client * a.blocks * a.D;
    sum_rows<false>(
        static_cast<T*>(a.grad_user) + client * a.D, static_cast<const T*>(nullptr), a.D, a.blocks,
        [&](int64_t b) { return partial + b * a.D; }, [](int64_t) { return A(1); });
  }
}

}  // namespace

const DotScoresKernels dot_scores_kernels = {
    {forward<float>, forward<double>, forward<Half>, forward<BFloat16>},
    {backward<float>, backward<double>, backward<Half>, backward<BFloat16>},
    {backward_user<float>, backward_user<double>, backward_user<Half>, backward_user<BFloat16>},
};

}  // namespace fedpeft::FEDPEFT_ISA
