// The negative item that a draw stands for, on the device: the bits of the CPU (common/draws.h).
#pragma once

#include "common/device.cuh"
#include "common/philox.h"

namespace fedpeft::gpu {

// Draw of a client's position in an epoch, among the items that are not its positives, which are
// `count` from `first`, ascending.
FEDPEFT_DEVICE int64_t draw_negative(const IndexArray& positives, int64_t first, int64_t count,
                                     int64_t num_items, uint32_t position, uint32_t client,
                                     uint32_t round, uint32_t epoch, uint64_t seed) {
  const PhiloxBlock block =
      philox(position, client, round, philox_stream(Purpose::negatives, 0, epoch), seed);
  const int64_t k = int64_t(multiply_high(block.low64(), uint64_t(num_items - count)));
  // The number of positives below the k-th item that is none of them.
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (positives[first + middle] - middle <= k) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return k + low;
}

}  // namespace fedpeft::gpu
