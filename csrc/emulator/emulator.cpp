// The scheduler of the emulator: fibers, blocks and the checks.
#include "emulator/emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace fedpeft::emulator {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kRedZone = 256;  // bytes around every shared array
constexpr size_t kStaticLimit = 48 << 10;
constexpr unsigned char kCanary = 0xC9;
constexpr unsigned kWarp = 32;

std::atomic<bool> backwards{false};
std::atomic<size_t> limit{227 << 10};  // as of an H100
std::atomic<unsigned> most_blocks{0x7fffffffu};
std::atomic<unsigned> processors{4};
std::atomic<uint64_t> launched{0};
std::string left_out;                                  // "file:line"
std::map<std::pair<const char*, unsigned>, bool> met;  // waits of kernels, and whether left out

// A copy to shared memory in the background, of the batch with this number.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  const void* where;
  unsigned batch = 0;
};

enum class State { runnable, at_barrier, in_warp, done };

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  void* left = nullptr;
  bool started = false;
  State state = State::runnable;
  Place place;
  Site site;
  WarpOp op;
  unsigned mask;
  uint64_t value, result;
  int source;
  std::vector<Copy> copies;  // under way
  unsigned batch = 0;        // of the copies that come
};

std::string at(const std::string& file, unsigned line) {
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line);
}
std::string at(const Site& site) { return at(site.file_name(), site.line()); }

// Whether to go on without waiting at this place (leave_out).
bool passes(const Site& site) {
  if (!races::kSeen) return false;
  const races::Unseen unseen;
  const auto [found, is_new] = met.try_emplace({site.file_name(), site.line()});
  if (is_new) found->second = at(site) == left_out;
  return found->second;
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

// AddressSanitizer must know which stack runs: leave_for() is called before a jump to the stack
// [bottom, bottom + size) and arrive() after it; what arrive() gets is what leave_for() gave when
// the stack was left, null on its first run. `from` then says which stack was left.
struct Stack {
  const void* bottom = nullptr;
  size_t size = 0;
};
#if defined(__SANITIZE_ADDRESS__)
void leave_for(const Stack& stack, void** left) {
  __sanitizer_start_switch_fiber(left, stack.bottom, stack.size);
}
void arrive(void* left, Stack* from) {
  __sanitizer_finish_switch_fiber(left, from ? &from->bottom : nullptr,
                                  from ? &from->size : nullptr);
}
#else
void leave_for(const Stack&, void**) {}
void arrive(void*, Stack*) {}
#endif

// Runs one block at a time on the OS thread that owns it.
class Processor {
 public:
  void run_block(const std::function<void()>& body, dim3 grid, dim3 block, uint64_t index,
                 size_t shared) {
    body_ = &body;
    dynamic_bytes_ = shared;
    error_ = nullptr;
    const unsigned threads = block.x * block.y * block.z;
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    const bool reverse = backwards;
    prepare_shared(reverse ? 0xA5 : 0xFF);
    races::start_block(index, shared_.data(), shared_.size());
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = *fibers_[t];
      f.state = State::runnable;
      f.copies.clear();
      f.batch = 0;
      f.place = {{t % block.x, t / block.x % block.y, t / block.x / block.y},
                 {unsigned(index % grid.x), unsigned(index / grid.x % grid.y),
                  unsigned(index / grid.x / grid.y)},
                 block,
                 grid};
    }
    try {
      schedule(threads, reverse);
      check_red_zones();
      if (std::string race = races::found(); !race.empty()) throw Fault(race);
    } catch (...) {
      // Threads stopped on the way have nothing to destroy; their fibers start afresh.
      for (unsigned t = 0; t < threads; ++t) fibers_[t]->started = false;
      throw;
    }
  }

  Fiber& current() {
    if (current_ == nullptr) throw std::logic_error("device code called outside a kernel");
    return *current_;
  }

  void wait(State state) {
    Fiber& f = *current_;
    f.state = state;
    races::leave();
    leave_for(home_, &f.left);
    if (_setjmp(f.here) == 0) _longjmp(scheduler_, 1);
    arrive(f.left, nullptr);
    races::enter(number_of(f), f.stack.get(), kStack);
  }

  void* dynamic_data() { return shared_.data() + offset_ + kRedZone; }

  bool is_shared(const void* p) const {
    const auto* at = static_cast<const unsigned char*>(p);
    return at >= shared_.data() && at < shared_.data() + shared_.size();
  }

  void* static_data(const void* key, size_t bytes) {
    for (const Array& array : arrays_) {
      if (array.key == key) return shared_.data() + array.begin;
    }
    const size_t begin = arrays_.back().end + kRedZone;
    const size_t end = begin + (bytes + 15) / 16 * 16;
    if (end + kRedZone > static_end_) throw Fault("more than 48 KiB of static shared memory");
    size_t used = dynamic_bytes_ + (end - begin);
    for (size_t i = 1; i < arrays_.size(); ++i) used += arrays_[i].end - arrays_[i].begin;
    if (used > limit)
      throw Fault("dynamic and static shared memory take " + std::to_string(used) + " bytes");
    arrays_.push_back({key, begin, begin + bytes, end});
    const races::Unseen unseen;
    std::memset(shared_.data() + begin, poison_, bytes);
    return shared_.data() + begin;
  }

  // In its block.
  static unsigned number_of(const Fiber& f) {
    const Place& p = f.place;
    return p.thread.x + p.block_size.x * (p.thread.y + p.block_size.y * p.thread.z);
  }

  // The background has no time of its own here: a copy is made as soon, or in the other order of
  // threads as late, as a device could.
  void copy_later(Fiber& f, const Copy& copy) {
    f.copies.push_back(copy);
    f.copies.back().batch = f.batch;
    if (!backwards) make(copy);
    races::read(copy.from, copy.bytes, copy.where);
    races::wrote(copy.to, copy.bytes, copy.where);
  }
  void wait_for_copies(Fiber& f, unsigned under_way) {
    const auto done = [&](const Copy& copy) { return copy.batch + under_way < f.batch; };
    for (const Copy& copy : f.copies) {
      if (!done(copy)) continue;
      if (backwards) make(copy);
      races::wrote(copy.to, copy.bytes, copy.where);
    }
    std::erase_if(f.copies, done);
  }

  static Processor& mine() {
    thread_local Processor processor;
    return processor;
  }

 private:
  struct Array {
    const void* key;
    size_t begin, used, end;
  };

  void prepare_shared(unsigned char poison) {
    poison_ = poison;
    const size_t needed = dynamic_bytes_ + kStaticLimit + 4 * kRedZone + 64;
    if (shared_.size() < needed) shared_.resize(needed);
    offset_ = size_t(-reinterpret_cast<intptr_t>(shared_.data())) & 63;
    std::memset(shared_.data(), kCanary, needed);
    const size_t begin = offset_ + kRedZone;
    std::memset(shared_.data() + begin, poison, dynamic_bytes_);
    arrays_.assign(
        {{nullptr, begin, begin + dynamic_bytes_, begin + (dynamic_bytes_ + 15) / 16 * 16}});
    static_end_ = needed;
  }

  void check_red_zones() const {
    size_t next = 0;
    for (size_t i = 0; i <= arrays_.size(); ++i) {
      const size_t end = i < arrays_.size() ? arrays_[i].begin : static_end_;
      for (size_t b = next; b < end; ++b) {
        if (shared_[b] != kCanary) {
          throw Fault("a write past shared memory: " +
                      std::to_string(int64_t(b) - int64_t(i ? arrays_[i - 1].used : end)) +
                      " bytes past the end of " + (i <= 1 ? "dynamic" : "static") +
                      " shared memory");
        }
      }
      if (i < arrays_.size()) next = arrays_[i].used;
    }
  }

  // A barrier orders no copy that its thread has not waited for: it is as if made after it.
  static void go_on_copying(const Fiber& f) {
    if (!races::kSeen || f.copies.empty()) return;
    races::enter(number_of(f), f.stack.get(), kStack);
    for (const Copy& copy : f.copies) races::wrote(copy.to, copy.bytes, copy.where);
    races::leave();
  }

  static void make(const Copy& copy) {
    const races::Unseen unseen;
    std::memcpy(copy.to, copy.from, copy.bytes);
  }

  static void enter(unsigned high, unsigned low) {
    Processor& p = *reinterpret_cast<Processor*>(uint64_t(high) << 32 | low);
    arrive(nullptr, &p.home_);
    for (;;) {
      races::enter(number_of(*p.current_), p.current_->stack.get(), kStack);
      try {
        (*p.body_)();
      } catch (...) {
        if (!p.error_) p.error_ = std::current_exception();
      }
      p.wait(State::done);
    }
  }

  void resume(Fiber& f) {
    current_ = &f;
    if (!f.stack) f.stack = std::make_unique_for_overwrite<char[]>(kStack);
    leave_for({f.stack.get(), kStack}, &left_);
    if (_setjmp(scheduler_) == 0) {
      if (f.started) _longjmp(f.here, 1);
      f.started = true;
      getcontext(&f.start);
      f.start.uc_stack.ss_sp = f.stack.get();
      f.start.uc_stack.ss_size = kStack;
      f.start.uc_link = nullptr;
      const uint64_t self = reinterpret_cast<uint64_t>(this);
      makecontext(&f.start, reinterpret_cast<void (*)()>(&enter), 2, unsigned(self >> 32),
                  unsigned(self));
      setcontext(&f.start);
    }
    arrive(left_, nullptr);
    current_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

  void schedule(unsigned threads, bool reverse) {
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (;;) {
      for (unsigned w = 0; w < warps; ++w) run_warp(reverse ? warps - 1 - w : w, threads, reverse);
      unsigned done = 0;
      const Fiber* waiting = nullptr;
      for (unsigned t = 0; t < threads; ++t) {
        const Fiber& f = *fibers_[t];
        if (f.state == State::done) {
          ++done;
        } else if (waiting && !same(waiting->site, f.site)) {
          throw Fault("divergent barrier: threads of a block wait at " + at(waiting->site) +
                      " and " + at(f.site));
        } else {
          waiting = &f;
        }
      }
      if (!waiting) return;
      races::pass_barrier();
      for (unsigned t = 0; t < threads; ++t) go_on_copying(*fibers_[t]);
      if (done) {
        throw Fault("divergent barrier: " + std::to_string(done) +
                    " threads ended while others wait at " + at(waiting->site));
      }
      for (unsigned t = 0; t < threads; ++t) fibers_[t]->state = State::runnable;
    }
  }

  // Until every lane has ended or waits at a barrier of the block.
  void run_warp(unsigned warp, unsigned threads, bool reverse) {
    const unsigned first = warp * kWarp, count = std::min(kWarp, threads - first);
    Fiber* lanes[kWarp];
    for (unsigned i = 0; i < count; ++i) lanes[i] = fibers_[first + i].get();
    for (;;) {
      for (unsigned i = 0; i < count; ++i) {
        Fiber& f = *lanes[reverse ? count - 1 - i : i];
        if (f.state == State::runnable) resume(f);
      }
      bool progress = false;
      const Fiber* stuck = nullptr;
      for (unsigned i = 0; i < count; ++i) {
        if (lanes[i]->state != State::in_warp) continue;
        if (complete(lanes, count, i)) {
          if (lanes[i]->op == WarpOp::sync) {
            races::sync_lanes(warp, lanes[i]->mask);
            for (unsigned j = 0; j < count; ++j) go_on_copying(*lanes[j]);
          }
          release(lanes, count, lanes[i]->mask);
          progress = true;
        } else {
          stuck = lanes[i];
        }
      }
      if (stuck && !progress) throw Fault("divergent warp operation at " + at(stuck->site));
      if (!progress) return;
    }
  }

  static bool complete(Fiber* const* lanes, unsigned count, unsigned asking) {
    const Fiber& f = *lanes[asking];
    if (!(f.mask >> asking & 1))
      throw Fault("warp operation at " + at(f.site) + ": the mask lacks the calling lane");
    for (unsigned i = 0; i < kWarp; ++i) {
      if (!(f.mask >> i & 1)) continue;
      if (i >= count || lanes[i]->state == State::done) {
        throw Fault("warp operation at " + at(f.site) + ": the mask names lane " +
                    std::to_string(i) + ", which has exited");
      }
      const Fiber& other = *lanes[i];
      if (other.state != State::in_warp || other.mask != f.mask || other.op != f.op ||
          !same(other.site, f.site))
        return false;
    }
    return true;
  }

  static void release(Fiber* const* lanes, unsigned count, unsigned mask) {
    unsigned votes = 0;
    for (unsigned i = 0; i < count; ++i)
      votes |= unsigned((mask >> i & 1) && lanes[i]->value != 0) << i;
    for (unsigned i = 0; i < count; ++i) {
      if (!(mask >> i & 1)) continue;
      Fiber& f = *lanes[i];
      f.state = State::runnable;
      f.result = votes;
      if (f.op == WarpOp::shuffle) {
        if (unsigned(f.source) >= kWarp || !(mask >> f.source & 1)) {
          throw Fault("shuffle at " + at(f.site) + " reads lane " + std::to_string(f.source) +
                      ", which takes no part in it");
        }
        f.result = lanes[f.source]->value;
      } else if (f.op == WarpOp::match) {
        f.result = 0;
        for (unsigned j = 0; j < count; ++j)
          f.result |= uint64_t((mask >> j & 1) && lanes[j]->value == f.value) << j;
      }
    }
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  Stack home_;  // the scheduler's
  void* left_ = nullptr;
  std::exception_ptr error_;
  std::vector<unsigned char> shared_;
  std::vector<Array> arrays_;
  size_t offset_ = 0, dynamic_bytes_ = 0, static_end_ = 0;
  unsigned char poison_ = 0;
};

// Threads that live as long as the process, each with the fibers it made.
class Workers {
 public:
  void run(const std::function<void()>& work) {
    std::lock_guard one_launch(launch_);
    std::unique_lock lock(mutex_);
    while (threads_ < std::max(1u, std::thread::hardware_concurrency())) {
      std::thread([this] { loop(); }).detach();
      ++threads_;
    }
    work_ = &work;
    ++generation_;
    busy_ = threads_;
    wake_.notify_all();
    finished_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void loop() {
    uint64_t seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      const std::function<void()>* work = work_;
      lock.unlock();
      (*work)();
      lock.lock();
      if (--busy_ == 0) finished_.notify_all();
    }
  }

  std::mutex launch_, mutex_;
  std::condition_variable wake_, finished_;
  unsigned threads_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
  const std::function<void()>* work_ = nullptr;
};

}  // namespace

void set_backwards(bool on) { backwards = on; }
void set_shared_limit(size_t bytes) { limit = bytes; }
size_t shared_limit() { return limit; }
void set_grid_limit(unsigned blocks) { most_blocks = blocks; }
unsigned grid_limit() { return most_blocks; }
void set_multiprocessors(unsigned count) { processors = count; }
unsigned multiprocessors() { return processors; }
uint64_t launches() { return launched; }
void leave_out(const std::string& place) {
  left_out = place;
  met.clear();
}
std::vector<std::string> waits() {
  std::set<std::string> places;
  for (const auto& [place, skipped] : met) places.insert(at(place.first, place.second));
  return {places.begin(), places.end()};
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > most_blocks || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    throw Fault("invalid launch: grid " + std::to_string(grid.x) + ", block " +
                std::to_string(threads));
  }
  if (shared > limit)
    throw Fault("launch asks for " + std::to_string(shared) + " bytes of shared memory");
  ++launched;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  uint64_t failed = blocks;  // the error of the lowest block is the one reported
  const auto work = [&] {
    for (uint64_t b; (b = next.fetch_add(1)) < blocks;) {
      try {
        Processor::mine().run_block(body, grid, block, b, shared);
      } catch (...) {
        std::lock_guard lock(mutex);
        if (b < failed) {
          failed = b;
          error = std::current_exception();
        }
        next = blocks;
      }
    }
  };
  if (races::kSeen) {
    static std::mutex one_launch;
    std::lock_guard lock(one_launch);
    races::start_launch();
    work();
  } else {
    static Workers* workers = new Workers;  // never destroyed: its threads outlive main
    workers->run(work);
  }
  if (error) std::rethrow_exception(error);
}

const Place& place() { return Processor::mine().current().place; }
void* dynamic_shared() { return Processor::mine().dynamic_data(); }
void* static_shared(const void* key, size_t bytes) {
  return Processor::mine().static_data(key, bytes);
}
int lane() {
  Processor& p = Processor::mine();
  return int(p.number_of(p.current()) % kWarp);
}

void check_global(const void* p) {
  if (Processor::mine().is_shared(p)) throw Fault("shared memory used as global memory");
}
void copy_later(void* to, const void* from, size_t bytes) {
  Processor& p = Processor::mine();
  p.copy_later(p.current(), {to, from, bytes, __builtin_return_address(0)});
}
void commit_copies() { ++Processor::mine().current().batch; }
void wait_for_copies(unsigned under_way, Site site) {
  if (passes(site)) return;
  Processor& p = Processor::mine();
  p.wait_for_copies(p.current(), under_way);
}

void barrier(Site site) {
  if (passes(site)) return;
  Processor& p = Processor::mine();
  p.current().site = site;
  p.wait(State::at_barrier);
}

uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int source, Site site) {
  if (op == WarpOp::sync && passes(site)) return 0;
  Processor& p = Processor::mine();
  Fiber& f = p.current();
  f.op = op;
  f.mask = mask;
  f.value = value;
  f.source = source;
  f.site = site;
  p.wait(State::in_warp);
  return f.result;
}

}  // namespace fedpeft::emulator
