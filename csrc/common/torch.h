// Torch's stable ABI. A call that fails throws torch's own message: compiled for a torch before
// 2.13, its headers say only which call it was.
#pragma once

#include <torch/headeronly/util/shim_utils.h>

namespace fedpeft {

// `call` has failed on this thread; Python gets the exception that torch raises
// (common/python_errors.h).
[[noreturn]] void throw_torch_error(const char* call);

}  // namespace fedpeft

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call)     \
  if ((call) != TORCH_SUCCESS) {         \
    ::fedpeft::throw_torch_error(#call); \
  }

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
