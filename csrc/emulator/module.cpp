// Python module `_emulator`, for tests: importing it registers the CUDA kernels, run on the CPU, as
// torch.ops.fedpeft_ext_emulated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "common/python_errors.h"
#include "emulator/emulator.h"
#include "emulator/faults.h"

PYBIND11_MODULE(_emulator, m) {
  using namespace fedpeft::emulator;
  m.doc() = "CUDA kernels on the CPU, for tests.";
  m.def("set_backwards", &set_backwards, pybind11::arg("backwards"),
        "Whether the threads of a block run from last to first.");
  m.def("set_shared_limit", &set_shared_limit, pybind11::arg("bytes"),
        "Shared memory that a block may have, in bytes.");
  m.def("set_grid_limit", &set_grid_limit, pybind11::arg("blocks"),
        "Blocks that a launch may have, at least 2.");
  m.def("set_multiprocessors", &set_multiprocessors, pybind11::arg("count"),
        "Multiprocessors by which kernels choose how they run, at least 1.");
  m.def("multiprocessors", &multiprocessors, "As set_multiprocessors.");
  m.def("grid_limit", &grid_limit, "Blocks that a launch may have.");
  m.def("shared_limit", &shared_limit, "Shared memory that a block may have, in bytes.");
  m.def("launches", &launches, "Kernels launched since the start of the process.");
  m.attr("sees_races") = races::kSeen;
  m.def("leave_out", &leave_out, pybind11::arg("place"),
        "Passes the waits of kernels at this place (file.cu:12) as if they were not there.");
  m.def("waits", &waits, "Places where kernels have waited since the last leave_out.");
  m.def("throw_with_message", &fedpeft::throw_with_message, pybind11::arg("message"),
        "Raises what a call of torch that fails with this message does.");
  m.def("fault_names", &fault_names, "Kernels with a planted fault.");
  m.def("run_fault", &run_fault, pybind11::arg("name"), pybind11::arg("planted"),
        "Runs such a kernel with its fault or without and returns its output.");
}
