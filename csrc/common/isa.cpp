// Chooses the instruction set once per process.
#include "common/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fedpeft {
namespace {

#if defined(__x86_64__)
// F16C, MOVBE and LZCNT, which __builtin_cpu_supports of clang 14 does not know.
bool rest_of_v3() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  if (!(ecx >> 29 & 1) || !(ecx >> 22 & 1)) return false;
  return __get_cpuid(0x80000001, &eax, &ebx, &ecx, &edx) && (ecx >> 5 & 1);
}
#endif

bool supported(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == Isa::v4) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported(Isa::v3);
  }
  if (isa == Isa::v3) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && rest_of_v3();
  }
#endif
  return isa == Isa::baseline;
}

Isa choose() {
#if defined(FEDPEFT_ONLY_ISA)
  const Isa best = Isa::FEDPEFT_ONLY_ISA;
  if (!supported(best))
    throw std::invalid_argument("this processor cannot run the compiled kernels");
#else
  Isa best = Isa::baseline;
  for (Isa isa : {Isa::v3, Isa::v4}) {
    if (supported(isa)) best = isa;
  }
#endif
  const char* wish = std::getenv("FEDPEFT_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  const std::string name = wish;
  Isa isa = Isa::baseline;
  if (name == "v3") {
    isa = Isa::v3;
  } else if (name == "v4") {
    isa = Isa::v4;
  } else if (name != "baseline") {
    throw std::invalid_argument("FEDPEFT_ISA: expected baseline, v3 or v4, got " + name);
  }
  if (!supported(isa)) {
    throw std::invalid_argument("FEDPEFT_ISA: this processor cannot run " + name);
  }
#if defined(FEDPEFT_ONLY_ISA)
  if (isa != best) throw std::invalid_argument("FEDPEFT_ISA: " + name + " is not compiled");
#endif
  return isa;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace fedpeft
