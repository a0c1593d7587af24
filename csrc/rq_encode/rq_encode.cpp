// Binding of rq_encode: checks, allocation, dispatch.
#include "common/buffer.h"
#include "common/check.h"
#include "common/dispatch.h"
#include "common/parallel.h"
#include "rq_encode/rq_encode_cpu.h"
#include "rq_encode/rq_encode_cuda.h"

namespace fedpeft {
namespace {

Tensor rq_encode(const Tensor& x, const Tensor& codebooks) {
  check_dim(x, 2, "x", "[N, D]");
  check_dim(codebooks, 3, "codebooks", "[L, K, D]");
  check_size(codebooks, 2, x.size(1), "codebooks", "D, the width of x");
  check_value(codebooks.size(1) >= 1,
              "codebooks: expected at least one code a level (K >= 1), got shape ",
              shape_text(codebooks));
  check_value(codebooks.size(1) <= INT32_MAX,
              "codebooks: expected at most 2^31 - 1 codes a level, got shape ",
              shape_text(codebooks));
  const DType dtype = dtype_of(x, "x");
  check_same_dtype(codebooks, x, "codebooks", "x");
  check_same_device(codebooks, x, "codebooks", "x");

  const Tensor x_ = dense(x), codebooks_ = dense(codebooks);
  FirstError bad_x, bad_codebook;
  RqEncodeArgs a{};
  a.x = x_.const_data_ptr();
  a.codebooks = codebooks_.const_data_ptr();
  a.N = x.size(0);
  a.D = x.size(1);
  a.L = codebooks.size(0);
  a.K = codebooks.size(1);
  a.bad_x = &bad_x;
  a.bad_codebook = &bad_codebook;
  a.code_bytes = a.K <= 256 ? 1 : a.K <= 32768 ? 2 : 4;
  const ScalarType code_type = a.code_bytes == 1   ? ScalarType::Byte
                               : a.code_bytes == 2 ? ScalarType::Short
                                                   : ScalarType::Int;
  Tensor codes = allocate(x, {a.N, a.L}, code_type);
  a.codes = codes.mutable_data_ptr();

  run_on(
      x,
      [&](auto) {
        const RqEncodeKernels& kernels = select_wide_rq_encode_kernels();
        const int kernel = int(dtype);
        const int64_t accumulator_bytes = dtype == DType::f64 ? 8 : 4;
        const Buffer packed = aligned_buffer(kernels.packed_size[kernel](a) * accumulator_bytes);
        a.packed = packed.get();
        parallel_ranges(a.L, 2 * a.K * a.D,
                        [&](int64_t begin, int64_t end) { kernels.pack[kernel](a, begin, end); });
        const auto raise = [](const FirstError& error, const char* name, int64_t row,
                              const char* what) {
          check_value(!error.any(), name, ": expected finite values, got NaN or infinity in ", what,
                      " ", row);
        };
        raise(bad_codebook, "codebooks", a.D ? bad_codebook.position / (a.K * a.D) : 0, "level");
        const int64_t blocks = (a.N + kEncodeRows - 1) / kEncodeRows;
        parallel_ranges(blocks, kEncodeRows * a.L * a.K * a.D / 8, [&](int64_t begin, int64_t end) {
          const Buffer scratch = aligned_buffer(kEncodeRows * a.D * accumulator_bytes);
          kernels.encode[kernel](a, begin, end, scratch.get());
        });
        raise(bad_x, "x", a.D ? bad_x.position / a.D : 0, "row");
      },
      [&](auto stream) { gpu::rq_encode(a, dtype, stream); });
  return codes;
}

}  // namespace

FEDPEFT_IMPL(m) { m.impl("rq_encode", TORCH_BOX(&rq_encode)); }

}  // namespace fedpeft
