// float16 on the CPU: storage and conversions, no arithmetic.
#pragma once

#include "cuda_runtime_api.h"

struct __half {
  unsigned short bits;
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }

inline float __half2float(__half x) {
  const unsigned exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float sign = x.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return __uint_as_float((x.bits & 0x8000u) << 16 | 0x7f800000u | fraction << 13);
  return sign * (exponent == 0 ? ldexpf(fraction, -24) : ldexpf(1024 + fraction, static_cast<int>(exponent) - 25));
}

// Rounds to nearest, halves to even; NaN becomes 0x7fff as on a GPU.
inline __half __float2half_rn(float x) {
  const unsigned sign = __float_as_uint(x) >> 16 & 0x8000u;
  const float size = fabsf(x);
  unsigned bits;
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520.0f) {
    bits = 0x7c00;
  } else if (size < 0x1p-14f) {
    bits = static_cast<unsigned>(rintf(size * 0x1p24f));  // a subnormal, or the smallest normal number
  } else {
    const unsigned float_bits = __float_as_uint(size);
    bits = (float_bits + 0xfff + (float_bits >> 13 & 1) - (112u << 23)) >> 13;
  }
  return {static_cast<unsigned short>(sign | bits)};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __float22half2_rn(float2 x) { return {__float2half_rn(x.x), __float2half_rn(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
