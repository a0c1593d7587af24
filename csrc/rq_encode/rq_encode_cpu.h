// Greedy residual quantization on the CPU: at each level the nearest code of the residual, which is
// then subtracted. The nearest code maximises score(k) = r . c_k - |c_k|^2 / 2; ties go to the
// lowest index.
#pragma once

#include "common/isa.h"
#include "common/types.h"

namespace fedpeft {

constexpr int64_t kEncodeRows = 48;  // rows of a work item

struct RqEncodeArgs {
  const void* x;          // [N, D]
  const void* codebooks;  // [L, K, D]
  void* packed;           // packed_size(a) accumulators: see pack
  void* codes;            // [N, L], integers of code_bytes
  int code_bytes;         // 1, 2 or 4
  int64_t N, L, K, D;
  FirstError* bad_x;         // flat index into x of a value that is not finite
  FirstError* bad_codebook;  // flat index into codebooks
};

struct RqEncodeKernels {
  // Accumulators that `packed` needs.
  int64_t (*packed_size[kDTypes])(const RqEncodeArgs&);
  // Levels [begin, end) of the codebooks into panels of codes, with their norms.
  void (*pack[kDTypes])(const RqEncodeArgs&, int64_t begin, int64_t end);
  // Blocks [begin, end) of kEncodeRows rows; scratch is kEncodeRows * D accumulators.
  void (*encode[kDTypes])(const RqEncodeArgs&, int64_t begin, int64_t end, void* scratch);
};

FEDPEFT_DECLARE_WIDE_KERNELS(RqEncodeKernels, rq_encode_kernels)

}  // namespace fedpeft
