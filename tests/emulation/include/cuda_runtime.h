// Runs CUDA kernels on the CPU: found instead of CUDA's own header, it gives every CUDA thread a fiber.
//
// Blocks run one after another, in random order. Between two barriers the warps of a block run one after
// another, each as far as it can get: what a kernel leaves unordered happens in extreme orders. Shared memory
// starts as NaN and ends where the launch says. A launch ends the program with exit code 3 and "emulation:
// ..." if threads disagree about a barrier or lanes about a warp operation. Not modelled: memory ordering,
// atomics, tensor cores, more than one stream.
#pragma once
#include <sanitizer/asan_interface.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "fiber.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

// Of the running thread: the scheduler sets them.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 << 10, kMostSharedBytes = 48 << 10;

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "emulation: %s\n", what.c_str());
  std::_Exit(3);
}

struct Thread {
  enum State { kReady, kAtBarrier, kAtWarp, kDone };

  Fiber fiber{};
  void* stack = nullptr;
  void* fake_stack = nullptr;  // of the address sanitizer
  dim3 index;
  unsigned number = 0, mask = 0;
  State state = kReady;
  const char* where = "";
  // A lane can be one warp operation ahead of another, never two.
  uint64_t slots[2] = {};
  unsigned operations = 0;

  unsigned lane() const { return number % kLanes; }
};

struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  size_t count = 0;  // of the running block
  Thread* current = nullptr;
  Fiber scheduler{};
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  std::function<void()> kernel;
  std::mt19937 random{0};
  unsigned char* shared = nullptr;

  static Machine& get() {
    static Machine machine;
    return machine;
  }
};

inline void seed(unsigned value) { Machine::get().random.seed(value); }

// kMostSharedBytes of memory behind the kernels' extern __shared__ array.
inline void use_shared_memory(unsigned char* memory) { Machine::get().shared = memory; }

// The sanitizer is told that the stack changes.
inline void leave_stack([[maybe_unused]] void** fake_stack, [[maybe_unused]] const void* next,
                        [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(fake_stack, next, bytes);
#endif
}
inline void enter_stack([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** previous,
                        [[maybe_unused]] size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, previous, bytes);
#endif
}

inline void pause(bool for_good = false) {
  Machine& m = Machine::get();
  Thread* self = m.current;
  leave_stack(for_good ? nullptr : &self->fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
  go_on(self->fiber, m.scheduler);
  enter_stack(self->fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
}

inline void thread_main() {
  Machine& m = Machine::get();
  enter_stack(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
  m.kernel();
  m.current->state = Thread::kDone;
  pause(true);
}

inline void resume(Thread& thread) {
  Machine& m = Machine::get();
  m.current = &thread;
  threadIdx = thread.index;
  leave_stack(&m.scheduler_fake_stack, thread.stack, kStackBytes);
  go_on(m.scheduler, thread.fiber);
  enter_stack(m.scheduler_fake_stack, nullptr, nullptr);
}

inline void wait_for_block(const char* where) {
  Thread& self = *Machine::get().current;
  self.state = Thread::kAtBarrier;
  self.where = where;
  pause();
}

// The value that another lane brings to the same operation.
template <class V>
V exchange(unsigned mask, V value, unsigned source, const char* where) {
  static_assert(sizeof(V) <= sizeof(uint64_t), "a register holds at most 8 bytes");
  Machine& m = Machine::get();
  Thread& self = *m.current;
  if (!(mask >> self.lane() & 1)) fail(std::string("a lane outside its own mask at ") + where);
  if (!(mask >> source & 1)) fail(std::string("a lane reads another outside the mask at ") + where);
  const unsigned slot = self.operations++ % 2;
  std::memcpy(&self.slots[slot], &value, sizeof(V));
  self.state = Thread::kAtWarp;
  self.mask = mask;
  self.where = where;
  pause();
  std::memcpy(&value, &m.threads[self.number - self.lane() + source]->slots[slot], sizeof(V));
  return value;
}

// Lets the lanes of a complete warp operation go on; false if none is complete.
inline bool release_lanes(size_t first) {
  Machine& m = Machine::get();
  const size_t lanes = std::min<size_t>(kLanes, m.count - first);
  for (size_t i = 0; i < lanes; ++i) {
    const Thread& leader = *m.threads[first + i];
    if (leader.state != Thread::kAtWarp) continue;
    bool complete = true;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (!(leader.mask >> lane & 1)) continue;
      if (lane >= lanes || m.threads[first + lane]->state == Thread::kDone) {
        fail(std::string("a warp operation names a lane that has left, at ") + leader.where);
      }
      const Thread& other = *m.threads[first + lane];
      if (other.state != Thread::kAtWarp) {
        complete = false;
      } else if (other.mask != leader.mask || std::strcmp(other.where, leader.where) != 0) {
        fail(std::string("lanes at different warp operations: ") + leader.where + " and " + other.where);
      }
    }
    if (!complete) continue;
    const unsigned mask = leader.mask;
    for (unsigned lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) m.threads[first + lane]->state = Thread::kReady;
    }
    return true;
  }
  return false;
}

inline void run_warp(size_t first) {
  Machine& m = Machine::get();
  std::vector<Thread*> lanes;
  for (size_t i = first; i < std::min(first + kLanes, m.count); ++i) lanes.push_back(m.threads[i].get());
  do {
    std::shuffle(lanes.begin(), lanes.end(), m.random);
    for (Thread* lane : lanes) {
      if (lane->state == Thread::kReady) resume(*lane);
    }
  } while (release_lanes(first));
}

// Every thread is done, at the barrier or stuck; lets them pass the barrier.
inline void release_block() {
  Machine& m = Machine::get();
  const Thread* waiting = nullptr;
  const Thread* done = nullptr;
  for (size_t i = 0; i < m.count; ++i) {
    const Thread& thread = *m.threads[i];
    if (thread.state == Thread::kAtWarp) {
      fail(std::string("deadlock: lanes wait at ") + thread.where + " for lanes that do not come");
    }
    if (thread.state == Thread::kDone) {
      done = &thread;
    } else if (waiting != nullptr && std::strcmp(waiting->where, thread.where) != 0) {
      fail(std::string("threads at different barriers: ") + waiting->where + " and " + thread.where);
    } else {
      waiting = &thread;
    }
  }
  if (done != nullptr && waiting != nullptr) {
    fail(std::string("some threads wait at a barrier and others have returned: ") + waiting->where);
  }
  for (size_t i = 0; i < m.count; ++i) m.threads[i]->state = Thread::kReady;
}

inline void prepare(Thread& thread, size_t number) {
  if (thread.stack == nullptr) {
    thread.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ASAN_UNPOISON_MEMORY_REGION(thread.stack, kStackBytes);  // the last thread to use it never returned
  const auto i = static_cast<unsigned>(number);
  thread.number = i;
  thread.index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
  thread.state = Thread::kReady;
  thread.operations = 0;
  start_fiber(thread.fiber, thread.stack, kStackBytes, thread_main);
}

inline void run_block(size_t shared_bytes) {
  Machine& m = Machine::get();
  ASAN_UNPOISON_MEMORY_REGION(m.shared, kMostSharedBytes);
  std::memset(m.shared, 0xff, kMostSharedBytes);
  ASAN_POISON_MEMORY_REGION(m.shared + shared_bytes, kMostSharedBytes - shared_bytes);
  for (size_t i = 0; i < m.count; ++i) prepare(*m.threads[i], i);
  std::vector<size_t> warps;
  for (size_t first = 0; first < m.count; first += kLanes) warps.push_back(first);
  const auto is_done = [](const std::unique_ptr<Thread>& thread) { return thread->state == Thread::kDone; };
  for (;;) {
    std::shuffle(warps.begin(), warps.end(), m.random);
    for (const size_t first : warps) run_warp(first);
    if (std::all_of(m.threads.begin(), m.threads.begin() + static_cast<long>(m.count), is_done)) return;
    release_block();
  }
}

inline void run_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  Machine& m = Machine::get();
  gridDim = config.gridDim, blockDim = config.blockDim, m.kernel = std::move(kernel);
  m.count = size_t{blockDim.x} * blockDim.y * blockDim.z;
  const size_t blocks = size_t{gridDim.x} * gridDim.y * gridDim.z;
  if (m.count == 0 || m.count > 1024 || blocks == 0 || gridDim.x > 0x7fffffffu)
    fail("a launch outside CUDA's limits");
  if (m.shared == nullptr || config.dynamicSmemBytes > kMostSharedBytes) fail("too much shared memory");
  while (m.threads.size() < m.count) m.threads.push_back(std::make_unique<Thread>());
  std::vector<unsigned> order(blocks);
  for (size_t i = 0; i < blocks; ++i) order[i] = static_cast<unsigned>(i);
  std::shuffle(order.begin(), order.end(), m.random);
  for (const unsigned i : order) {
    blockIdx = dim3(i % gridDim.x, i / gridDim.x % gridDim.y, i / (gridDim.x * gridDim.y));
    run_block(config.dynamicSmemBytes);
  }
}

}  // namespace emulation

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulation::run_grid(*config, [&] { std::apply(kernel, values); });
  return cudaSuccess;
}

template <class V>
void __stwb(V* destination, V value) {
  *destination = value;
}

#define EMULATION_TEXT_OF(x) #x
#define EMULATION_TEXT(x) EMULATION_TEXT_OF(x)
#define EMULATION_WHERE __FILE__ ":" EMULATION_TEXT(__LINE__)
#define __syncthreads() emulation::wait_for_block(EMULATION_WHERE)
#define __shfl_xor_sync(mask, value, offset)                                                         \
  emulation::exchange((mask), (value), emulation::Machine::get().current->lane() ^ unsigned(offset), \
                      EMULATION_WHERE)
