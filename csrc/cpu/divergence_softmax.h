// What the sweeps of the CPU divergence start from: one side's softmax, logits mixed as they are read, what is fetched
// early.
#pragma once

#include <type_traits>

#include "common/divergences.h"
#include "cpu/layouts.h"
#include "cpu/simd.h"

namespace dimo::cpu {
namespace {

constexpr float kLog2e = 1.44269504f;

// softmax and log softmax of one side: exp2((z - top) * rate) / sum and (z - top) * inverse_temperature - log_sum.
struct Softmax {
  Vec highest = minus_infinity();  // logit so far
  Vec top = Vec{};                 // what is subtracted: 0 where every logit is -inf, so that no NaN arises
  Vec sum = Vec{}, inverse_sum = Vec{}, log_sum = Vec{};
  float inverse_temperature, rate;

  explicit Softmax(float temperature) : inverse_temperature(1.0f / temperature), rate(kLog2e * inverse_temperature) {}

  DIMO_INLINE Vec weight(Vec z) const { return VecMath::exp2((z - top) * rate); }
  DIMO_INLINE Vec log_prob(Vec z) const { return (z - top) * inverse_temperature - log_sum; }

  // What sums relative to the top so far are multiplied with.
  DIMO_INLINE Vec raise(Vec higher) {
    const Vec usable = higher == -kInfinity ? Vec{} : higher;
    const Int first = highest == -kInfinity;
    Vec factor = VecMath::splat(1.0f);
    if (any(~first)) factor = first ? factor : VecMath::exp2((top - usable) * rate);
    sum *= factor;
    highest = higher;
    top = usable;
    return factor;
  }

  DIMO_INLINE void finish(Vec row_sum) {
    sum = row_sum;
    inverse_sum = 1.0f / sum;
    log_sum = sum == 0.0f ? Vec{} : VecMath::log(sum);
  }
};

// What the guidance of a call, or of a tile, asks for.
enum class Guidance {
  off,
  quick,   // of finite logits: whatever -inf is made of, it leaves a mark that is not finite
  careful  // -inf on either side gives -inf, and a scale of 1 ignores the unconditional side
};

struct Tops {
  Vec p = minus_infinity(), q = minus_infinity();
};

// n logits that follow one another, mixed to z_p and copied to z_q; the last register is filled up with -inf.
template <Guidance kGuidance, class T>
void mix(const T* cond, const T* uncond, const T* auxiliary, Vec scale, int64_t n, float* z_p, float* z_q, Tops& tops) {
  Tops higher = tops;
  const auto take = [&](auto careful, int64_t i, Vec p, Vec u, Vec q) {
    if constexpr (kGuidance != Guidance::off) {
      Vec mixed = u + scale * (p - u);
      if constexpr (decltype(careful)::value) {
        mixed = VecMath::min(p, u) == -kInfinity ? minus_infinity() : mixed;
        mixed = scale == 1.0f ? p : mixed;
      }
      p = mixed;
    }
    higher.p = VecMath::max(p, higher.p);
    higher.q = VecMath::max(q, higher.q);
    store(z_p + i, p);
    store(z_q + i, q);
  };
  constexpr bool kGuided = kGuidance != Guidance::off;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    take(std::bool_constant<kGuidance == Guidance::careful>{}, i, load(cond + i), kGuided ? load(uncond + i) : Vec{},
         load(auxiliary + i));
  if (i < n)
    take(std::true_type{}, i, load_some(cond + i, n - i), kGuided ? load_some(uncond + i, n - i) : Vec{},
         load_some(auxiliary + i, n - i));
  tops = higher;
}

template <class T>
void mix(Guidance guidance, const T* cond, const T* uncond, const T* auxiliary, Vec scale, int64_t n, float* z_p,
         float* z_q, Tops& tops) {
  switch (guidance) {
    case Guidance::off:
      return mix<Guidance::off>(cond, uncond, auxiliary, scale, n, z_p, z_q, tops);
    case Guidance::quick:
      return mix<Guidance::quick>(cond, uncond, auxiliary, scale, n, z_p, z_q, tops);
    case Guidance::careful:
      return mix<Guidance::careful>(cond, uncond, auxiliary, scale, n, z_p, z_q, tops);
  }
}

// Brings memory into the second-level cache while a sweep computes: it would idle otherwise.
struct Ahead {
  static constexpr int kTensors = 4;  // the last one is written
  const char* data[kTensors];
  int64_t step[kTensors];  // bytes a register

  DIMO_INLINE void fetch() {
#pragma GCC unroll 4
    for (int t = 0; t < kTensors; ++t) {
      if (t < kTensors - 1)
        __builtin_prefetch(data[t], 0, 2);
      else
        __builtin_prefetch(data[t], 1, 2);
      data[t] += step[t];
    }
  }
};

}  // namespace
}  // namespace dimo::cpu
