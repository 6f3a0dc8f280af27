// How many tokens of a row are masked, and which words of a chance say yes: the same numbers on every backend.
//
// Static: a file compiled for several instruction sets includes this.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace dimo {

// How the ratio follows from a time u: dimo_ext/schedules.py says what they are.
enum class MaskSchedule : int32_t { linear, square, cosine, arccos, mage };

// NaN counts as 0.
template <class T>
DIMO_HOST_DEVICE static inline T clamped_ratio(T ratio) {
  return ratio > 0 ? (ratio < 1 ? ratio : T{1}) : T{0};
}

// The x below which a standard normal number lies with a probability in (0.03, 0.97): Acklam's rational approximation,
// whose relative error of 1e-9 one Newton step squares.
DIMO_HOST_DEVICE static inline double normal_quantile(double probability) {
  const double q = probability - 0.5, r = q * q;
  const double above =
      ((((-39.69683028665376 * r + 220.9460984245205) * r - 275.9285104469687) * r + 138.3577518672690) * r -
       30.66479806614716) *
          r +
      2.506628277459239;
  const double below =
      ((((-54.47609879822406 * r + 161.5858368580409) * r - 155.6989798598866) * r + 66.80131188771972) * r -
       13.28068155288572) *
          r +
      1.0;
  const double x = q * above / below, density = 0.3989422804014327 * exp(-0.5 * x * x);
  return x - (0.5 * erfc(-0.7071067811865476 * x) - probability) / density;
}

// In double, so that the ratio rounded to float, and with it the number of masked tokens, is the same everywhere.
DIMO_HOST_DEVICE static inline float scheduled_ratio(MaskSchedule schedule, float time) {
  if (schedule == MaskSchedule::linear) return time;
  const double u = clamped_ratio(static_cast<double>(time)), pi = 3.141592653589793;
  double ratio = u * u;
  if (schedule == MaskSchedule::cosine) ratio = cos(0.5 * pi * (1.0 - u));
  if (schedule == MaskSchedule::arccos) ratio = 2.0 * acos(1.0 - u) / pi;
  if (schedule == MaskSchedule::mage) {
    constexpr double kLow = 0.42074029056089696, kHigh = 0.9640696808870742;  // of normal(0.55, 0.25) at 0.5 and 1
    ratio = 0.55 + 0.25 * normal_quantile(kLow + u * (kHigh - kLow));
  }
  return static_cast<float>(ratio);
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
