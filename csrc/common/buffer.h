// Scratch memory of a task for numbers of any type, aligned for whole vectors and cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace fedpeft {

constexpr int64_t kBufferAlignment = 64;  // bytes

struct FreeBuffer {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t{kBufferAlignment}); }
};
using Buffer = std::unique_ptr<void, FreeBuffer>;

[[maybe_unused]] inline Buffer aligned_buffer(int64_t bytes) {
  return Buffer(::operator new(size_t(bytes), std::align_val_t{kBufferAlignment}));
}

}  // namespace fedpeft
