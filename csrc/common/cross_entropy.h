// Which tokens of a cross-entropy count.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "ops.h"

namespace dimo {

DIMO_HOST_DEVICE static inline bool counts(const int64_t* targets, const bool* mask, int64_t valid_vocab, int64_t row) {
  const bool masked = mask == nullptr || mask[row];
  return masked && static_cast<uint64_t>(targets[row]) < static_cast<uint64_t>(valid_vocab);
}

}  // namespace dimo
