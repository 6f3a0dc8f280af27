// Stacks to switch between, with what AddressSanitizer and ThreadSanitizer are told of it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

// Saves the registers that a call preserves, and the stack pointer to *from; continues where `to` was saved.
extern "C" void cuda_on_cpu_switch(void** from, void* to);

// Null unless the kernels are built with -fsanitize=address or thread.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, size_t size);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_acquire(void* clock);
__attribute__((weak)) void __tsan_release(void* clock);
__attribute__((weak)) void __tsan_ignore_thread_begin();
__attribute__((weak)) void __tsan_ignore_thread_end();
}

#if defined(__x86_64__)
__asm__(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");
constexpr int kSavedWords = 8, kReturnWord = 6;  // the last one keeps the stack aligned
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, %function
cuda_on_cpu_switch:
  stp x29, x30, [sp, -160]!
  stp x19, x20, [sp, 16]; stp x21, x22, [sp, 32]; stp x23, x24, [sp, 48]; stp x25, x26, [sp, 64]; stp x27, x28, [sp, 80]
  stp d8, d9, [sp, 96]; stp d10, d11, [sp, 112]; stp d12, d13, [sp, 128]; stp d14, d15, [sp, 144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, 16]; ldp x21, x22, [sp, 32]; ldp x23, x24, [sp, 48]; ldp x25, x26, [sp, 64]; ldp x27, x28, [sp, 80]
  ldp d8, d9, [sp, 96]; ldp d10, d11, [sp, 112]; ldp d12, d13, [sp, 128]; ldp d14, d15, [sp, 144]
  ldp x29, x30, [sp], 160
  ret
)");
constexpr int kSavedWords = 20, kReturnWord = 1;
#else
#error "cuda_on_cpu switches stacks on x86-64 and aarch64 only"
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kGuard = 64 << 10, kStack = 128 << 10;  // below every stack lie bytes that no one may touch
constexpr unsigned kNoSync = 1;                          // a switch orders nothing: threads run at the same time

inline bool is_sanitized() { return __sanitizer_start_switch_fiber || __tsan_acquire; }

void acquire(void* clock) {
  if (__tsan_acquire) __tsan_acquire(clock);
}

void release(void* clock) {
  if (__tsan_release) __tsan_release(clock);
}

// For memory that one thread allocates and another frees, which orders nothing between kernels' threads.
struct Unwatched {
  Unwatched() {
    if (__tsan_ignore_thread_begin) __tsan_ignore_thread_begin();
  }
  ~Unwatched() {
    if (__tsan_ignore_thread_end) __tsan_ignore_thread_end();
  }
};

struct Stack {
  void* pointer = nullptr;  // where its owner goes on; null: nowhere
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;  // ThreadSanitizer's
};

// The stack that the caller runs on.
void adopt(Stack& stack) {
  if (__tsan_get_current_fiber) stack.tsan = __tsan_get_current_fiber();
}

// Who is switched to calls entry(), on a stack that is his alone. Those that begin at different cache lines, by their
// colours, do not evict each other.
void begin(Stack& stack, void (*entry)(), ptrdiff_t colour) {
  if (stack.bottom == nullptr) {
    void* pages = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE) != 0) std::perror("cuda_on_cpu: stack"), std::abort();
    stack.bottom = static_cast<char*>(pages) + kGuard;
    stack.size = kStack;
  }
  if (__tsan_create_fiber) stack.tsan = __tsan_create_fiber(0);
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack.bottom) + kStack - static_cast<uintptr_t>(colour) * 128;
  void** saved = reinterpret_cast<void**>(top) - kSavedWords;
  std::fill_n(saved, kSavedWords, nullptr);
  saved[kReturnWord] = reinterpret_cast<void*>(entry);
  stack.pointer = saved;
}

// Forgets whoever will never run on.
void abandon(Stack& stack) {
  if (__tsan_destroy_fiber) __tsan_destroy_fiber(stack.tsan);
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack.bottom, kStack);
  stack.pointer = nullptr;
}

void switch_stack(Stack& from, Stack& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoSync);
  cuda_on_cpu_switch(&from.pointer, to.pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake, &to.bottom, &to.size);
}

// What entry() does first.
void finish_first_switch(Stack& stack) {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &stack.bottom, &stack.size);
}

}  // namespace
}  // namespace cuda_on_cpu
