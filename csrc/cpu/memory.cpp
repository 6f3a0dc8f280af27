#include "cpu/memory.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <new>

namespace dimo::cpu {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

// One each for what a training step holds at a time: gradients of loss and cross-entropy, two perturbed embeddings.
// Without a lock, which a fork could leave taken.
std::array<std::atomic<Memory*>, 4> kept;
std::atomic<unsigned> next_to_go;

void release(Memory* memory) {
  if (memory == nullptr) return;
  munmap(memory->data, static_cast<size_t>(memory->bytes));
  delete memory;
}

bool keep(Memory* memory, std::atomic<Memory*>& slot) {
  Memory* none = nullptr;
  return slot.compare_exchange_strong(none, memory);
}

bool fits(const Memory& memory, int64_t bytes) { return memory.bytes >= bytes && memory.bytes / 2 <= bytes; }

// In whole huge pages: the system clears those several times as fast.
Memory* map(int64_t bytes) {
  const size_t all = static_cast<size_t>(bytes + kHugePage);
  void* mapped = mmap(nullptr, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* const begin = static_cast<char*>(mapped);
  const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
  if (before > 0) munmap(begin, before);
  munmap(begin + before + bytes, kHugePage - before);
  madvise(begin + before, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  Memory* const memory = new (std::nothrow) Memory{begin + before, bytes};
  if (memory == nullptr) munmap(begin + before, static_cast<size_t>(bytes));
  return memory;
}

}  // namespace

Memory* take_memory(int64_t bytes) {
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  for (std::atomic<Memory*>& slot : kept) {
    Memory* const memory = slot.exchange(nullptr);
    if (memory == nullptr) continue;
    if (fits(*memory, bytes)) return memory;
    if (!keep(memory, slot)) release(memory);
  }
  if (Memory* const memory = map(bytes)) return memory;
  for (std::atomic<Memory*>& slot : kept) release(slot.exchange(nullptr));  // what is kept takes address space
  return map(bytes);
}

void leave_memory(Memory* memory) {
  if (madvise(memory->data, static_cast<size_t>(memory->bytes), MADV_FREE) != 0) return release(memory);
  for (std::atomic<Memory*>& slot : kept)
    if (keep(memory, slot)) return;
  release(kept[next_to_go++ % kept.size()].exchange(memory));
}

}  // namespace dimo::cpu
#endif
