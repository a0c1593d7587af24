// Python's exceptions, for the one file of each module that knows Python.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

// Of torch 2.13 and newer; null in older ones.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace fedpeft {

// Python's torch.OutOfMemoryError, which searches for a batch size that fits catch.
class OutOfMemory : public pybind11::builtin_exception {
 public:
  using builtin_exception::builtin_exception;
  void set_error() const override {
    PyErr_SetString(pybind11::module_::import("torch").attr("OutOfMemoryError").ptr(), what());
  }
};

// As torch's allocators of devices say it; that of the CPU raises RuntimeError.
[[noreturn]] inline void throw_with_message(const std::string& message) {
  if (message.find("out of memory. Tried to allocate") != std::string::npos)
    throw OutOfMemory(message);
  throw std::runtime_error(message);
}

[[noreturn]] void throw_torch_error(const char* call) {
  if (torch_exception_get_what_without_backtrace)
    throw_with_message(torch_exception_get_what_without_backtrace());
  throw std::runtime_error(std::string(call) + " failed; torch has written why to standard error");
}

[[noreturn]] void throw_type_error(const std::string& message) {
  throw pybind11::type_error(message);
}

}  // namespace fedpeft
