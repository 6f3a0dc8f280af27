// One register of floats of the instruction set that the including file is compiled for, and the functions that the
// operators need on it. GCC and Clang vector extensions: +, *, comparisons and ?: work lane by lane.
//
// Everything is in an anonymous namespace: a file that includes this is compiled several times, and no copy with wider
// instructions may be merged into another one.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dimo::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(4 * kLanes)));
using Int = int32_t __attribute__((vector_size(4 * kLanes)));  // a comparison gives -1 or 0 a lane

#define DIMO_INLINE inline __attribute__((always_inline))
#define DIMO_INLINE_LAMBDA __attribute__((always_inline))

// The arithmetic that the functors of common/ are instantiated with.
struct VecMath {
  using F = Vec;
  using Mask = Int;
  using Index = Int;

  static DIMO_INLINE Vec splat(float x) { return x - Vec{}; }
  static DIMO_INLINE Vec select(Int mask, Vec a, Vec b) { return mask ? a : b; }
  static DIMO_INLINE Vec abs(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<Int>(x) & 0x7fffffff); }
  static DIMO_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }  // b where either is NaN
  static DIMO_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static DIMO_INLINE Vec clamp(Vec x, float bound) { return min(max(x, splat(-bound)), splat(bound)); }
  static DIMO_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return a * b + c;
  }  // contracted where there is such an instruction

  static DIMO_INLINE Vec sqrt(Vec x) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps(0xffff, x);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(x);
#else
    for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
  }

  // Relative error about 1e-7; exp(-inf) = 0, NaN stays NaN, above 88.7 +inf.
  static DIMO_INLINE Vec exp(Vec x) {
    constexpr float kLog2e = 1.44269504f, kLn2High = 0.693145752f, kLn2Low = 1.42860677e-6f;
    x = x < -104.0f ? splat(-104.0f) : x;
    x = x > 89.0f ? splat(89.0f) : x;
    const Vec shifted = x * kLog2e + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the nearest integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = (x - n * kLn2High) - n * kLn2Low;
    Vec y = splat(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
#if defined(__AVX512F__)
    return _mm512_maskz_scalef_ps(0xffff, y, n);
#else
    // 2^n in two factors, since n reaches from -150 to 128.
    const Int bits = reinterpret_cast<Int>(shifted) - 0x4b400000, half = bits >> 1;
    return y * power_of_two(half) * power_of_two(bits - half);
#endif
  }

  // 2^x for x <= 0: 2^-inf = 0, NaN stays NaN. Relative error about 1e-7; results below 2^-126 may be 0.
  static DIMO_INLINE Vec exp2(Vec x) {
#if defined(__AVX512DQ__)
    const Vec r = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for -inf
    return _mm512_maskz_scalef_ps(0xffff, exp2_polynomial(r), x - r);
#else
    x = x < -126.0f ? splat(-126.0f) : x;
    const Vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);
    const Vec y = reinterpret_cast<Vec>(reinterpret_cast<Int>(exp2_polynomial(r)) +
                                        ((reinterpret_cast<Int>(shifted) - 0x4b400000) << 23));
    return x > -126.0f ? y : (x == x ? Vec{} : x);
#endif
  }

  // Of a positive, normal number; relative error about 1e-7; NaN stays NaN.
  static DIMO_INLINE Vec log(Vec x) {
    const Int bits = reinterpret_cast<Int>(x);
    Int exponent = (bits >> 23) - 127;
    Vec m = reinterpret_cast<Vec>((bits & 0x007fffff) | 0x3f800000);  // [1, 2)
    const Int high = m > 1.41421356f;
    m = high ? 0.5f * m : m;
    exponent -= high;
    const Vec e = __builtin_convertvector(exponent, Vec), f = m - 1.0f, square = f * f;
    Vec y = splat(7.0376836292e-2f);
    y = y * f - 1.1514610310e-1f;
    y = y * f + 1.1676998740e-1f;
    y = y * f - 1.2420140846e-1f;
    y = y * f + 1.4249322787e-1f;
    y = y * f - 1.6668057665e-1f;
    y = y * f + 2.0000714765e-1f;
    y = y * f - 2.4999993993e-1f;
    y = y * f + 3.3333331174e-1f;
    y = y * f * square + e * -2.12194440e-4f - 0.5f * square;
    const Vec result = f + y + e * 0.693359375f;
    return x == x ? result : x;
  }

  // log(1 + y) for y in (-1, 1], full relative precision near 0.
  static DIMO_INLINE Vec log1p(Vec y) {
    const Vec u = 1.0f + y;
    return log(u) - ((u - 1.0f) - y) / u;
  }

 private:
  // On [-1/2, 1/2].
  static DIMO_INLINE Vec exp2_polynomial(Vec r) {
    Vec y = splat(1.5403530e-4f);
    y = y * r + 1.3333558e-3f;
    y = y * r + 9.6181291e-3f;
    y = y * r + 5.5504109e-2f;
    y = y * r + 2.4022651e-1f;
    y = y * r + 6.9314718e-1f;
    return y * r + 1.0f;
  }
  static DIMO_INLINE Vec power_of_two(Int n) { return reinterpret_cast<Vec>((n + 127) << 23); }
};

template <class T, int kBytes>
struct Register {
  typedef T type __attribute__((vector_size(kBytes)));
};

// Combines the lanes of a register to one number.
template <class V, class Combine>
DIMO_INLINE auto over_lanes(V x, const Combine& combine) {
  if constexpr (sizeof(V) == 16) {
    return combine(combine(x[0], x[2]), combine(x[1], x[3]));
  } else {
    typename Register<std::decay_t<decltype(x[0])>, sizeof(V) / 2>::type halves[2];
    std::memcpy(halves, &x, sizeof x);
    return over_lanes(combine(halves[0], halves[1]), combine);
  }
}

DIMO_INLINE float largest_lane(Vec x) {
  return over_lanes(x, [](auto a, auto b) DIMO_INLINE_LAMBDA { return a > b ? a : b; });
}
template <class V>
DIMO_INLINE auto sum_of_lanes(V x) {
  return over_lanes(x, [](auto a, auto b) DIMO_INLINE_LAMBDA { return a + b; });
}
DIMO_INLINE bool any_lane(Int mask) {
  return over_lanes(mask, [](auto a, auto b) DIMO_INLINE_LAMBDA { return a | b; }) != 0;
}

// --- storage types --------------------------------------------------------------------------------------------------

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

using Bits16 = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bits32 = uint32_t __attribute__((vector_size(4 * kLanes)));

template <class V, class T>
DIMO_INLINE V load_bytes(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T, class V>
DIMO_INLINE void store_bytes(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

DIMO_INLINE Vec load(const float* from) { return load_bytes<Vec>(from); }
DIMO_INLINE void store(float* to, Vec v) { store_bytes(to, v); }

DIMO_INLINE Vec load(const Bfloat16* from) {
  return reinterpret_cast<Vec>(__builtin_convertvector(load_bytes<Bits16>(from), Bits32) << 16);
}

// Rounds to nearest even; NaN is not expected.
DIMO_INLINE void store(Bfloat16* to, Vec v) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  store_bytes(to, __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, Bits16));
}

#if defined(__AVX512F__)
// The masked forms, because GCC's headers leave the others' source operand uninitialised, which -Werror refuses.
DIMO_INLINE Vec load(const Half* from) { return _mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from)); }
DIMO_INLINE void store(Half* to, Vec v) {
  store_bytes(to, _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
DIMO_INLINE Vec load(const Half* from) { return _mm256_cvtph_ps(load_bytes<__m128i>(from)); }
DIMO_INLINE void store(Half* to, Vec v) { store_bytes(to, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
#else
// The exponent is moved by a multiplication, which also rights subnormal numbers.
DIMO_INLINE Vec load(const Half* from) {
  const Bits32 h = __builtin_convertvector(load_bytes<Bits16>(from), Bits32);
  const Bits32 magnitude = (h & 0x7fffu) << 13;
  const Vec scaled = reinterpret_cast<Vec>(magnitude) * 0x1p112f;
  const Vec value = magnitude >= 0x0f800000u ? reinterpret_cast<Vec>(magnitude | 0x7f800000u) : scaled;  // inf, NaN
  return reinterpret_cast<Vec>(reinterpret_cast<Bits32>(value) | (h & 0x8000u) << 16);
}

// Rounds to nearest even, subnormal results included: an addition of the right power of two rounds them.
DIMO_INLINE void store(Half* to, Vec v) {
  const Bits32 sign = reinterpret_cast<Bits32>(v) & 0x80000000u;
  const Vec a = VecMath::abs(v);
  const Bits32 bits = reinterpret_cast<Bits32>(a);
  const Bits32 normal = (bits - 0x38000000u + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Bits32 subnormal = reinterpret_cast<Bits32>(a + 0.5f) - 0x3f000000u;
  const Bits32 h = a < 0x1p-14f ? subnormal : (a >= 65520.0f ? Bits32{} + 0x7c00u : normal);
  store_bytes(to, __builtin_convertvector(h | sign >> 16, Bits16));
}
#endif

// Past the caches: a line that is written whole need not be read first. `to` is aligned to a register. finish_streams()
// comes before another thread may read.
DIMO_INLINE void stream(float* to, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, v);
#elif defined(__SSE2__)
  _mm_stream_ps(to, v);
#else
  store(to, v);
#endif
}

DIMO_INLINE void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// One element, which a loop over strided ones reads and writes.

DIMO_INLINE float load_one(const float* from) { return *from; }
DIMO_INLINE void store_one(float* to, float x) { *to = x; }

DIMO_INLINE float load_one(const Bfloat16* from) {
  const uint32_t bits = static_cast<uint32_t>(from->bits) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

DIMO_INLINE void store_one(Bfloat16* to, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(__F16C__)
DIMO_INLINE float load_one(const Half* from) { return _cvtsh_ss(from->bits); }
DIMO_INLINE void store_one(Half* to, float x) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
DIMO_INLINE float load_one(const Half* from) {
  const Half lanes[kLanes] = {*from};
  return load(lanes)[0];
}

DIMO_INLINE void store_one(Half* to, float x) {
  Half lanes[kLanes];
  store(lanes, VecMath::splat(x));
  *to = lanes[0];
}
#endif

}  // namespace
}  // namespace dimo::cpu
