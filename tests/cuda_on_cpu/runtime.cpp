// Fibers, who of them runs next, and where they wait for each other. Never built with -fsanitize: the sanitizers are
// told of every change of stack, and see the kernels alone.
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime_api.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

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

constexpr unsigned kMaxThreads = 1024, kWarp = warpSize;
constexpr size_t kMaxSharedBytes = 227 << 10;
constexpr size_t kGuard = 64 << 10, kStack = 128 << 10;  // below every stack lie bytes that no one may touch
constexpr uint64_t kMaxTurns = 10000;                    // of a thread, on average
constexpr unsigned kNoSync = 1;                          // a switch orders nothing: threads run at the same time

struct Call {
  const char* operation;
  Site site;
  unsigned mask;  // of lanes; 0: the block
};

// Where a block, or the lanes of a mask, wait for each other.
struct Meeting {
  Call call;  // of those that wait
  unsigned arrived = 0;
  unsigned round = 0;
  char clocks[2];  // for ThreadSanitizer; in turn, so that who leaves late learns nothing of the next round
};

enum class State { ready, waiting, exited };

struct Stack {
  void* pointer = nullptr;  // where its owner goes on; null: nowhere
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;  // ThreadSanitizer's
};

struct Fiber {
  Stack stack;
  uint3 index = {};
  State state = State::exited;
  Meeting* meeting = nullptr;  // the last one
  uint64_t given = 0, taken = 0;
  int source = kSum;
};

Fiber fibers[kMaxThreads];
Meeting block_meeting, lane_meetings[kMaxThreads];  // a mask's meeting is that of its lowest lane
Fiber* current = nullptr;                           // null outside of a kernel
Fiber* ready[kMaxThreads];
unsigned ready_count = 0, size = 0, exited = 0;

const void* kernel = nullptr;
void (*body)(const void*) = nullptr;
const void* body_context = nullptr;
void* shared = nullptr;
std::string error;

Stack main_stack;
char begin_clock, end_clock;

uint64_t random_state = 1;

unsigned random_below(unsigned bound) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((random_state >> 32) * bound >> 32);
}

void acquire(void* clock) {
  if (__tsan_acquire) __tsan_acquire(clock);
}

void release(void* clock) {
  if (__tsan_release) __tsan_release(clock);
}

// --- fibers -------------------------------------------------------------------------------------------------------

void switch_stack(Stack& from, Stack& to) {
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, kNoSync);
  cuda_on_cpu_switch(&from.pointer, to.pointer);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake, &to.bottom, &to.size);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  switch_stack(main_stack, fiber.stack);
  current = nullptr;
}

void suspend() { switch_stack(current->stack, main_stack); }

// A fiber outlives its thread and runs that of the next block.
void run_fiber() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_stack.bottom, &main_stack.size);
  for (;;) {
    acquire(&begin_clock);
    body(body_context);
    release(&end_clock);
    current->state = State::exited;
    ++exited;
    suspend();
  }
}

void create(Fiber& fiber) {
  Stack& stack = fiber.stack;
  if (stack.bottom == nullptr) {
    void* pages = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED || mprotect(pages, kGuard, PROT_NONE) != 0) std::perror("cuda_on_cpu: stack"), std::abort();
    stack.bottom = static_cast<char*>(pages) + kGuard;
    stack.size = kStack;
  }
  if (__tsan_create_fiber) stack.tsan = __tsan_create_fiber(0);
  // Stacks that begin at different cache lines do not evict each other.
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack.bottom) + kStack - (&fiber - fibers) % 64 * 128;
  void** saved = reinterpret_cast<void**>(top) - kSavedWords;
  std::fill_n(saved, kSavedWords, nullptr);
  saved[kReturnWord] = reinterpret_cast<void*>(&run_fiber);
  stack.pointer = saved;
}

// Forgets fibers that will never run on.
void abandon_fibers() {
  for (Fiber& fiber : fibers) {
    if (fiber.stack.pointer == nullptr) continue;
    if (__tsan_destroy_fiber) __tsan_destroy_fiber(fiber.stack.tsan);
    if (fiber.meeting != nullptr) acquire(&fiber.meeting->clocks[0]), acquire(&fiber.meeting->clocks[1]);
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fiber.stack.bottom, kStack);
    fiber.stack.pointer = nullptr;
  }
}

// --- errors -------------------------------------------------------------------------------------------------------

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

// From the symbol table, by binutils, which a compiler brings along.
std::string kernel_name() {
  Dl_info info;
  char line[1024] = "??";
  if (dladdr(kernel, &info) == 0) return line;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
  FILE* pipe = popen(text("addr2line -Cfse '%s' %#zx 2>/dev/null", info.dli_fname, offset).c_str(), "r");
  if (pipe == nullptr) return line;
  if (std::fgets(line, sizeof line, pipe) == nullptr) line[0] = 0;
  pclose(pipe);
  return std::string(line).substr(0, std::strcspn(line, "\n"));
}

std::string description(const Call& call) {
  const std::string mask = call.mask == 0 ? "" : text(", mask 0x%08x", call.mask);
  return text("%s at %s:%d", call.operation, call.site.file, call.site.line) + mask;
}

// What each thread of the block does, threads that do the same together.
std::string whereabouts() {
  std::map<std::string, std::vector<unsigned>> threads;
  for (unsigned i = 0; i < size; ++i) {
    const Fiber& fiber = fibers[i];
    std::string doing = &fiber == current ? "failed" : "are ready to run";
    if (fiber.state == State::exited) doing = "have exited";
    if (fiber.state == State::waiting) doing = "wait in " + description(fiber.meeting->call);
    threads[doing].push_back(i);
  }
  std::string lines;
  for (const auto& [doing, who] : threads)
    lines += text("\n  %zu threads (%u to %u) ", who.size(), who.front(), who.back()) + doing;
  return lines;
}

void set_error(const std::string& what) {
  error = kernel_name() + text(", block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z) + what + whereabouts();
}

// --- blocks -------------------------------------------------------------------------------------------------------

// Owns nothing when it suspends: no destructor of this thread will run.
[[noreturn]] void fail(const Call& call, const char* why) {
  const unsigned thread = static_cast<unsigned>(current - fibers);
  set_error(text(", thread %u: ", thread) + description(call) + ": " + why);
  release(&end_clock);
  suspend();
  std::abort();  // not reached: a launch that failed resumes no thread
}

bool same(const Call& a, const Call& b) {
  return a.mask == b.mask && a.site.line == b.site.line && std::strcmp(a.site.file, b.site.file) == 0;
}

// The calling thread waits until `expected` of the threads from `first` to `last` have come.
uint64_t meet(Meeting& meeting, const Call& call, unsigned first, unsigned last, unsigned expected) {
  Fiber& me = *current;
  if (meeting.arrived == 0) {
    meeting.call = call;
    ++meeting.round;
  } else if (!same(meeting.call, call)) {
    fail(call, "other threads wait elsewhere or with another mask");
  }
  char* clock = &meeting.clocks[meeting.round % 2];
  release(clock);
  me.meeting = &meeting;
  me.state = State::waiting;
  if (++meeting.arrived == expected) {
    uint64_t sum = 0;
    const auto each = [&](auto visit) {
      for (unsigned i = first; i < last; ++i)
        if (fibers[i].state == State::waiting && fibers[i].meeting == &meeting) visit(fibers[i]);
    };
    each([&](Fiber& fiber) { sum += fiber.given; });
    each([&](Fiber& fiber) { fiber.taken = fiber.source == kSum ? sum : fibers[first + fiber.source].given; });
    each([](Fiber& fiber) { fiber.state = State::ready, ready[ready_count++] = &fiber; });
    meeting.arrived = 0;
  }
  suspend();
  acquire(clock);
  return me.taken;
}

void begin_block() {
  exited = 0;
  block_meeting.arrived = 0;
  for (ready_count = 0; ready_count < size; ++ready_count) {
    Fiber& fiber = fibers[ready_count];
    if (fiber.stack.pointer == nullptr) create(fiber);
    const unsigned row = ready_count / blockDim.x;
    fiber.index = {ready_count % blockDim.x, row % blockDim.y, row / blockDim.y};
    fiber.state = State::ready;
    lane_meetings[ready_count].arrived = 0;
    ready[ready_count] = &fiber;
  }
  release(&begin_clock);
}

void run_threads() {
  uint64_t turns = kMaxTurns * size;
  while (ready_count > 0 && error.empty()) {
    if (turns-- == 0) return set_error(": endless loop");
    std::swap(ready[random_below(ready_count)], ready[ready_count - 1]);
    resume(*ready[--ready_count]);
  }
  if (error.empty() && exited < size) set_error(": deadlock");
}

void run_block() {
  begin_block();
  run_threads();
  if (!error.empty()) abandon_fibers();
  acquire(&end_clock);
}

}  // namespace

void* shared_memory() { return shared; }

void fail(const char* operation, Site site, const char* why) { fail({operation, site, 0}, why); }

void meet_block(const char* operation, Site site) { meet(block_meeting, {operation, site, 0}, 0, size, size); }

uint64_t meet_lanes(const char* operation, unsigned mask, uint64_t value, int source, Site site) {
  const Call call = {operation, site, mask};
  const unsigned id = static_cast<unsigned>(current - fibers), warp = id / kWarp * kWarp;
  if ((mask >> id % kWarp & 1) == 0) fail(call, "the mask leaves out the calling lane");
  if (source != kSum && (mask >> source & 1) == 0) fail(call, "the mask leaves out the lane that is read");
  current->given = value;
  current->source = source;
  Meeting& meeting = lane_meetings[warp + static_cast<unsigned>(__builtin_ctz(mask))];
  const unsigned lanes = static_cast<unsigned>(__builtin_popcount(mask));
  return meet(meeting, call, warp, std::min(warp + kWarp, size), lanes);
}

int run(const void* kernel_, dim3 grid, dim3 block, size_t shared_bytes, void (*body_)(const void*),
        const void* context) {
  error.clear();
  kernel = kernel_, body = body_, body_context = context;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > kMaxThreads || blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > kMaxSharedBytes) {
    error =
        kernel_name() + text(": %zu blocks of %zu threads with %zu bytes are no launch", blocks, threads, shared_bytes);
    return cudaErrorInvalidConfiguration;
  }

  gridDim = grid, blockDim = block, size = static_cast<unsigned>(threads);
  if (__tsan_get_current_fiber) main_stack.tsan = __tsan_get_current_fiber();
  if (posix_memalign(&shared, 128, shared_bytes) != 0)
    std::abort();  // to the byte, so that AddressSanitizer sees overruns
  std::vector<uint64_t> order(blocks);
  for (uint64_t i = 0; i < blocks; ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), std::minstd_rand(random_below(1u << 30)));
  for (const uint64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    std::memset(shared, 0xff, shared_bytes);
    run_block();
    if (!error.empty()) break;
  }
  std::free(shared);
  return error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

const char* cuda_on_cpu_error() { return cuda_on_cpu::error.c_str(); }

void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::random_state = seed * 2 + 1; }
