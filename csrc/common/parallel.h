// Work sharing for the binding files: ranges of work items on torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/torch.h"

namespace fedpeft {

// Calls f(begin, end) over [0, n); `cost` is a work item's rough cost in elementary operations, so
// that small calls stay on one thread.
template <typename F>
void parallel_ranges(int64_t n, int64_t cost, const F& f) {
  if (n <= 0) return;
  constexpr int64_t kMinimumWork = 1 << 15;
  const int64_t grain = std::max<int64_t>(1, kMinimumWork / std::max<int64_t>(1, cost));
  if (n <= grain) {
    f(int64_t{0}, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

// Scatter-add into one shared table. Entries (position * slots + slot) are grouped by ranges of
// target rows, in position order inside a range, and run(entries, count) is called once a range, in
// parallel: each row is summed in position order by one task, so the result is that of a serial
// loop. Where that is at least as good, it is one call run(nullptr, positions * slots): all
// entries.
template <typename RowOf, typename Run>
void scatter_by_row(int64_t positions, int64_t slots, int64_t rows, int64_t width,
                    const RowOf& row_of, const Run& run) {
  const int64_t entries = positions * slots;
  const int64_t ranges =
      std::min<int64_t>({rows, 4 * int64_t(torch::stable::get_num_threads()), 256});
  if (torch::stable::get_num_threads() == 1 || ranges < 2 ||
      entries * std::max<int64_t>(width, 8) < (1 << 17)) {
    run(static_cast<const int64_t*>(nullptr), entries);
    return;
  }
  const int64_t per_range = (rows + ranges - 1) / ranges;
  const int64_t blocks = std::min<int64_t>(torch::stable::get_num_threads(), entries);
  const int64_t block = (entries + blocks - 1) / blocks;
  std::vector<int64_t> counts(size_t(blocks * ranges), 0);
  std::vector<int64_t> sorted(static_cast<size_t>(entries));
  std::vector<int16_t> range_of(static_cast<size_t>(entries));
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t e = b * block; e < std::min(entries, (b + 1) * block); ++e) {
        const int64_t row = row_of(e / slots, e % slots);
        const int64_t range = row < 0 ? -1 : row / per_range;
        range_of[size_t(e)] = int16_t(range);
        if (range >= 0) ++counts[size_t(range * blocks + b)];
      }
    }
  });
  std::vector<int64_t> starts(size_t(ranges) + 1, 0);
  int64_t sum = 0;
  for (int64_t r = 0; r < ranges; ++r) {
    starts[size_t(r)] = sum;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t count = counts[size_t(r * blocks + b)];
      counts[size_t(r * blocks + b)] = sum;
      sum += count;
    }
  }
  starts[size_t(ranges)] = sum;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t b0, int64_t b1) {
    for (int64_t b = b0; b < b1; ++b) {
      for (int64_t e = b * block; e < std::min(entries, (b + 1) * block); ++e) {
        const int64_t range = range_of[size_t(e)];
        if (range >= 0) sorted[size_t(counts[size_t(range * blocks + b)]++)] = e;
      }
    }
  });
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t first = starts[size_t(r)], count = starts[size_t(r) + 1] - first;
      if (count > 0) run(static_cast<const int64_t*>(sorted.data()) + first, count);
    }
  });
}

// total += partial[0], then partial[1], ...: partial is [blocks, ...], total one block, both
// contiguous and of the accumulator type.
inline void add_blocks(const torch::stable::Tensor& partial, const torch::stable::Tensor& total) {
  const int64_t n = total.numel(), blocks = partial.size(0);
  const auto add = [&](auto* into, const auto* from) {
    for (int64_t b = 0; b < blocks; ++b) {
      for (int64_t i = 0; i < n; ++i) into[i] += from[b * n + i];
    }
  };
  if (total.scalar_type() == torch::headeronly::ScalarType::Double) {
    add(static_cast<double*>(total.mutable_data_ptr()),
        static_cast<const double*>(partial.const_data_ptr()));
  } else {
    add(static_cast<float*>(total.mutable_data_ptr()),
        static_cast<const float*>(partial.const_data_ptr()));
  }
}

}  // namespace fedpeft
