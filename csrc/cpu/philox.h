// Philox4x32-10 in SIMD: a block of random words a lane, and the two transformations of them that operators need.
#pragma once

#include "common/philox.h"
#include "cpu/simd.h"

namespace dimo::cpu {
namespace {

struct LaneWords {
  Bits32 word[4];
};

// Products of each lane with a number, 64 bits in two halves.
DIMO_INLINE void multiply(Bits32 a, uint32_t factor, Bits32& high, Bits32& low) {
  using Bits64 = uint64_t __attribute__((vector_size(4 * kLanes)));
  constexpr uint64_t kLow = 0xffffffff;
  const auto product = [&](Bits64 x) DIMO_INLINE_LAMBDA {
#if defined(__AVX512F__)
    return reinterpret_cast<Bits64>(
        _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(x), _mm512_set1_epi32(static_cast<int>(factor))));
#elif defined(__AVX2__)
    return reinterpret_cast<Bits64>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi32(static_cast<int>(factor))));
#else
    return (x & kLow) * factor;
#endif
  };
  const Bits64 lanes = reinterpret_cast<Bits64>(a), even = product(lanes), odd = product(lanes >> 32);
  low = reinterpret_cast<Bits32>((even & kLow) | (odd << 32));
  high = reinterpret_cast<Bits32>((even >> 32) | (odd & ~kLow));
}

// The random streams of as many rows as there are lanes, or of one row in all of them.
struct LaneStreams {
  OperatorTag tag;
  Bits32 seed_low, seed_high, offset_low, offset_high, row;

  DIMO_INLINE LaneWords words(Bits32 block) const {
    Bits32 c0 = block | static_cast<uint32_t>(tag) << 24, c1 = row, c2 = offset_low, c3 = offset_high;
    Bits32 k0 = seed_low, k1 = seed_high;
    for (int round = 0; round < 10; ++round) {
      Bits32 high0, low0, high1, low1;
      multiply(c0, 0xD2511F53, high0, low0);
      multiply(c2, 0xCD9E8D57, high1, low1);
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
  }

  // Lane `lane` is the stream of a row; keys as in SampleCategoricalArgs.
  DIMO_INLINE void set(int lane, const int64_t* keys, int64_t key_stride, int64_t rows_per_sample, int64_t index) {
    if (key_stride != 0) {
      const int64_t sample = index / rows_per_sample;
      index -= sample * rows_per_sample;
      keys += sample * key_stride;
    }
    const uint64_t seed = static_cast<uint64_t>(keys[0]), offset = static_cast<uint64_t>(keys[1]);
    seed_low[lane] = static_cast<uint32_t>(seed);
    seed_high[lane] = static_cast<uint32_t>(seed >> 32);
    offset_low[lane] = static_cast<uint32_t>(offset);
    offset_high[lane] = static_cast<uint32_t>(offset >> 32);
    row[lane] = static_cast<uint32_t>(index);
  }

  // All lanes are the stream of a row.
  DIMO_INLINE void set_all(const int64_t* keys, int64_t key_stride, int64_t rows_per_sample, int64_t index) {
    set(0, keys, key_stride, rows_per_sample, index);
    seed_low = Bits32{} + seed_low[0];
    seed_high = Bits32{} + seed_high[0];
    offset_low = Bits32{} + offset_low[0];
    offset_high = Bits32{} + offset_high[0];
    row = Bits32{} + row[0];
  }
};

DIMO_INLINE Bits32 lane_numbers() {
  Bits32 numbers = {};
  for (int i = 0; i < kLanes; ++i) numbers[i] = static_cast<uint32_t>(i);
  return numbers;
}

// -log((word + 1/2) / 2^32), accurate at both ends.
DIMO_INLINE Vec negative_log(Bits32 word) {
  const auto fraction = [](Bits32 w) DIMO_INLINE_LAMBDA { return (__builtin_convertvector(w, Vec) + 0.5f) * 0x1p-32f; };
  const Vec low = VecMath::log(fraction(word)),
            high = VecMath::log1p(-VecMath::min(fraction(~word), VecMath::splat(0.5f)));
  return word < 0x80000000u ? -low : -high;
}

}  // namespace
}  // namespace dimo::cpu
