// Who touched what, in the manner of FastTrack (Flanagan and Freund, PLDI 2009): for each granule
// of memory the accesses that a later one might not be ordered after, as a single thread where
// possible, as a clock a lane where lanes of one warp touched it, else as "several warps" or
// "several blocks", which nothing but the next barrier, or nothing at all, is ordered after.
#include "emulator/races.h"

#if defined(FEDPEFT_RACES)

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

namespace fedpeft::emulator::races {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kPage = 4096;
constexpr size_t kPagesKept = 4096;

enum class Kind { read, write, atomic };
constexpr const char* kNames[] = {"read", "write", "atomic operation"};

using Clocks = std::array<uint32_t, kWarp>;

// The latest accesses of one kind.
struct Touch {
  enum Who : uint8_t { nobody, thread_alone, lanes_of_warp, several_warps, several_blocks };

  uint32_t launch = 0, block = 0;
  uint32_t epoch = 0;  // barriers that the block had passed
  uint32_t clock = 0;  // of the thread's lane, or where the lanes' clocks are
  uint16_t thread = 0;
  Who who = nobody;
  const void* where = nullptr;
};

struct Cell {
  Touch by[3];
};

// Granules are words until something smaller is touched.
struct Page {
  size_t granule = 4;
  std::vector<Cell> cells = std::vector<Cell>(kPage / 4);

  void split() {
    std::vector<Cell> bytes(kPage);
    for (size_t b = 0; b < kPage; ++b) bytes[b] = cells[b / granule];
    cells.swap(bytes);
    granule = 1;
  }
};

std::string line_of(const void* where) {
  Dl_info info{};
  if (where == nullptr || !dladdr(where, &info)) return "an unknown place";
  char command[4096];
  // The call lies before the address that it returns to.
  std::snprintf(
      command, sizeof command, "addr2line -ie '%s' 0x%zx 2>/dev/null", info.dli_fname,
      size_t(static_cast<const char*>(where) - static_cast<const char*>(info.dli_fbase)) - 1);
  std::string lines;
  if (FILE* out = popen(command, "r")) {
    char line[1024];
    while (std::fgets(line, sizeof line, out)) {
      std::string text = line;
      text = text.substr(text.rfind('/') + 1);
      text = text.substr(0, text.find_first_of(" \n"));
      if (text.rfind("std_function.h", 0) == 0 || text.rfind("invoke.h", 0) == 0) break;
      lines += (lines.empty() ? "" : " in ") + text;
    }
    pclose(out);
  }
  return lines.empty() ? "an unknown place" : lines;
}

class Tracker {
 public:
  void start_launch() {
    ++launch_;
    found_.clear();
    lanes_.clear();
    if (pages_.size() > kPagesKept) {
      pages_.clear();
      recent_ = {};
    }
  }

  void start_block(uint64_t index, const void* shared, size_t bytes) {
    block_ = uint32_t(index);
    shared_ = {uintptr_t(shared), uintptr_t(shared) + bytes};
    epoch_ = 0;
    for (auto& warp : seen_) {
      for (unsigned lane = 0; lane < kWarp; ++lane) {
        warp[lane].fill(0);
        warp[lane][lane] = 1;
      }
    }
  }

  void pass_barrier() { ++epoch_; }

  void sync_lanes(unsigned warp, unsigned mask) {
    auto& lanes = seen_[warp];
    Clocks all{};
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      for (unsigned j = 0; j < kWarp; ++j) all[j] = std::max(all[j], lanes[i][j]);
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(mask >> i & 1)) continue;
      lanes[i] = all;
      ++lanes[i][i];
    }
  }

  void enter(unsigned thread, const void* stack, size_t bytes) {
    thread_ = thread;
    mine_ = &seen_[thread / kWarp][thread % kWarp];
    stack_ = {uintptr_t(stack), uintptr_t(stack) + bytes};
  }

  void touch(Kind kind, const void* p, size_t bytes, const void* where) {
    uintptr_t at = uintptr_t(p);
    const uintptr_t end = at + bytes;
    if (at >= stack_.begin && at < stack_.end) return;
    const bool shared = at >= shared_.begin && at < shared_.end;
    while (at < end) {
      Page& page = page_of(at / kPage);
      if (page.granule > 1 && (at % page.granule || (end - at) % page.granule)) page.split();
      const uintptr_t stop = std::min(end, (at / kPage + 1) * kPage);
      for (; at < stop; at += page.granule)
        touch_cell(page.cells[at % kPage / page.granule], kind, at, bytes, shared, where);
    }
  }

  const std::string& found() const { return found_; }

 private:
  struct Range {
    uintptr_t begin = 0, end = 0;
  };
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };

  Page& page_of(uintptr_t number) {
    Recent& recent = recent_[number % recent_.size()];
    if (recent.page && recent.number == number) return *recent.page;
    auto& page = pages_[number];
    if (!page) page = std::make_unique<Page>();
    recent = {number, page.get()};
    return *page;
  }

  // Whether all of these accesses come before whatever the current thread does now.
  bool ordered(const Touch& t, bool shared) const {
    if (t.who == Touch::nobody || t.launch != launch_) return true;
    if (t.block != block_) return shared;  // another block had its shared memory there
    if (t.who == Touch::several_blocks) return false;
    if (t.epoch < epoch_) return true;
    if (t.who == Touch::several_warps || t.thread / kWarp != thread_ / kWarp) return false;
    if (t.who == Touch::thread_alone)
      return t.thread == thread_ || (*mine_)[t.thread % kWarp] >= t.clock;
    for (unsigned i = 0; i < kWarp; ++i) {
      if (i != thread_ % kWarp && (*mine_)[i] < lanes_[t.clock][i]) return false;
    }
    return true;
  }

  void touch_cell(Cell& cell, Kind kind, uintptr_t at, size_t bytes, bool shared,
                  const void* where) {
    Touch& own = cell.by[int(kind)];
    const uint32_t clock = (*mine_)[thread_ % kWarp];
    if (own.thread == thread_ && own.clock == clock && own.epoch == epoch_ && own.block == block_ &&
        own.launch == launch_ && own.who == Touch::thread_alone)
      return;  // as before; whatever came between was held against that
    for (int other = 0; other < 3; ++other) {
      const bool both_read = kind == Kind::read && Kind(other) == Kind::read;
      const bool both_atomic = kind == Kind::atomic && Kind(other) == Kind::atomic;
      if (both_read || both_atomic || ordered(cell.by[other], shared)) continue;
      if (found_.empty()) report(cell.by[other], Kind(other), kind, at, bytes, shared, where);
    }
    if (ordered(own, shared)) {
      own = {launch_, block_, epoch_, clock, uint16_t(thread_), Touch::thread_alone, where};
    } else if (own.block != block_ || own.who == Touch::several_blocks) {
      own = {launch_, block_, epoch_, 0, uint16_t(thread_), Touch::several_blocks, where};
    } else if (own.who == Touch::several_warps || own.thread / kWarp != thread_ / kWarp) {
      own.who = Touch::several_warps;
    } else {
      if (own.who == Touch::thread_alone) {
        Clocks clocks{};
        clocks[own.thread % kWarp] = own.clock;
        own.who = Touch::lanes_of_warp;
        own.clock = uint32_t(lanes_.size());
        lanes_.push_back(clocks);
      }
      lanes_[own.clock][thread_ % kWarp] = clock;
    }
  }

  void report(const Touch& before, Kind was, Kind is, uintptr_t at, size_t bytes, bool shared,
              const void* where) {
    found_ = "race: " + std::string(kNames[int(is)]) + " of " + std::to_string(bytes) +
             " bytes of " +
             (shared ? "shared memory, at byte " + std::to_string(at - shared_.begin)
                     : "global memory") +
             " by thread " + std::to_string(thread_) + " of block " + std::to_string(block_) +
             " (" + line_of(where) + ") and " + kNames[int(was)] + " by thread " +
             std::to_string(before.thread) + " of block " + std::to_string(before.block) + " (" +
             line_of(before.where) + "), with nothing that orders them";
  }

  uint32_t launch_ = 0, block_ = 0, epoch_ = 0;
  unsigned thread_ = 0;
  Clocks* mine_ = nullptr;
  Range shared_, stack_;
  std::array<std::array<Clocks, kWarp>, 1024 / kWarp> seen_{};  // clocks that lanes know of others
  std::vector<Clocks> lanes_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, 64> recent_{};
  std::string found_;
};

Tracker& tracker() {
  static Tracker* one = new Tracker;  // never destroyed: other threads may still run at exit
  return *one;
}
// Null while this OS thread runs no device code.
thread_local Tracker* running = nullptr;

}  // namespace

void touched(Kind kind, const void* p, size_t bytes, const void* where) {
  Tracker* const tracker = running;
  if (tracker == nullptr) return;
  running = nullptr;  // its own calls of memset come here, too
  tracker->touch(kind, p, bytes, where);
  running = tracker;
}

void start_launch() { tracker().start_launch(); }
void start_block(uint64_t index, const void* shared, size_t bytes) {
  tracker().start_block(index, shared, bytes);
}
void pass_barrier() { tracker().pass_barrier(); }
void sync_lanes(unsigned warp, unsigned mask) { tracker().sync_lanes(warp, mask); }
void enter(unsigned thread, const void* stack, size_t bytes) {
  tracker().enter(thread, stack, bytes);
  running = &tracker();
}
void leave() { running = nullptr; }
Unseen::Unseen(bool on) : before_(running) {
  if (on) running = nullptr;
}
Unseen::~Unseen() { running = static_cast<Tracker*>(before_); }
void read(const void* p, size_t bytes, const void* where) { touched(Kind::read, p, bytes, where); }
void wrote(const void* p, size_t bytes, const void* where) {
  touched(Kind::write, p, bytes, where);
}
std::string found() { return tracker().found(); }

}  // namespace fedpeft::emulator::races

namespace races = fedpeft::emulator::races;

// What -fsanitize=thread calls.
extern "C" {

#define FEDPEFT_ACCESS(name, kind, bytes)                                     \
  void __tsan_##name(void* p) {                                               \
    races::touched(races::Kind::kind, p, bytes, __builtin_return_address(0)); \
  }
#define FEDPEFT_ACCESSES(bytes)                      \
  FEDPEFT_ACCESS(read##bytes, read, bytes)           \
  FEDPEFT_ACCESS(write##bytes, write, bytes)         \
  FEDPEFT_ACCESS(unaligned_read##bytes, read, bytes) \
  FEDPEFT_ACCESS(unaligned_write##bytes, write, bytes)
FEDPEFT_ACCESSES(1)
FEDPEFT_ACCESSES(2)
FEDPEFT_ACCESSES(4)
FEDPEFT_ACCESSES(8)
FEDPEFT_ACCESSES(16)

void __tsan_read_range(void* p, size_t bytes) {
  races::touched(races::Kind::read, p, bytes, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  races::touched(races::Kind::write, p, bytes, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}

#define FEDPEFT_ATOMICS(bits, T)                                                            \
  T __tsan_atomic##bits##_load(const T* p, int) {                                           \
    races::touched(races::Kind::atomic, p, sizeof(T), __builtin_return_address(0));         \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                            \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_add(T* p, T value, int) {                                   \
    races::touched(races::Kind::atomic, p, sizeof(T), __builtin_return_address(0));         \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                  \
  }                                                                                         \
  T __tsan_atomic##bits##_fetch_or(T* p, T value, int) {                                    \
    races::touched(races::Kind::atomic, p, sizeof(T), __builtin_return_address(0));         \
    return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST);                                   \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_strong(T* p, T* expected, T value, int, int) { \
    races::touched(races::Kind::atomic, p, sizeof(T), __builtin_return_address(0));         \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,         \
                                       __ATOMIC_SEQ_CST);                                   \
  }                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(T* p, T* expected, T value, int, int) {   \
    races::touched(races::Kind::atomic, p, sizeof(T), __builtin_return_address(0));         \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST,         \
                                       __ATOMIC_SEQ_CST);                                   \
  }
FEDPEFT_ATOMICS(8, uint8_t)
FEDPEFT_ATOMICS(32, uint32_t)
FEDPEFT_ATOMICS(64, uint64_t)

// Of this module's calls (the linker's --wrap), which the compiler does not announce.
void* __real_memcpy(void* to, const void* from, size_t bytes);
void* __real_memset(void* to, int value, size_t bytes);
void* __wrap_memcpy(void* to, const void* from, size_t bytes) {
  races::touched(races::Kind::read, from, bytes, __builtin_return_address(0));
  races::touched(races::Kind::write, to, bytes, __builtin_return_address(0));
  return __real_memcpy(to, from, bytes);
}
void* __wrap_memset(void* to, int value, size_t bytes) {
  races::touched(races::Kind::write, to, bytes, __builtin_return_address(0));
  return __real_memset(to, value, bytes);
}
}

#endif
