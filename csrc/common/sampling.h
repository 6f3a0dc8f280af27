// The categorical draw, the same numbers on every backend up to rounding: a Gumbel-max race between chunks of ids, then
// a pick inside the winner in fixed point; and the search for the threshold of a filter.
//
// Static or in an anonymous namespace: a file compiled for several instruction sets includes this.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/philox.h"
#include "ops.h"

namespace dimo {

constexpr int kChunk = 256;  // ids that share one Gumbel key
constexpr int kHalfWeightBits = 20;
constexpr int kWeightBits = 2 * kHalfWeightBits;  // fixed point of weights: sums are exact, so their order is free

namespace {

// What the arguments of a call mean, computed once.
struct DrawRules {
  bool greedy, filtered;
  float inverse_temperature, rate;  // rate = log2(e) / temperature; both positive and finite
  int64_t top_k;                    // 0 = all
  double top_p;
  float min_p_drop;  // how far below the largest logit an id may lie

  explicit DrawRules(const SampleCategoricalArgs& args)
      : greedy(args.temperature == 0.0),
        inverse_temperature(bounded(1.0 / args.temperature)),
        rate(bounded(1.4426950408889634 / args.temperature)),
        top_k(args.top_k < args.shape.vocab ? args.top_k : 0),
        top_p(args.top_p),
        min_p_drop(args.min_p > 0.0 ? static_cast<float>(-log(args.min_p) * args.temperature) : INFINITY) {
    filtered = top_k > 0 || top_p < 1.0 || min_p_drop < INFINITY;
  }

 private:
  static float bounded(double x) { return static_cast<float>(x < 1e-37 ? 1e-37 : (x < 1e37 ? x : 1e37)); }
};

}  // namespace

// Chunks race: the one with the largest mass / exponential wins, which is the largest log mass + Gumbel. Masses are
// relative to the largest logit so far: 2^((z - top) * rate).
template <class Math>
struct ChunkRace {
  using F = typename Math::F;
  using Index = typename Math::Index;

  F top = Math::splat(-INFINITY);
  F total = Math::splat(0.0f);  // mass of all chunks
  F best = Math::splat(0.0f);   // mass of the best one
  F rival = Math::splat(1.0f);  // its exponential
  Index chunk = Index{};

  // A chunk of largest logit `chunk_top`, mass `sum` relative to that; says whether it is the best so far.
  DIMO_HOST_DEVICE typename Math::Mask enter(F chunk_top, F sum, F exponential, Index index, float rate) {
    const F higher = Math::max(chunk_top, top), usable = finite(higher);
    const F shrink = Math::exp2((top - usable) * rate), mass = sum * Math::exp2((chunk_top - usable) * rate);
    top = higher;
    total = total * shrink + mass;
    best = best * shrink;
    const typename Math::Mask better = mass * rival > best * exponential;
    best = Math::select(better, mass, best);
    rival = Math::select(better, exponential, rival);
    chunk = better ? index : chunk;
    return better;
  }

  // Where every logit is -inf, 0: no difference of infinities arises.
  DIMO_HOST_DEVICE static F finite(F logit) {
    return Math::select(logit == Math::splat(-INFINITY), Math::splat(0.0f), logit);
  }
};

// -log((word + 1/2) / 2^32), accurate at both ends.
DIMO_HOST_DEVICE static inline float negative_log(uint32_t word) {
  if (word < 0x80000000u) return -logf((static_cast<float>(word) + 0.5f) * 0x1p-32f);
  return -log1pf(-(static_cast<float>(~word) + 0.5f) * 0x1p-32f);
}

// Of a mass that is a multiple of 2^-40: where in it the pick falls, uniform by 53 random bits.
DIMO_HOST_DEVICE static inline uint64_t pick_target(uint64_t total, uint32_t word1, uint32_t word2) {
  const uint64_t random53 = static_cast<uint64_t>(word1) << 21 | word2 >> 11;
  const uint64_t target = static_cast<uint64_t>(static_cast<double>(total) * (static_cast<double>(random53) * 0x1p-53));
  return target < total ? target : total - 1;
}

// A filter keeps the ids whose drop below the largest logit is at most a threshold: the least one with which their
// weights reach what is needed. It is found from the digits of the drop, whose bits order as the number does, most
// significant first. A pass sums the weights of the drops that agree with the digits so far by their next digit.
namespace {

constexpr int kDropBits = 31;

struct DropSearch {
  uint64_t needed;      // of the drops that agree with the digits so far
  int digit_bits;       // of every digit but the last
  int shift, width;     // where the digit lies that is sought, and how wide it is
  uint32_t prefix = 0;  // digits found so far
  bool done = false;

  DIMO_HOST_DEVICE DropSearch(uint64_t weight, int bits)
      : needed(weight), digit_bits(bits), shift(kDropBits - bits), width(bits) {}

  DIMO_HOST_DEVICE bool candidate(uint32_t drop) const { return drop >> shift >> width == prefix; }
  DIMO_HOST_DEVICE uint32_t digit(uint32_t drop) const { return drop >> shift & ((1u << width) - 1); }

  // Goes on under the digit with which the weights reach what is needed: `before` is that of lower ones, `weight` its.
  DIMO_HOST_DEVICE void descend(uint32_t digit, uint64_t before, uint64_t weight) {
    prefix = prefix << width | digit;
    needed -= before;
    done = shift == 0 || needed == weight;  // every drop under the prefix stays
    if (done) return;
    width = shift < digit_bits ? shift : digit_bits;
    shift -= width;
  }

  // The largest drop under the prefix: once done, the threshold.
  DIMO_HOST_DEVICE uint32_t bound() const {
    const uint32_t largest = prefix << shift | ((1u << shift) - 1), infinite = 0x7f800000;
    return largest < infinite ? largest : infinite;
  }
};

// What the masses of the ids that stay must reach under top-p.
DIMO_HOST_DEVICE inline uint64_t needed_mass(double top_p, uint64_t total) {
  const uint64_t needed = static_cast<uint64_t>(ceil(top_p * static_cast<double>(total)));
  return needed < 1 ? 1 : (needed < total ? needed : total);
}

}  // namespace

}  // namespace dimo
