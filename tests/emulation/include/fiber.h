// Where a fiber was left, and how to go on there. swapcontext asks the kernel about signals each time, which
// took most of what an emulation took.
#pragma once
#include <cstddef>
#include <cstdint>

#ifdef __x86_64__

namespace emulation {

using Fiber = void*;  // its stack pointer, above what a call must keep

inline void start_fiber(Fiber& fiber, void* stack, size_t bytes, void (*body)()) {
  auto* top = reinterpret_cast<uint64_t*>(static_cast<char*>(stack) + bytes);
  for (int i = 1; i <= 8; ++i) top[-i] = 0;
  top[-2] = reinterpret_cast<uint64_t>(body);  // what `ret` finds after six registers
  fiber = top - 8;
}

[[gnu::naked, gnu::noinline]] inline void go_on(Fiber& /*left, in rdi*/, const Fiber& /*next, in rsi*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15;"
      "mov %rsp, (%rdi); mov (%rsi), %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}

}  // namespace emulation

#else
#include <ucontext.h>

namespace emulation {

using Fiber = ucontext_t;

inline void start_fiber(Fiber& fiber, void* stack, size_t bytes, void (*body)()) {
  getcontext(&fiber);
  fiber.uc_stack.ss_sp = stack;
  fiber.uc_stack.ss_size = bytes;
  makecontext(&fiber, body, 0);
}

inline void go_on(Fiber& left, const Fiber& next) { swapcontext(&left, &next); }

}  // namespace emulation

#endif
