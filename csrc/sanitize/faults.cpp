// Python module `_faults`, in builds with FEDPEFT_SANITIZE alone: mistakes as kernels could make
// them, each of which the sanitizers must end the process for (python_tests/test_sanitizers.py).
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

namespace {

// Sum of float32 [n] at `address`.
float sum(uintptr_t address, int64_t n) {
  const float* x = reinterpret_cast<const float*>(address);
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

void fill(uintptr_t address, int64_t n) {
  float* x = reinterpret_cast<float*>(address);
  for (int64_t i = 0; i < n; ++i) x[i] = 1;
}

float local_array(int64_t at) {
  volatile float values[8] = {};
  return values[at];
}

float vector(int64_t at) {
  std::vector<float> values(8);
  values.reserve(16);
  return values[size_t(at)];
}

int32_t product(int32_t a, int32_t b) { return a * b; }
int64_t shifted(int64_t x, int bits) { return x << bits; }

// As many as n; with `shared`, all tasks count in one variable.
int64_t count(int64_t n, bool shared) {
  std::vector<int64_t> counts(static_cast<size_t>(n), 0);
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++counts[size_t(shared ? 0 : i)];
  });
  int64_t total = 0;
  for (int64_t c : counts) total += c;
  return total;
}

}  // namespace

PYBIND11_MODULE(_faults, m) {
  m.doc() = "Mistakes that a build with sanitizers must see.";
  m.attr("sanitizers") = FEDPEFT_SANITIZE;
  m.def("sum", &sum);
  m.def("fill", &fill);
  m.def("local_array", &local_array);
  m.def("vector", &vector);
  m.def("product", &product);
  m.def("shifted", &shifted);
  m.def("count", &count);
}
