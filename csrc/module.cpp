// Python module `_C`: importing it registers the ops; it also says how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "common/isa.h"
#include "common/python_errors.h"

namespace {

pybind11::list split(const std::string& text) {
  pybind11::list parts;
  size_t start = 0;
  while (start < text.size()) {
    size_t end = text.find(',', start);
    if (end == std::string::npos) end = text.size();
    parts.append(text.substr(start, end - start));
    start = end + 1;
  }
  return parts;
}

const char* isa_name(fedpeft::Isa isa) {
  switch (isa) {
    case fedpeft::Isa::v4:
      return "x86-64-v4";
    case fedpeft::Isa::v3:
      return "x86-64-v3";
    default:
      return "baseline";
  }
}

}  // namespace

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Compiled ops of fedpeft_ext.";
  fedpeft::cpu_isa();  // A wrong FEDPEFT_ISA fails the import, not the first op.
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["torch_built"] = FEDPEFT_TORCH_BUILT;
        info["compiler"] = FEDPEFT_COMPILER;
        info["isa_compiled"] = split(FEDPEFT_ISAS);
        info["isa_in_use"] = isa_name(fedpeft::cpu_isa());
        info["cuda_archs"] = split(FEDPEFT_CUDA_ARCHS);
        info["cuda"] = pybind11::len(info["cuda_archs"]) > 0;
        info["library_sha256"] = FEDPEFT_LIBRARY_SHA256;
        return info;
      },
      "Build facts: torch version, compiler, instruction sets, CUDA architectures, SHA-256 of the "
      "schemas' file csrc/library.cpp.");
}
