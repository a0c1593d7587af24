// A hidden layer of each client's own MLP on the CPU.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kLayerBlock = 64;         // positions worked on together; a multiple of 4
constexpr int64_t kLayerTask = 1024;        // positions of a forward work item; whole blocks
constexpr int64_t kPlacesBehind = 8;        // room behind a list of places
constexpr int64_t kLayerPanelColumns = 64;  // the widest panel of any instruction set

struct ClientLayerArgs {
  const void* x;                     // [C, P, I]
  const void* weight;                // [C, O, I]
  const void* bias;                  // [C, O]
  IndexArray items;                  // [C, P], -1 at padding
  IndexArray clients;                // [C], in [0, 2^32)
  void* out;                         // forward: [C, P, O]
  const void* kept;                  // backward: the output of forward
  const void* grad;                  // backward: [C, P, O]
  void* grad_x;                      // backward: [C, P, I]
  void* grad_weight;                 // backward: [C, O, I]
  void* grad_bias;                   // backward: [C, O]
  int64_t positions, in, out_width;  // P, I, O
  int64_t tasks;                     // forward work items of a client
  void* packed;                      // forward: [C, packed_size] of the accumulator type
  int64_t packed_size;
  void* scratch;  // [work items, scratch_size] of the accumulator type
  int64_t scratch_size;
  bool sparse;  // forward: x went through a layer, which left zeros
  bool drop;
  uint32_t threshold;  // floor(p * 2^32): an element with a word below it is dropped
  double scale;        // 1 / (1 - p)
  uint64_t seed;
  uint32_t round, stream;
};

// `columns` rounded up to whole panels of any width.
inline int64_t layer_padded(int64_t columns) {
  return (columns + kLayerPanelColumns - 1) / kLayerPanelColumns * kLayerPanelColumns;
}
// Elements of scratch: weights in panels; a block of the output, and the bias; of the backward also
// a block of inputs in panels, and the sums of 16-bit gradients.
inline int64_t layer_packed_size(int64_t in, int64_t out) { return in * layer_padded(out); }
// Places of what is not zero in a block are of 4 bytes or less each.
inline int64_t layer_forward_scratch(int64_t in, int64_t out) {
  return (kLayerBlock + 1) * out + kLayerBlock * (in + kPlacesBehind);
}
inline int64_t layer_backward_scratch(int64_t in, int64_t out) {
  return (out + kLayerBlock) * layer_padded(in) + kLayerBlock * (out + in) + out * (in + 1) +
         kLayerBlock * (out + kPlacesBehind) + out * (1 + kLayerBlock / 4);
}

struct ClientLayerKernels {
  // Clients [begin, end): weights transposed, into panels or, for a sparse x, padded rows.
  void (*pack[kDTypes])(const ClientLayerArgs&, int64_t begin, int64_t end);
  // Work items [begin, end) of C * tasks.
  void (*forward[kDTypes])(const ClientLayerArgs&, int64_t begin, int64_t end);
  // Clients [begin, end): all three gradients.
  void (*backward[kDTypes])(const ClientLayerArgs&, int64_t begin, int64_t end);
};

FEDPEFT_DECLARE_WIDE_KERNELS(ClientLayerKernels, client_layer_kernels)

}  // namespace fedpeft
