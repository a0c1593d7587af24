// Torch-free views of arguments: element types, index arrays and the error slot that kernels report
// into.
#pragma once

#include <cstdint>

// Kernels inline everything: an out-of-line copy shared between instruction sets could carry
// instructions that the processor lacks.
#if defined(__CUDACC__)
#define FEDPEFT_HD __host__ __device__
#else
#define FEDPEFT_HD
#endif
#define FEDPEFT_INLINE inline __attribute__((always_inline))

namespace fedpeft {

enum class DType : int { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
constexpr int kDTypes = 4;
constexpr int element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Storage of the 16-bit types.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Integer array of int64, int32, int16 or uint8 (bytes = 8, 4, 2, 1).
struct IndexArray {
  const void* data = nullptr;
  int bytes = 8;

  FEDPEFT_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(static_cast<const char*>(data) + i * bytes);
  }
  FEDPEFT_HD FEDPEFT_INLINE int64_t operator[](int64_t i) const {
    switch (bytes) {
      case 8:
        return static_cast<const int64_t*>(data)[i];
      case 4:
        return static_cast<const int32_t*>(data)[i];
      case 2:
        return static_cast<const int16_t*>(data)[i];
      default:
        return static_cast<const uint8_t*>(data)[i];
    }
  }
};

// Smallest flat position at which a check failed, over all threads.
struct FirstError {
  int64_t position = INT64_MAX;

  FEDPEFT_INLINE void report(int64_t at) {
    int64_t seen = __atomic_load_n(&position, __ATOMIC_RELAXED);
    while (at < seen && !__atomic_compare_exchange_n(&position, &seen, at, true, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
    }
  }
  FEDPEFT_INLINE bool any() const { return position != INT64_MAX; }
};

// A check on an index: -1 is padding, anything else must lie in [0, size).
enum class Position { item, padding, bad };
FEDPEFT_HD FEDPEFT_INLINE Position classify(int64_t index, int64_t size) {
  if (uint64_t(index) < uint64_t(size)) return Position::item;
  return index == -1 ? Position::padding : Position::bad;
}

}  // namespace fedpeft
