// How many tokens of a row are masked, and which words of a chance say yes: the same numbers on every backend.
//
// Static: a file compiled for several instruction sets includes this.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace dimo {

// NaN counts as 0.
template <class T>
DIMO_HOST_DEVICE static inline T clamped_ratio(T ratio) {
  return ratio > 0 ? (ratio < 1 ? ratio : T{1}) : T{0};
}

// rint(ratio * length) with the product rounded to float32 and halves rounded to even.
DIMO_HOST_DEVICE static inline int64_t exact_count(float ratio, int64_t length) {
  return static_cast<int64_t>(rintf(clamped_ratio(ratio) * static_cast<float>(length)));
}

// A Bernoulli draw masks the words below this: w + 1/2 < ratio * 2^32. Every step is exact in double.
DIMO_HOST_DEVICE static inline uint64_t bernoulli_threshold(double ratio) {
  return static_cast<uint64_t>(ceil(clamped_ratio(ratio) * 4294967296.0 - 0.5));
}

DIMO_HOST_DEVICE static inline int64_t bounded_count(int64_t count, int64_t min_masked, int64_t length) {
  const int64_t least = min_masked < length ? min_masked : length;
  return count < least ? least : (count < length ? count : length);
}

}  // namespace dimo
