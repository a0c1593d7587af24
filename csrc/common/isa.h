// Instruction sets: every *_cpu.cpp is compiled once for each into namespace fedpeft::<isa>, and
// the kernel table of the best one that the processor runs is chosen at load time.
#pragma once

namespace fedpeft {

enum class Isa { baseline, v3, v4 };

// The set in use: the best supported one, or what FEDPEFT_ISA=baseline|v3|v4 asks for.
Isa cpu_isa();

}  // namespace fedpeft

// FEDPEFT_DECLARE_KERNELS declares kernel table `name` of type `Type` for every compiled set, and
// `select_name()` that picks one; FEDPEFT_DECLARE_WIDE_KERNELS, with `select_wide_name()`, those
// that are compiled with AVX-512 registers at their full width (v4_wide; see vec.h).
// FEDPEFT_ONLY_ISA and FEDPEFT_ONLY_WIDE (a CMake option) name the one set of a build that has no
// other.
#define FEDPEFT_DECLARE_TABLE(Type, name, set) \
  namespace set {                              \
  extern const Type name;                      \
  }
#if defined(FEDPEFT_ONLY_ISA)
#define FEDPEFT_DECLARE_KERNELS(Type, name)           \
  FEDPEFT_DECLARE_TABLE(Type, name, FEDPEFT_ONLY_ISA) \
  inline const Type& select_##name() { return FEDPEFT_ONLY_ISA::name; }
#define FEDPEFT_DECLARE_WIDE_KERNELS(Type, name)       \
  FEDPEFT_DECLARE_TABLE(Type, name, FEDPEFT_ONLY_WIDE) \
  inline const Type& select_wide_##name() { return FEDPEFT_ONLY_WIDE::name; }
#elif defined(__x86_64__)
#define FEDPEFT_DECLARE_SETS(Type, name, select, V4) \
  FEDPEFT_DECLARE_TABLE(Type, name, baseline)        \
  FEDPEFT_DECLARE_TABLE(Type, name, v3)              \
  FEDPEFT_DECLARE_TABLE(Type, name, V4)              \
  inline const Type& select() {                      \
    switch (cpu_isa()) {                             \
      case Isa::v4:                                  \
        return V4::name;                             \
      case Isa::v3:                                  \
        return v3::name;                             \
      default:                                       \
        return baseline::name;                       \
    }                                                \
  }
#define FEDPEFT_DECLARE_KERNELS(Type, name) FEDPEFT_DECLARE_SETS(Type, name, select_##name, v4)
#define FEDPEFT_DECLARE_WIDE_KERNELS(Type, name) \
  FEDPEFT_DECLARE_SETS(Type, name, select_wide_##name, v4_wide)
#else
#define FEDPEFT_DECLARE_KERNELS(Type, name)   \
  FEDPEFT_DECLARE_TABLE(Type, name, baseline) \
  inline const Type& select_##name() { return baseline::name; }
#define FEDPEFT_DECLARE_WIDE_KERNELS(Type, name) \
  FEDPEFT_DECLARE_TABLE(Type, name, baseline)    \
  inline const Type& select_wide_##name() { return baseline::name; }
#endif
