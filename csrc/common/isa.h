// Instruction sets: every *_cpu.cpp is compiled once for each into namespace fedpeft::<isa>, and
// the kernel table of the best one that the processor runs is chosen at load time.
#pragma once

namespace fedpeft {

enum class Isa { baseline, v3, v4 };

// The set in use: the best supported one, or what FEDPEFT_ISA=baseline|v3|v4 asks for.
Isa cpu_isa();

}  // namespace fedpeft

// FEDPEFT_ONLY_ISA (a CMake option) names the one set of a build that has no other.
// Declares kernel table `name` of type `Type` for every compiled set, and `name()` that picks one.
#if defined(FEDPEFT_ONLY_ISA)
#define FEDPEFT_DECLARE_KERNELS(Type, name) \
  namespace FEDPEFT_ONLY_ISA {              \
  extern const Type name;                   \
  }                                         \
  inline const Type& select_##name() { return FEDPEFT_ONLY_ISA::name; }
#elif defined(__x86_64__)
#define FEDPEFT_DECLARE_KERNELS(Type, name) \
  namespace baseline {                      \
  extern const Type name;                   \
  }                                         \
  namespace v3 {                            \
  extern const Type name;                   \
  }                                         \
  namespace v4 {                            \
  extern const Type name;                   \
  }                                         \
  inline const Type& select_##name() {      \
    switch (cpu_isa()) {                    \
      case Isa::v4:                         \
        return v4::name;                    \
      case Isa::v3:                         \
        return v3::name;                    \
      default:                              \
        return baseline::name;              \
    }                                       \
  }
#else
#define FEDPEFT_DECLARE_KERNELS(Type, name) \
  namespace baseline {                      \
  extern const Type name;                   \
  }                                         \
  inline const Type& select_##name() { return baseline::name; }
#endif
