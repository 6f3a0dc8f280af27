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

template <Guidance kGuidance>
DIMO_INLINE Vec mixed(Vec cond, Vec uncond, Vec scale) {
  if constexpr (kGuidance == Guidance::off) return cond;
  const Vec z = uncond + scale * (cond - uncond);
  if constexpr (kGuidance == Guidance::quick) return z;
  return scale == 1.0f ? cond : (VecMath::min(cond, uncond) == -kInfinity ? minus_infinity() : z);
}

// n logits that follow one another, mixed to z_p and copied to z_q; the last register is filled up with -inf.
template <Guidance kGuidance, class T>
void mix(const T* cond, const T* uncond, const T* auxiliary, Vec scale, int64_t n, float* z_p, float* z_q, Tops& tops) {
  Tops higher = tops;
  const auto take = [&](int64_t i, Vec p, Vec q) {
    higher.p = VecMath::max(p, higher.p);
    higher.q = VecMath::max(q, higher.q);
    store(z_p + i, p);
    store(z_q + i, q);
  };
  constexpr bool kGuided = kGuidance != Guidance::off;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    take(i, mixed<kGuidance>(load(cond + i), kGuided ? load(uncond + i) : Vec{}, scale), load(auxiliary + i));
  if (i < n) {
    constexpr Guidance kCareful = kGuided ? Guidance::careful : Guidance::off;  // of the -inf that fills up
    take(i, mixed<kCareful>(load_some(cond + i, n - i), kGuided ? load_some(uncond + i, n - i) : Vec{}, scale),
         load_some(auxiliary + i, n - i));
  }
  tops = higher;
}

// The same for n ids of kLanes rows, one a lane. They are mixed before they are turned into the lanes.
template <Guidance kGuidance, class T>
void mix_across(const T* cond, const int64_t (&cond_rows)[kLanes], const T* uncond,
                const int64_t (&uncond_rows)[kLanes], const T* auxiliary, const int64_t (&auxiliary_rows)[kLanes],
                Vec scale, int64_t n, float* z_p, float* z_q, Tops& tops) {
  constexpr bool kGuided = kGuidance != Guidance::off;
  float scales[kLanes];
  store(scales, scale);
  Tops higher = tops;
  const auto raise = [&](Vec p, Vec q) {
    higher.p = VecMath::max(p, higher.p);
    higher.q = VecMath::max(q, higher.q);
  };
  Across::cover<T>(
      n,
      [&](int64_t i) {
        const Vec p = Across::read_block(z_p + i * kLanes, [&](int r) {
          return mixed<kGuidance>(load(cond + cond_rows[r] + i), kGuided ? load(uncond + uncond_rows[r] + i) : Vec{},
                                  VecMath::splat(scales[r]));
        });
        raise(p, Across::read_block(z_q + i * kLanes, [&](int r) { return load(auxiliary + auxiliary_rows[r] + i); }));
      },
      [&](auto i) {
        Vec part_scale[4] = {scale, scale, scale, scale};
        transpose_quads(part_scale);
        const Vec p = Across::read_quad(z_p + i * kLanes, [&](int k) {
          return mixed<kGuidance>(Across::gather_quads(cond + i, cond_rows, k),
                                  kGuided ? Across::gather_quads(uncond + i, uncond_rows, k) : Vec{}, part_scale[k]);
        });
        raise(p, Across::read_quad(z_q + i * kLanes,
                                   [&](int k) { return Across::gather_quads(auxiliary + i, auxiliary_rows, k); }));
      },
      [&](int64_t i) {
        const Vec p = mixed<kGuidance>(Across::gather(cond + i, cond_rows),
                                       kGuided ? Across::gather(uncond + i, uncond_rows) : Vec{}, scale);
        const Vec q = Across::gather(auxiliary + i, auxiliary_rows);
        store(z_p + i * kLanes, p);
        store(z_q + i * kLanes, q);
        raise(p, q);
      });
  tops = higher;
}

// Calls body with the guidance as a constant of its type.
template <class Body>
DIMO_INLINE void with_guidance(Guidance guidance, const Body& body) {
  switch (guidance) {
    case Guidance::off:
      return body(std::integral_constant<Guidance, Guidance::off>{});
    case Guidance::quick:
      return body(std::integral_constant<Guidance, Guidance::quick>{});
    case Guidance::careful:
      return body(std::integral_constant<Guidance, Guidance::careful>{});
  }
}

// Brings memory into a cache while the sweeps compute: it would idle otherwise.
struct Ahead {
  // Of the register that is fetched next; nullptr stays so.
  const char *teacher = nullptr, *uncond = nullptr, *auxiliary = nullptr, *gradient = nullptr;
  int64_t teacher_step = 0, uncond_step = 0, auxiliary_step = 0, gradient_step = 0;  // bytes a register
  bool near = false;  // into the first-level cache: what short rows need next

  DIMO_INLINE void fetch_teachers() {
    fetch(teacher);
    if (uncond != nullptr) fetch(uncond);
    teacher += teacher_step, uncond += uncond_step;
  }
  DIMO_INLINE void fetch_rest() {
    fetch(auxiliary);
    if (gradient != nullptr) __builtin_prefetch(gradient, 1, 2);  // to be written
    auxiliary += auxiliary_step, gradient += gradient_step;
  }

 private:
  DIMO_INLINE void fetch(const char* address) const {
    if (near)
      __builtin_prefetch(address, 0, 3);
    else
      __builtin_prefetch(address, 0, 2);
  }
};

}  // namespace
}  // namespace dimo::cpu
