// The k smallest of a row's 64-bit keys: a radix search, the same walk on CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace dimo {

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
  bool tied = false;  // more keys under the prefix than are wanted

  DIMO_HOST_DEVICE explicit KeySearch(uint32_t k) : rank(k) {}

  DIMO_HOST_DEVICE bool candidate(uint64_t key) const {
    return shift == kFirstShift || key >> (shift + kDigitBits) == prefix;
  }
  DIMO_HOST_DEVICE uint32_t digit(uint64_t key) const { return static_cast<uint32_t>(key >> shift) & (kDigits - 1); }

  // Done as soon as all keys under the prefix are wanted, at the latest at the last digit.
  DIMO_HOST_DEVICE void descend(DigitChoice choice) {
    prefix = prefix << kDigitBits | choice.digit;
    rank -= choice.before;
    tied = rank < choice.count;
    done = !tied || shift == 0;
    if (!done) shift -= kDigitBits;
  }

  // The largest key under the prefix: once done, the k smallest keys are those not above it; but if tied, only `rank`
  // of those equal to it.
  DIMO_HOST_DEVICE uint64_t bound() const { return prefix << shift | ((uint64_t{1} << shift) - 1); }
};

}  // namespace dimo
