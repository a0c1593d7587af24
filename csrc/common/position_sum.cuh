// Kernels behind common/position_sum.h. A Source names an op's terms:
//   bool active(int64_t n): whether position n (of all clients) takes part
//   void add<V>(Sum<acc, V>& sum, int64_t client, int64_t n, int64_t output): adds position n's
//   term of V outputs
#pragma once

#include "common/device.cuh"
#include "common/position_sum.h"

namespace fedpeft::gpu {

// Block (client, block of positions, chunk of outputs); writes `out` [clients, outputs] where there
// is one block of positions, else `partial` [clients, blocks, outputs].
template <typename Source, typename T, int V>
__global__ void __launch_bounds__(128, 4)
    sum_positions(Source source, T* out, PositionSum shape, acc_t<T>* partial) {
  const int64_t blocks = shape.blocks(), chunks = (shape.outputs + 128 * V - 1) / (128 * V);
  const int64_t tasks = shape.clients * blocks * chunks;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t part = divide(task, chunks), client = divide(part, blocks);
    const int64_t output = ((task - part * chunks) * 128 + threadIdx.x) * V;
    if (output >= shape.outputs) continue;
    const int64_t begin = (part - client * blocks) * PositionSum::kBlock;
    const int64_t left = shape.positions - begin;
    const int64_t end = begin + (left < PositionSum::kBlock ? left : PositionSum::kBlock);
    Sum<acc_t<T>, V> sum;
    sum.clear();
#pragma unroll 4
    for (int64_t p = begin; p < end; ++p) {
      const int64_t n = client * shape.positions + p;
      if (source.active(n)) source.template add<V>(sum, client, n, output);
    }
    sum.store_either(blocks == 1 ? nullptr : partial + part * shape.outputs + output,
                     out + client * shape.outputs + output);
  }
}

template <typename T>
__global__ void __launch_bounds__(256, 4)
    join_blocks(T* out, PositionSum shape, const acc_t<T>* partial) {
  const int64_t total = shape.clients * shape.outputs, blocks = shape.blocks();
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < total;
       i += int64_t(gridDim.x) * 256) {
    const int64_t client = divide(i, shape.outputs);
    const acc_t<T>* from = partial + client * blocks * shape.outputs + (i - client * shape.outputs);
    acc_t<T> sum = 0;
#pragma unroll 4
    for (int64_t b = 0; b < blocks; ++b) sum += from[b * shape.outputs];
    out[i] = from_acc<T>(sum);
  }
}

// V divides the outputs.
template <typename T, int V, typename Source>
void launch_position_sum(const Source& source, const PositionSum& shape, T* out, void* partial,
                         Stream stream) {
  if (shape.outputs == 0) return;
  const int64_t chunks = (shape.outputs + 128 * V - 1) / (128 * V);
  acc_t<T>* parts = static_cast<acc_t<T>*>(partial);
  launch(sum_positions<Source, T, V>, shape.clients * shape.blocks() * chunks, 128, 0, stream,
         source, out, shape, parts);
  if (shape.blocks() > 1) {
    launch(join_blocks<T>, (shape.clients * shape.outputs + 255) / 256, 256, 0, stream, out, shape,
           static_cast<const acc_t<T>*>(parts));
  }
}

}  // namespace fedpeft::gpu
