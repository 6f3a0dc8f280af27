// How much memory is had and written cheaply. Static: kernels of several instruction sets include this.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dimo::cpu {

constexpr int64_t kLargeBytes = int64_t{8} << 20;  // more than what the next reader finds in a cache

// Asks for huge pages where many bytes are about to be written for the first time: a large tensor comes from the
// system page by page, which costs several times as much as writing it. A hint: refused, nothing changes.
static inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (bytes < kLargeBytes) return;
  // With what an allocator keeps in front: cut off from it, a mapping would lose its first huge page.
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace dimo::cpu
