// How many tokens of a row are masked, and the sort keys that say which: the same numbers on every backend.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace dimo {

// NaN counts as 0.
DIMO_HOST_DEVICE inline float clamped_ratio(float ratio) { return ratio > 0.0f ? (ratio < 1.0f ? ratio : 1.0f) : 0.0f; }

// rint(ratio * length) with the product rounded to float32 and halves rounded to even.
DIMO_HOST_DEVICE inline int64_t exact_count(float ratio, int64_t length) {
  return static_cast<int64_t>(rintf(clamped_ratio(ratio) * static_cast<float>(length)));
}

// A Bernoulli draw masks the words below this: w + 1/2 < ratio * 2^32. Every step is exact in double.
DIMO_HOST_DEVICE inline uint64_t bernoulli_threshold(float ratio) {
  return static_cast<uint64_t>(ceil(static_cast<double>(clamped_ratio(ratio)) * 4294967296.0 - 0.5));
}

DIMO_HOST_DEVICE inline int64_t bounded_count(int64_t count, int64_t min_masked, int64_t length) {
  const int64_t least = min_masked < length ? min_masked : length;
  return count < least ? least : (count < length ? count : length);
}

// Orders by word, then by index; unique within a row.
DIMO_HOST_DEVICE inline uint64_t sort_key(uint32_t word, int64_t index) {
  return static_cast<uint64_t>(word) << 32 | static_cast<uint64_t>(index);
}

// The k-th smallest key is found from its digits, most significant first. A pass counts the keys that agree with the
// digits so far by their next digit. Random words part early: two or three of the eight passes usually settle it.
constexpr int kDigitBits = 8;
constexpr int kDigits = 1 << kDigitBits;
constexpr int kFirstShift = 64 - kDigitBits;

struct DigitChoice {
  uint32_t digit;   // of the k-th smallest key
  uint32_t before;  // keys with a smaller digit
  uint32_t count;   // keys with this digit
};

struct KeySearch {
  uint64_t prefix = 0;  // digits found so far
  uint32_t rank;        // of the wanted key (1 = smallest) among the keys with this prefix
  int shift = kFirstShift;
  bool done = false;

  DIMO_HOST_DEVICE explicit KeySearch(uint32_t k) : rank(k) {}

  DIMO_HOST_DEVICE bool candidate(uint64_t key) const {
    return shift == kFirstShift || key >> (shift + kDigitBits) == prefix;
  }
  DIMO_HOST_DEVICE uint32_t digit(uint64_t key) const { return static_cast<uint32_t>(key >> shift) & (kDigits - 1); }

  // Done as soon as all keys under the prefix are wanted; at the latest at the last digit, since keys are unique.
  DIMO_HOST_DEVICE void descend(DigitChoice choice) {
    prefix = prefix << kDigitBits | choice.digit;
    rank -= choice.before;
    done = rank == choice.count;
    if (!done) shift -= kDigitBits;
  }

  // The largest key under the prefix: once done, the k smallest keys are those not above it.
  DIMO_HOST_DEVICE uint64_t bound() const { return prefix << shift | ((uint64_t{1} << shift) - 1); }
};

}  // namespace dimo
