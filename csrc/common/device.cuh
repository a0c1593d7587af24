// Device helpers of the .cu files: element types, 16-byte vectors, groups of lanes, 64-bit index
// arithmetic.
#pragma once

#include <bit>

#if !defined(__CUDACC__)
#include "common/half.h"
#endif
#include "common/launch.h"

namespace fedpeft::gpu {

#define FEDPEFT_DEVICE __device__ __forceinline__

// Blocks that a multiprocessor must have registers for, of kernels whose many loads just fit for
// three on a Hopper; compilers for other architectures would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
#define FEDPEFT_TWO_OR_THREE 2
#else
#define FEDPEFT_TWO_OR_THREE 3
#endif

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

FEDPEFT_DEVICE float to_acc(float x) { return x; }
FEDPEFT_DEVICE double to_acc(double x) { return x; }
FEDPEFT_DEVICE float to_acc(Half x) {
#if defined(__CUDACC__)
  return __half2float(__ushort_as_half(x.bits));
#else
  return half_to_float(x.bits);
#endif
}
FEDPEFT_DEVICE float to_acc(BFloat16 x) {
#if defined(__CUDACC__)
  return __uint_as_float(uint32_t(x.bits) << 16);
#else
  return std::bit_cast<float>(uint32_t(x.bits) << 16);
#endif
}

template <typename T>
FEDPEFT_DEVICE T from_acc(acc_t<T> x) {
  return x;
}
template <>
FEDPEFT_DEVICE Half from_acc<Half>(float x) {
#if defined(__CUDACC__)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  return {float_to_half(x)};
#endif
}
template <>
FEDPEFT_DEVICE BFloat16 from_acc<BFloat16>(float x) {
#if defined(__CUDACC__)
  const uint32_t bits = __float_as_uint(x);
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
#endif
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}

// V consecutive elements; sizeof(Pack) is 16 bytes where V is kWide<T>.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T at[V];
};

template <typename T>
constexpr int kWide = 16 / int(sizeof(T));

template <typename T, int V>
FEDPEFT_DEVICE void check_aligned([[maybe_unused]] const T* p) {
#if !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, V>))
    throw emulator::Fault("misaligned vector access");
#endif
}

template <int V, typename T>
FEDPEFT_DEVICE Pack<T, V> load_pack(const T* p) {
  check_aligned<T, V>(p);
  if constexpr (V == 1) {
    return {{*p}};
  } else {
#if defined(__CUDACC__)
    Pack<T, V> pack;
    if constexpr (sizeof(pack) == 16) {
      *reinterpret_cast<uint4*>(&pack) = *reinterpret_cast<const uint4*>(p);
    } else {
      pack = *reinterpret_cast<const Pack<T, V>*>(p);
    }
    return pack;
#else
    Pack<T, V> pack;
    std::memcpy(&pack, p, sizeof(pack));
    return pack;
#endif
  }
}

template <int V, typename T>
FEDPEFT_DEVICE Pack<T, V> zero_pack() {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(acc_t<T>(0));
  return pack;
}

template <int V, typename T>
FEDPEFT_DEVICE void store_pack(T* p, const Pack<T, V>& pack) {
  check_aligned<T, V>(p);
  if constexpr (V == 1) {
    *p = pack.at[0];
  } else {
#if defined(__CUDACC__)
    if constexpr (sizeof(pack) == 16) {
      *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&pack);
    } else {
      *reinterpret_cast<Pack<T, V>*>(p) = pack;
    }
#else
    std::memcpy(static_cast<void*>(p), &pack, sizeof(pack));
#endif
  }
}

// As store_pack, by one instruction, which compilers may cut into one an element: to global memory,
// or, with `Anywhere`, to that or shared memory.
template <int V, bool Anywhere = false, typename T>
FEDPEFT_DEVICE void store_whole_pack(T* p, const Pack<T, V>& pack) {
#if defined(__CUDACC__)
  if constexpr (V > 1 && sizeof(pack) == 16) {
    const uint4 x = *reinterpret_cast<const uint4*>(&pack);
    if constexpr (Anywhere) {
      asm volatile("st.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z),
                   "r"(x.w)
                   : "memory");
    } else {
      __stwb(reinterpret_cast<uint4*>(p), x);
    }
    return;
  }
  if constexpr (V > 1 && sizeof(pack) == 8 && !Anywhere) {
    __stwb(reinterpret_cast<uint2*>(p), *reinterpret_cast<const uint2*>(&pack));
    return;
  }
#else
  if constexpr (!Anywhere) emulator::check_global(p);
#endif
  store_pack<V>(p, pack);
}

// For what the kernel does not read again: leaves tables in the caches.
template <int V, typename T>
FEDPEFT_DEVICE void store_pack_once(T* p, const Pack<T, V>& pack) {
#if defined(__CUDACC__)
  if constexpr (sizeof(pack) == 16) {
    __stcs(reinterpret_cast<uint4*>(p), *reinterpret_cast<const uint4*>(&pack));
    return;
  }
#else
  emulator::check_global(p);
#endif
  store_pack<V>(p, pack);
}

// Asks for `bytes` from p on to be in L2 soon; the `threads` threads share the work.
FEDPEFT_DEVICE void ask_ahead([[maybe_unused]] const void* p, [[maybe_unused]] int64_t bytes,
                              [[maybe_unused]] int thread, [[maybe_unused]] int threads) {
#if defined(__CUDACC__)
  constexpr int kLine = 128;
  const char* from = static_cast<const char*>(p);
#pragma unroll 1
  for (int64_t at = int64_t(thread) * kLine; at < bytes; at += int64_t(threads) * kLine)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
#else
  if (bytes > 0) emulator::check_global(p);
#endif
}

// Loads from several places that are under way together: a[at[i]], or -1 where at[i] is negative.
template <int N>
FEDPEFT_DEVICE void gather(const IndexArray& a, const int64_t (&at)[N], int64_t (&to)[N]) {
  const auto load = [&](const auto* data) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = at[i] >= 0 ? int64_t(data[at[i]]) : int64_t{-1};
  };
  switch (a.bytes) {
    case 8:
      return load(static_cast<const int64_t*>(a.data));
    case 4:
      return load(static_cast<const int32_t*>(a.data));
    case 2:
      return load(static_cast<const int16_t*>(a.data));
    default:
      return load(static_cast<const uint8_t*>(a.data));
  }
}

// The calling thread's number, as one of which the compiler knows little: what depends on it is
// made where it is used, not before the loops around, where it would hold registers all along. What
// follows takes it as its last argument.
FEDPEFT_DEVICE int opaque_thread() {
  int thread = int(threadIdx.x);
#if defined(__CUDACC__)
  asm volatile("" : "+r"(thread));
  __builtin_assume(thread >= 0 && thread < 1024);
#endif
  return thread;
}

// An index on its way from memory, which nothing waits for before it is used: a conversion, or the
// end of a branch, would.
struct Late {
  uint32_t low, high;

  // The integer of 4 or 8 bytes at p, -1 unless `there`.
  FEDPEFT_DEVICE void load(const char* p, int bytes, bool there) {
#if defined(__CUDACC__)
    asm volatile(
        "{\n\t.reg .pred four, eight;\n\t"
        "setp.eq.s32 four, %3, 4;\n\tsetp.eq.s32 eight, %3, 8;\n\t"
        "mov.b32 %0, -1;\n\tmov.b32 %1, -1;\n\t"
        "@four ld.global.u32 %0, [%2];\n\t@eight ld.global.v2.u32 {%0, %1}, [%2];\n\t}"
        : "=&r"(low), "=&r"(high)
        : "l"(__cvta_generic_to_global(p)), "r"(there ? bytes : 0));
#else
    if (there) emulator::check_global(p);
    const int64_t value = there ? IndexArray{p, bytes}[0] : -1;
    low = uint32_t(value);
    high = uint32_t(value >> 32);
#endif
  }
  FEDPEFT_DEVICE void load(const IndexArray& a, int64_t at, bool there) {
    load(static_cast<const char*>(a.data) + at * a.bytes, a.bytes, there);
  }
  // The same of 1 (unsigned), 2, 4 or 8 bytes.
  FEDPEFT_DEVICE void load_any(const IndexArray& a, int64_t at, bool there) {
    load(a, at, there);
#if defined(__CUDACC__)
    asm volatile(
        "{\n\t.reg .pred one, two;\n\t"
        "setp.eq.s32 one, %2, 1;\n\tsetp.eq.s32 two, %2, 2;\n\t"
        "@one ld.global.u8 %0, [%1];\n\t@two ld.global.s16 %0, [%1];\n\t}"
        : "+&r"(low)
        : "l"(__cvta_generic_to_global(static_cast<const char*>(a.data) + at * a.bytes)),
          "r"(there ? a.bytes : 0));
#endif
  }
  FEDPEFT_DEVICE int64_t come(int bytes) const {
    return bytes == 8 ? int64_t(uint64_t(high) << 32 | low) : int64_t(int32_t(low));
  }
};

// Registers of the accumulator type for V columns.
template <typename A, int V>
struct Sum {
  A at[V];

  FEDPEFT_DEVICE void clear() {
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] = A(0);
  }
  template <typename T>
  FEDPEFT_DEVICE void set(const T* p) {
    const Pack<T, V> pack = load_pack<V>(p);
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] = to_acc(pack.at[v]);
  }
  template <typename T>
  FEDPEFT_DEVICE void set(const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] = to_acc(pack.at[v]);
  }
  FEDPEFT_DEVICE void add(const Sum& other) {
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] += other.at[v];
  }
  template <typename T>
  FEDPEFT_DEVICE void add(const T* p) {
    const Pack<T, V> pack = load_pack<V>(p);
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] += to_acc(pack.at[v]);
  }
  template <typename T>
  FEDPEFT_DEVICE void add(const Pack<T, V>& pack) {
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] += to_acc(pack.at[v]);
  }
  template <typename T>
  FEDPEFT_DEVICE void add_scaled(A scale, const T* p) {
    const Pack<T, V> pack = load_pack<V>(p);
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] += scale * to_acc(pack.at[v]);
  }
  FEDPEFT_DEVICE void scale(A factor) {
#pragma unroll
    for (int v = 0; v < V; ++v) at[v] *= factor;
  }
  // To global memory, or, with `Anywhere`, to that or shared memory.
  template <bool Anywhere = false, typename T>
  FEDPEFT_DEVICE void store(T* p) const {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(at[v]);
    store_whole_pack<V, Anywhere>(p, pack);
  }
  template <typename T>
  FEDPEFT_DEVICE void store_once(T* p) const {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) pack.at[v] = from_acc<T>(at[v]);
    store_pack_once<V>(p, pack);
  }
  // To `first` unless it is null, else to `second`.
  template <typename T>
  FEDPEFT_DEVICE void store_either(A* first, T* second) const {
    if (first) {
      store(first);
    } else {
      store(second);
    }
  }
};

template <int V, typename T>
FEDPEFT_DEVICE void store_zeros(T* p) {
  Sum<acc_t<T>, V> zero;
  zero.clear();
  zero.store(p);
}

// n / d; 32-bit where that is enough, several times as fast.
FEDPEFT_DEVICE int64_t divide(int64_t n, int64_t d) {
  if (((uint64_t(n) | uint64_t(d)) >> 32) == 0) return int64_t(uint32_t(n) / uint32_t(d));
  return n / d;
}

// Sums over the `width` lanes (a power of two) of each group, the same in every lane and in a fixed
// order; several at once.
template <typename A, int N>
FEDPEFT_DEVICE void group_sums(A (&x)[N], int width) {
  for (int bits = width / 2; bits > 0; bits /= 2) {
#pragma unroll
    for (int u = 0; u < N; ++u) x[u] += __shfl_xor_sync(kFullMask, x[u], bits);
  }
}
template <typename A>
FEDPEFT_DEVICE A group_sum(A x, int width) {
  A sum[] = {x};
  group_sums(sum, width);
  return sum[0];
}

// Sums over a group of at least 8 lanes of eight values: lane i gets that of x[i % 8], by exchanges
// that halve the numbers a lane has.
template <typename A>
FEDPEFT_DEVICE A sums_of_eight(A (&x)[8], int lane, int lanes) {
#pragma unroll
  for (int bit = 4; bit > 0; bit /= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int j = 0; j < bit; ++j) {
      const A keep = upper ? x[j + bit] : x[j], give = upper ? x[j] : x[j + bit];
      x[j] = keep + __shfl_xor_sync(kFullMask, give, bit);
    }
  }
  A sum = x[0];
  for (int bit = 8; bit < lanes; bit *= 2) sum += __shfl_xor_sync(kFullMask, sum, bit);
  return sum;
}

// The lanes of the warp whose key has the calling lane's bit, at a mask of that one.
template <int Bit>
FEDPEFT_DEVICE unsigned lanes_alike_in(int key) {
#if defined(__CUDACC__)
  unsigned votes;  // four instructions, of which a compiler makes twice as many
  asm volatile(
      "{\n\t.reg .pred set;\n\t.reg .b32 bit;\n\t"
      "and.b32 bit, %1, %2;\n\tsetp.ne.u32 set, bit, 0;\n\t"
      "vote.sync.ballot.b32 %0, set, 0xffffffff;\n\t@!set not.b32 %0, %0;\n\t}"
      : "=r"(votes)
      : "r"(key), "n"(Bit));
  return votes;
#else
  const unsigned votes = __ballot_sync(kFullMask, key & Bit);
  return key & Bit ? votes : ~votes;
#endif
}

// The lanes of the warp whose keys are the calling lane's, for N keys a lane, each of its lowest
// `bits` bits alone; negative keys are nobody's, and what they get means nothing. By a vote a bit:
// __match_any_sync takes hundreds of clocks where most keys differ.
template <int N>
FEDPEFT_DEVICE void lanes_alike(int (&key)[N], int bits, unsigned (&alike)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) alike[i] = __ballot_sync(kFullMask, key[i] >= 0);
#pragma unroll 1
  for (; bits > 0; bits -= 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      alike[i] &= lanes_alike_in<1>(key[i]) & lanes_alike_in<2>(key[i]) &
                  lanes_alike_in<4>(key[i]) & lanes_alike_in<8>(key[i]);
      key[i] >>= 4;
    }
  }
}

// Bits of the numbers below n, which is positive.
FEDPEFT_HD inline int bits_of(int n) {
#if defined(__CUDA_ARCH__)
  return 32 - __clz(n - 1);
#else
  return int(std::bit_width(unsigned(n - 1)));
#endif
}

// Lanes that share a row of `columns` items: a power of two up to a warp.
__host__ __device__ inline int lanes_for(int64_t columns) {
  int lanes = 1;
  while (lanes < kWarp && lanes < columns) lanes *= 2;
  return lanes;
}

// Calls f(n, lane, lanes) for rows n in [0, total) of `columns` accesses each, a group of lanes a
// row. For kernels that launch_rows launches; lanes of a warp may be at different rows, or done.
template <typename F>
FEDPEFT_DEVICE void for_rows(int64_t total, int64_t columns, const F& f) {
  const int lanes = lanes_for(columns), groups = int(blockDim.x) / lanes;
  for (int64_t n = int64_t(blockIdx.x) * groups + threadIdx.x / lanes; n < total;
       n += int64_t(gridDim.x) * groups)
    f(n, int(threadIdx.x) % lanes, lanes);
}

template <typename... Params, typename... Args>
void launch_rows(void (*kernel)(Params...), int64_t total, int64_t columns, Stream stream,
                 Args&&... args) {
  constexpr int kThreads = 256;
  const int groups = kThreads / lanes_for(columns);
  launch(kernel, (total + groups - 1) / groups, kThreads, 0, stream, std::forward<Args>(args)...);
}

// Rows that a group takes at once, so that their loads are under way together; as many as keep
// their sums in few registers.
template <typename T, int V>
constexpr int kAtOnce = V > 4 || V* int(sizeof(acc_t<T>)) * int(sizeof(acc_t<T>)) > 64 ? 2 : 4;

// As for_rows, N rows at a time: f(first, step, lane, lanes) takes rows first, first + step, ...,
// of which those at `total` and beyond are not there.
template <int N, typename F>
FEDPEFT_DEVICE void for_row_batches(int64_t total, int64_t columns, const F& f) {
  const int lanes = lanes_for(columns), groups = int(blockDim.x) / lanes;
  for (int64_t n = int64_t(blockIdx.x) * groups * N + threadIdx.x / lanes; n < total;
       n += int64_t(gridDim.x) * groups * N)
    f(n, groups, int(threadIdx.x) % lanes, lanes);
}

template <int N, typename... Params, typename... Args>
void launch_row_batches(void (*kernel)(Params...), int64_t total, int64_t columns, Stream stream,
                        Args&&... args) {
  constexpr int kThreads = 256;
  const int64_t rows = int64_t(kThreads / lanes_for(columns)) * N;
  launch(kernel, (total + rows - 1) / rows, kThreads, 0, stream, std::forward<Args>(args)...);
}

// Bytes of shared memory that CUDA keeps for each block, and what a block may have for so many of
// them to share a multiprocessor.
constexpr int64_t kReservedShared = 1024;
inline int64_t shared_of_each(const Limits& device, int64_t blocks) {
  return (device.shared_bytes + kReservedShared) / blocks - kReservedShared;
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Calls f(zero of the element type) for a dtype, and f(integral constant) for the vector width.
template <typename F>
void with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::f16:
      return f(Half{});
    case DType::bf16:
      return f(BFloat16{});
  }
}

// Calls f with the number of elements an access may take: 16 bytes' worth where rows of D elements
// of every given array start at multiples of 16 bytes, else 1.
template <typename T, typename F, typename... Arrays>
void with_width(int64_t D, const F& f, const Arrays*... arrays) {
  if (D % kWide<T> == 0 && (aligned16(arrays) && ...)) {
    f(std::integral_constant<int, kWide<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

}  // namespace fedpeft::gpu
