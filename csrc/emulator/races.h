// What the emulator knows about races, in builds that look for them (FEDPEFT_SANITIZE=race): the
// emulated kernels are compiled with -fsanitize=thread, whose calls at every access to memory end
// here, not in GCC's library. Two accesses of one launch to the same bytes, of which one writes and
// not both are atomic, race unless a barrier of the block, or a __syncwarp of both lanes, lies
// between them. Nothing orders blocks, and shuffles, ballots and matches order no memory. Unlike
// runs in two orders, which show a race only where the result differs, this sees it in any run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fedpeft::emulator::races {

#if defined(FEDPEFT_RACES)
constexpr bool kSeen = true;

// The calls of the scheduler. All of a launch's come from one OS thread.
void start_launch();
void start_block(uint64_t index, const void* shared, size_t shared_bytes);
void pass_barrier();
void sync_lanes(unsigned warp, unsigned mask);
// A fiber, whose own stack no other reads, starts or stops running.
void enter(unsigned thread, const void* stack, size_t stack_bytes);
void leave();
// While it lives (`on`), accesses are not recorded: the emulator's own, or reads for nothing.
class Unseen {
 public:
  explicit Unseen(bool on = true);
  ~Unseen();
  Unseen(const Unseen&) = delete;

 private:
  void* before_;
};

// Accesses that no compiler sees, by the code at `where`.
void read(const void* p, size_t bytes, const void* where);
void wrote(const void* p, size_t bytes, const void* where);

// The first race since the launch began, empty if there was none.
std::string found();
#else
constexpr bool kSeen = false;

inline void start_launch() {}
inline void start_block(uint64_t, const void*, size_t) {}
inline void pass_barrier() {}
inline void sync_lanes(unsigned, unsigned) {}
inline void enter(unsigned, const void*, size_t) {}
inline void leave() {}
struct Unseen {
  explicit Unseen(bool = true) {}
};
inline void read(const void*, size_t, const void*) {}
inline void wrote(const void*, size_t, const void*) {}
inline std::string found() { return {}; }
#endif

}  // namespace fedpeft::emulator::races
