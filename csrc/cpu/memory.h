// Memory for large outputs. What the system hands out it clears first, page by page: of a gradient as large as the
// logits that costs more than computing it. So what an output leaves behind is kept for a later one, marked as memory
// that the system may take back whenever it wants it for something else.
#pragma once

#include <cstdint>

namespace dimo::cpu {

constexpr int64_t kLargeBytes = int64_t{8} << 20;  // more than what the next reader finds in a cache

struct Memory {
  void* data;
  int64_t bytes;
};

// At least `bytes`, with whatever they hold; nullptr where the system has no more. Any thread.
Memory* take_memory(int64_t bytes);

// Keeps it for a later take_memory, or gives it back to the system.
void leave_memory(Memory* memory);

}  // namespace dimo::cpu
