// Sums over the positions of a client, for the gradients of parameters that every position reads
// whole (LoRA's B, the SENet): thread-owned outputs, positions in order. Positions are cut into
// blocks of fixed size whose sums are added in order, so that results do not depend on the device.
#pragma once

#include <cstdint>

#include "common/gpu.h"
#include "common/types.h"

namespace fedpeft::gpu {

struct PositionSum {
  int64_t clients, positions, outputs;  // positions of a client, outputs of a client
  static constexpr int64_t kBlock = 1024;
  FEDPEFT_HD int64_t blocks() const {
    return positions <= kBlock ? 1 : (positions + kBlock - 1) / kBlock;
  }
  // Accumulators of scratch that a launch needs.
  int64_t partial_size() const { return blocks() == 1 ? 0 : clients * blocks() * outputs; }
};

}  // namespace fedpeft::gpu
