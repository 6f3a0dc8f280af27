// How rows lie in the registers, and their way between memory and buffers of floats.
//
// A long row lies along the lanes of a register. Short rows, and rows whose vocabulary is strided, lie across them: one
// row a lane, so that no lane idles and nothing is summed over lanes.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/rows.h"
#include "cpu/logits.h"
#include "cpu/memory.h"
#include "cpu/simd.h"

namespace dimo::cpu {
namespace {

constexpr int kBuffer = 4096;                // floats; five buffers stay in the second-level cache
constexpr int64_t kLongRowBytes = 1024;      // from here on zeros may go past the caches
constexpr int64_t kShortVocab = 8 * kLanes;  // up to here rows lie across the lanes

DIMO_INLINE Vec minus_infinity() { return VecMath::splat(-INFINITY); }

// Of a comparison's lanes.
DIMO_INLINE bool any(Int mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#else
  int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}
DIMO_INLINE bool all(Int mask) { return !any(~mask); }

DIMO_INLINE Int is_finite(Vec x) { return VecMath::abs(x) < INFINITY; }

DIMO_INLINE Int lane_numbers() {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// Lane i has bit i.
DIMO_INLINE Int lane_bits() {
  Int lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = 1 << i;
  return lanes;
}

template <int kDistance, size_t... i>
DIMO_INLINE Vec exchanged(Vec x, std::index_sequence<i...>) {
  return __builtin_shufflevector(x, x, (static_cast<int>(i) ^ kDistance)...);
}

// fold(fold(lane 0, lane 8), ...) and so on, in every lane.
template <int kDistance = kLanes / 2, class Fold>
DIMO_INLINE Vec fold_lanes(Vec x, const Fold& fold) {
  x = fold(x, exchanged<kDistance>(x, std::make_index_sequence<kLanes>{}));
  if constexpr (kDistance > 1) return fold_lanes<kDistance / 2>(x, fold);
  return x;
}

// --- between memory and buffers -------------------------------------------------------------------------------------

// The first n < kLanes of a register, the others are -inf.
template <class T>
DIMO_INLINE Vec load_some(const T* from, int64_t n) {
  float lanes[kLanes];
  store(lanes, minus_infinity());
  for (int64_t i = 0; i < n; ++i) lanes[i] = load_one(from + i);
  return load(lanes);
}

// write_run with stream().
[[maybe_unused]] void stream_run(const float* from, int64_t n, float* to) {
  int64_t i = 0;
  for (; i < n && reinterpret_cast<uintptr_t>(to + i) % sizeof(Vec) != 0; ++i) to[i] = from[i];
  for (; i + kLanes <= n; i += kLanes) stream(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// Zeros with stream(), whatever they stand for.
inline void stream_zeros(char* to, int64_t bytes) {
  char* const end = to + bytes;
  for (; to < end && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) != 0; ++to) *to = 0;
  for (; end - to >= static_cast<int64_t>(sizeof(Vec)); to += sizeof(Vec)) stream(reinterpret_cast<float*>(to), Vec{});
  std::memset(to, 0, static_cast<size_t>(end - to));
}

// Whether what is written goes past the caches.
inline bool is_large(const RowShape& shape, const LogitRows& rows) {
  return shape.rows * shape.vocab * bytes_of(rows.dtype) >= kLargeBytes;
}

// The largest magnitude that does not round to infinity lies below this.
[[maybe_unused]] float overflow_bound(DType dtype) {
  if (dtype == DType::float16) return 65520.0f;
  return dtype == DType::bfloat16 ? 0x1.ffp127f : INFINITY;
}

// finish_streams() comes before another thread may read.
inline void zero_row(const RowShape& shape, const LogitRows& rows, int64_t row) {
  const int64_t offset = row_offset(shape, rows, row), bytes = shape.vocab * bytes_of(rows.dtype);
  if (rows.vocab_stride == 1 && bytes >= kLongRowBytes && is_large(shape, rows))
    return stream_zeros(static_cast<char*>(rows.data) + offset * bytes_of(rows.dtype), bytes);
  with_type(rows.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    zero_run(rows.vocab_stride, shape.vocab, static_cast<T*>(rows.data) + offset);
  });
}

// --- layouts --------------------------------------------------------------------------------------------------------

// One row along the lanes: a register holds kLanes consecutive ids.
struct Along {
  static constexpr int kRows = 1;
  static constexpr int64_t kCapacity = kBuffer;  // ids
  static constexpr int64_t kAhead = 0;           // rows between the next ones and those that are fetched early

  template <class T>
  static void read(const T* data, int64_t stride, const int64_t (&offsets)[kRows], int64_t begin, int64_t n,
                   float* to) {
    read_run(data + offsets[0] + begin * stride, stride, n, to);
  }
  template <class T>
  static void write(const float* from, int64_t stride, const int64_t (&offsets)[kRows], int, int64_t begin, int64_t n,
                    T* data) {
    write_run(from, stride, n, data + offsets[0] + begin * stride);
  }
  // Registers that hold n ids: those that are full, and all of them; the last one is padded.
  static int64_t full(int64_t n) { return n / kLanes; }
  static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes; }

  static Vec of_rows(const float (&x)[kRows]) { return VecMath::splat(x[0]); }
  static Vec max_over_row(Vec x) {
    return fold_lanes(x, [](Vec a, Vec b) { return VecMath::max(a, b); });
  }
  static Vec sum_over_row(Vec x) {
    return fold_lanes(x, [](Vec a, Vec b) { return a + b; });
  }
};

// a0 b0 a1 b1 ..., from the middle of both on if kHigh.
template <bool kHigh, size_t... i>
DIMO_INLINE Vec interleaved(Vec a, Vec b, std::index_sequence<i...>) {
  constexpr int kBegin = kHigh ? kLanes / 2 : 0;
  return __builtin_shufflevector(a, b, (kBegin + static_cast<int>(i) / 2 + (i % 2 ? kLanes : 0))...);
}

// Lane j of register i becomes lane i of register j.
DIMO_INLINE void transpose(Vec (&rows)[kLanes]) {
  constexpr std::make_index_sequence<kLanes> kAll;
  for (int step = 1; step < kLanes; step *= 2) {
    Vec next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = interleaved<false>(rows[i], rows[i + kLanes / 2], kAll);
      next[2 * i + 1] = interleaved<true>(rows[i], rows[i + kLanes / 2], kAll);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

using Quad = Register<float, 16>::type;

// Quads side by side.
DIMO_INLINE Vec joined(const Quad (&quads)[kLanes / 4]) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(__builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7),
                                 __builtin_shufflevector(quads[2], quads[3], 0, 1, 2, 3, 4, 5, 6, 7),  //
                                 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(quads[0], quads[1], 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return quads[0];
#endif
}

// Calls visit(i, quad) for the quads.
template <class Visit, int kQuad = 0>
DIMO_INLINE void each_quad(Vec x, const Visit& visit) {
  visit(kQuad, __builtin_shufflevector(x, x, 4 * kQuad, 4 * kQuad + 1, 4 * kQuad + 2, 4 * kQuad + 3));
  if constexpr (kQuad + 1 < kLanes / 4) each_quad<Visit, kQuad + 1>(x, visit);
}

// In every quad, four lanes of a (0 to 3) and of b (4 to 7).
template <int k0, int k1, int k2, int k3, size_t... i>
DIMO_INLINE Vec picked(Vec a, Vec b, std::index_sequence<i...>) {
  constexpr int kLane[] = {k0, k1, k2, k3};
  return __builtin_shufflevector(a, b,
                                 (static_cast<int>(i) / 4 * 4 + kLane[i % 4] % 4 + (kLane[i % 4] < 4 ? 0 : kLanes))...);
}

// Lane j of register k becomes lane k of register j, in every quad.
DIMO_INLINE void transpose_quads(Vec (&rows)[4]) {
  constexpr std::make_index_sequence<kLanes> kAll;
  const Vec low01 = picked<0, 4, 1, 5>(rows[0], rows[1], kAll), high01 = picked<2, 6, 3, 7>(rows[0], rows[1], kAll);
  const Vec low23 = picked<0, 4, 1, 5>(rows[2], rows[3], kAll), high23 = picked<2, 6, 3, 7>(rows[2], rows[3], kAll);
  rows[0] = picked<0, 1, 4, 5>(low01, low23, kAll);
  rows[1] = picked<2, 3, 6, 7>(low01, low23, kAll);
  rows[2] = picked<0, 1, 4, 5>(high01, high23, kAll);
  rows[3] = picked<2, 3, 6, 7>(high01, high23, kAll);
}

// kLanes rows across the lanes: a register holds one id of each row.
struct Across {
  static constexpr int kRows = kLanes;
  static constexpr int64_t kCapacity = kBuffer / kLanes;
  static constexpr int64_t kAhead = 1 * kLanes;  // short rows are done before memory has answered

  static bool consecutive(const int64_t (&offsets)[kRows]) {
    for (int r = 1; r < kRows; ++r)
      if (offsets[r] != offsets[0] + r) return false;
    return true;
  }
  // Covers n ids that follow one another, of all rows at a time: with blocks of kLanes, with quads where T has them,
  // one by one. The last block or quad may overlap the one before, so that
  // doing it twice must do no harm.
  template <class T, class OfBlock, class OfQuad, class OfOne>
  DIMO_INLINE static void cover(int64_t n, const OfBlock& block, const OfQuad& quad, const OfOne& one) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) block(i);
    const int64_t rest = n - i;
    if (n >= kLanes && rest > kLanes * 3 / 8) return block(n - kLanes);
    if constexpr (std::is_same_v<T, float>)
      if (n >= 4 && rest > 1)
        for (; i < n; i += 4) quad(i + 4 <= n ? i : n - 4);
    for (; i < n; ++i) one(i);
  }
  // load_row(r) gives kLanes ids of a row. Returns each row's largest.
  template <class LoadRow>
  DIMO_INLINE static Vec read_block(float* to, const LoadRow& load_row) {
    Vec block[kLanes];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) block[r] = load_row(r);
    transpose(block);
    Vec largest = block[0];
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) {
      store(to + j * kLanes, block[j]);
      largest = VecMath::max(block[j], largest);
    }
    return largest;
  }
  // part(k) gives four ids of rows k, k + 4, ...
  template <class Part>
  DIMO_INLINE static Vec read_quad(float* to, const Part& part) {
    Vec ids[4] = {part(0), part(1), part(2), part(3)};
    transpose_quads(ids);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) store(to + j * kLanes, ids[j]);
    return VecMath::max(VecMath::max(ids[0], ids[1]), VecMath::max(ids[2], ids[3]));
  }
  DIMO_INLINE static Vec gather_quads(const float* from, const int64_t (&offsets)[kRows], int k) {
    Quad quads[kLanes / 4];
#pragma GCC unroll 4
    for (int i = 0; i < kLanes / 4; ++i) quads[i] = load_bytes<Quad>(from + offsets[4 * i + k]);
    return joined(quads);
  }
  static DIMO_INLINE void scatter_quads(Vec ids, float* to, const int64_t (&offsets)[kRows], int k) {
    each_quad(ids, [&](int i, Quad quad) { store_bytes(to + offsets[4 * i + k], quad); });
  }
  // One id of each row.
  template <class T>
  DIMO_INLINE static Vec gather(const T* from, const int64_t (&offsets)[kRows]) {
    return gather(from, offsets, std::make_index_sequence<kRows>{});
  }
  template <class T, size_t... r>
  DIMO_INLINE static Vec gather(const T* from, const int64_t (&offsets)[kRows], std::index_sequence<r...>) {
    return Vec{load_one(from + offsets[r])...};
  }

  template <class T>
  static void read(const T* data, int64_t stride, const int64_t (&offsets)[kRows], int64_t begin, int64_t n,
                   float* to) {
    if (consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(to + i * kLanes, load(data + offsets[0] + (begin + i) * stride));
      return;
    }
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) store(to + i * kLanes, gather(data + (begin + i) * stride, offsets));
      return;
    }
    data += begin;
    cover<T>(
        n, [&](int64_t i) { read_block(to + i * kLanes, [&](int r) { return load(data + offsets[r] + i); }); },
        [&](auto i) { read_quad(to + i * kLanes, [&](int k) { return gather_quads(data + i, offsets, k); }); },
        [&](int64_t i) { store(to + i * kLanes, gather(data + i, offsets)); });
  }
  template <class T>
  static void write(const float* from, int64_t stride, const int64_t (&offsets)[kRows], int rows, int64_t begin,
                    int64_t n, T* data) {
    if (rows == kRows && consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(data + offsets[0] + (begin + i) * stride, load(from + i * kLanes));
      return;
    }
    data += begin * stride;
    const auto write_one = [&](int64_t i) {
      for (int r = 0; r < rows; ++r) store_one(data + offsets[r] + i * stride, from[i * kLanes + r]);
    };
    if (stride != 1 || rows != kRows) {
      for (int64_t i = 0; i < n; ++i) write_one(i);
      return;
    }
    cover<T>(
        n,
        [&](int64_t i) {
          Vec block[kLanes];
#pragma GCC unroll 16
          for (int j = 0; j < kLanes; ++j) block[j] = load(from + (i + j) * kLanes);
          transpose(block);
#pragma GCC unroll 16
          for (int r = 0; r < kRows; ++r) store(data + offsets[r] + i, block[r]);
        },
        [&](auto i) {
          Vec ids[4];
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) ids[j] = load(from + (i + j) * kLanes);
          transpose_quads(ids);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) scatter_quads(ids[k], data + i, offsets, k);
        },
        write_one);
  }
  static int64_t full(int64_t n) { return n; }
  static int64_t padded(int64_t n) { return n; }
  static Vec of_rows(const float (&x)[kRows]) { return load(x); }
  static Vec max_over_row(Vec x) { return x; }
  static Vec sum_over_row(Vec x) { return x; }
};

}  // namespace
}  // namespace dimo::cpu
