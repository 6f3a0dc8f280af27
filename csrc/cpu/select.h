// The k smallest of a row's keys on the CPU: the search of common/select.h over an array.
#pragma once

#include <array>
#include <cstdint>

#include "common/select.h"

namespace dimo::cpu {

inline DigitChoice choose_digit(const std::array<uint32_t, kDigits>& histogram, uint32_t rank) {
  DigitChoice choice = {0, 0, histogram[0]};
  while (choice.before + choice.count < rank) {
    choice.before += choice.count;
    choice.count = histogram[++choice.digit];
  }
  return choice;
}

// Finds the k smallest keys; k > 0.
inline KeySearch find_smallest(int64_t k, const int64_t* keys, int64_t length) {
  KeySearch search(static_cast<uint32_t>(k));
  while (!search.done) {
    std::array<uint32_t, kDigits> histogram{};
    for (int64_t i = 0; i < length; ++i) {
      const uint64_t key = static_cast<uint64_t>(keys[i]);
      if (search.candidate(key)) ++histogram[search.digit(key)];
    }
    search.descend(choose_digit(histogram, search.rank));
  }
  return search;
}

}  // namespace dimo::cpu
