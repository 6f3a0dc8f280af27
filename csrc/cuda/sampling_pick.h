// What every categorical draw on the device ends with: the pick of an id among those that some lanes hold, and filters
// of them.
#pragma once

#include <cstdint>

#include "common/reveal.h"
#include "common/sampling.h"
#include "common/scalar_math.h"
#include "cuda/chunks.h"
#include "cuda/launch.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

// A sum of weights in [0, 1] as multiples of 2^-40: two numbers of 20 bits, so that 33 of either sum up in 32.
// Additions that round down cut the bits off: conversions to 64-bit integers are slow.
struct Fixed {
  uint32_t high = 0, low = 0;

  __device__ void add(float weight) {
    constexpr float kHigh = 8.0f, kLow = 0x1p-17f;  // numbers a little above are multiples of 2^-20 and of 2^-40
    const float upper = add_down(weight, kHigh), lower = add_down(weight - (upper - kHigh), kLow);
    high += __float_as_uint(upper) - 0x41000000u;
    low += __float_as_uint(lower) - 0x37000000u;
  }
  __device__ Wide joined() const { return (static_cast<Wide>(high) << kHalfWeightBits) + low; }
};

__device__ inline Wide fixed(float weight) {
  Fixed one;
  one.add(weight);
  return one.joined();
}

// A filter: ids that lie further than the limit below the top are dropped.
struct Filter {
  float top, limit;

  __device__ void apply(float (&z)[kShare]) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) z[i] = top - z[i] <= limit ? z[i] : -INFINITY;
  }
};
struct NoFilter {
  __device__ void apply(float (&)[kShare]) const {}
};

template <int kLanes>
__device__ float largest(const Lanes<kLanes>& lanes, const float (&z)[kShare]) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < kShare; ++i) top = fmaxf(top, z[i]);
  return lanes.max(top);
}

__device__ inline float finite(float top) { return ChunkRace<ScalarMath>::finite(top); }

__device__ inline void put(const SampleCategoricalArgs& args, int64_t row, int64_t token, float log_prob) {
  args.tokens[row] = token;
  if (args.log_prob != nullptr) args.log_prob[row] = log_prob;
}

// A row that is not wanted.
__device__ inline void keep(const SampleCategoricalArgs& args, int64_t row) {
  args.tokens[row] = args.wanted.state[row];
}

// Draws among the ids that the lanes hold, `share` neighbours each, by weights in 40-bit fixed point; one lane writes.
template <int kLanes>
__device__ void pick(const Lanes<kLanes>& lanes, const SampleCategoricalArgs& args, const DrawRules& rules,
                     const float (&z)[kShare], int share, uint32_t word1, uint32_t word2, int first, float row_top,
                     float row_total, int64_t row) {
  const float top = largest(lanes, z);
  float weight[kShare];
  Fixed sum;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    weight[i] = i < share ? exp2_fast((z[i] - top) * rules.rate) : 0.0f;
    sum.add(weight[i]);
  }
  const Wide own = sum.joined();
  const Wide through = lanes.scan(own), target = pick_target(lanes.from(kLanes - 1, through), word1, word2);
  const Wide before = through - own;
  if (target < before || target >= through) return;
  int id = 0;
  float logit = 0.0f;
  sum = Fixed();
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    if (before + sum.joined() <= target) {  // at last true for the one that is picked
      id = i;
      logit = z[i];
    }
    sum.add(weight[i]);
  }
  put(args, row, first + lanes.rank * share + id, (logit - row_top) * rules.inverse_temperature - logf(row_total));
}

}  // namespace
}  // namespace dimo::cuda
