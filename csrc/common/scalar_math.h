// The arithmetic that functors are instantiated with where one thread works on one number.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace dimo {

struct ScalarMath {
  using F = float;
  using Mask = bool;
  using Index = int32_t;

  DIMO_HOST_DEVICE static float splat(float x) { return x; }
  DIMO_HOST_DEVICE static float select(bool mask, float a, float b) { return mask ? a : b; }
  DIMO_HOST_DEVICE static float abs(float x) { return fabsf(x); }
  DIMO_HOST_DEVICE static float clamp(float x, float bound) { return fminf(fmaxf(x, -bound), bound); }
  DIMO_HOST_DEVICE static float fma(float a, float b, float c) { return fmaf(a, b, c); }
  DIMO_HOST_DEVICE static float sqrt(float x) { return sqrtf(x); }
  DIMO_HOST_DEVICE static float max(float a, float b) { return fmaxf(a, b); }
  DIMO_HOST_DEVICE static float exp(float x) { return expf(x); }
  DIMO_HOST_DEVICE static float exp2(float x) { return exp2f(x); }
  DIMO_HOST_DEVICE static float log1p(float x) { return log1pf(x); }
};

}  // namespace dimo
