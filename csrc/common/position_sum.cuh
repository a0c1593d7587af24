// Kernels behind common/position_sum.h. A Source names an op's terms:
//   bool active(int64_t n): whether position n (of all clients) takes part
//   void add<V>(Sum<acc, V>& sum, int64_t client, int64_t n, int64_t output): adds position n's
//   term of V outputs
#pragma once

#include "common/device.cuh"
#include "common/position_sum.h"

namespace fedpeft::gpu {

// Outputs [clients, outputs] in one array. An op may have its own: T* operator()(client, output),
// where V outputs lie together.
template <typename T>
struct OneArray {
  T* out;
  int64_t outputs;
  FEDPEFT_DEVICE T* operator()(int64_t client, int64_t output) const {
    return out + client * outputs + output;
  }
};

// Chunks of outputs that a block of `threads` threads takes, and with clients and blocks of
// positions the tasks there are.
template <int V>
FEDPEFT_HD inline int64_t position_sum_chunks(const PositionSum& shape, int64_t threads) {
  return (shape.outputs + threads * V - 1) / (threads * V);
}
template <int V>
FEDPEFT_HD inline int64_t position_sum_tasks(const PositionSum& shape, int64_t threads) {
  return shape.clients * shape.blocks() * position_sum_chunks<V>(shape, threads);
}

// A chunk of outputs over a client's block of positions; to `out` where that is its only one, else
// to `partial` [clients, blocks, outputs].
template <typename T, int V, typename Source, typename Out>
FEDPEFT_DEVICE void sum_positions_task(const Source& source, const Out& out,
                                       const PositionSum& shape, acc_t<T>* partial, int64_t client,
                                       int64_t block, int64_t chunk) {
  const int64_t output = (chunk * blockDim.x + threadIdx.x) * V, blocks = shape.blocks();
  if (output >= shape.outputs) return;
  const int64_t begin = block * PositionSum::kBlock, left = shape.positions - begin;
  const int64_t end = begin + (left < PositionSum::kBlock ? left : PositionSum::kBlock);
  Sum<acc_t<T>, V> sum;
  sum.clear();
#pragma unroll 4
  for (int64_t p = begin; p < end; ++p) {
    const int64_t n = client * shape.positions + p;
    if (source.active(n)) source.template add<V>(sum, client, n, output);
  }
  sum.store_either(
      blocks == 1 ? nullptr : partial + (client * blocks + block) * shape.outputs + output,
      out(client, output));
}

// Tasks first, first + step, ...
template <typename T, int V, typename Source, typename Out>
FEDPEFT_DEVICE void sum_positions_tasks(const Source& source, const Out& out,
                                        const PositionSum& shape, acc_t<T>* partial, int64_t first,
                                        int64_t step) {
  const int64_t chunks = position_sum_chunks<V>(shape, blockDim.x);
  const int64_t tasks = position_sum_tasks<V>(shape, blockDim.x);
  for (int64_t task = first; task < tasks; task += step) {
    const int64_t part = divide(task, chunks), client = divide(part, shape.blocks());
    sum_positions_task<T, V>(source, out, shape, partial, client, part - client * shape.blocks(),
                             task - part * chunks);
  }
}

template <typename Source, typename T, int V, typename Out>
__global__ void __launch_bounds__(128, 4)
    sum_positions(Source source, Out out, PositionSum shape, acc_t<T>* partial) {
  sum_positions_tasks<T, V>(source, out, shape, partial, blockIdx.x, gridDim.x);
}

template <typename T, typename Out>
__global__ void __launch_bounds__(256, 4)
    join_blocks(Out out, PositionSum shape, const acc_t<T>* partial) {
  const int64_t total = shape.clients * shape.outputs, blocks = shape.blocks();
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * 256) {
    const int64_t client = divide(i, shape.outputs), output = i - client * shape.outputs;
    const acc_t<T>* from = partial + client * blocks * shape.outputs + output;
    acc_t<T> sum = 0;
#pragma unroll 4
    for (int64_t b = 0; b < blocks; ++b) sum += from[b * shape.outputs];
    *out(client, output) = from_acc<T>(sum);
  }
}

template <typename T, typename Out>
void launch_join_blocks(const PositionSum& shape, const Out& out, const void* partial,
                        Stream stream) {
  launch(join_blocks<T, Out>, (shape.clients * shape.outputs + 255) / 256, 256, 0, stream, out,
         shape, static_cast<const acc_t<T>*>(partial));
}

// V divides the outputs.
template <typename T, int V, typename Source, typename Out>
void launch_position_sum(const Source& source, const PositionSum& shape, const Out& out,
                         void* partial, Stream stream) {
  if (shape.outputs == 0) return;
  launch(sum_positions<Source, T, V, Out>, position_sum_tasks<V>(shape, 128), 128, 0, stream,
         source, out, shape, static_cast<acc_t<T>*>(partial));
  if (shape.blocks() > 1) launch_join_blocks<T>(shape, out, partial, stream);
}

}  // namespace fedpeft::gpu
