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

// kLanes rows across the lanes: a register holds one id of each row.
struct Across {
  static constexpr int kRows = kLanes;
  static constexpr int64_t kCapacity = kBuffer / kLanes;
  static constexpr int64_t kAhead = 2 * kLanes;  // short rows are done before memory has answered

  static bool consecutive(const int64_t (&offsets)[kRows]) {
    for (int r = 1; r < kRows; ++r)
      if (offsets[r] != offsets[0] + r) return false;
    return true;
  }
  template <class T>
  static void read(const T* data, int64_t stride, const int64_t (&offsets)[kRows], int64_t begin, int64_t n,
                   float* to) {
    if (consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(to + i * kLanes, load(data + offsets[0] + (begin + i) * stride));
      return;
    }
    const int64_t blocks = stride == 1 ? n / kLanes * kLanes : 0;
    for (int64_t i = 0; i < blocks; i += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) block[r] = load(data + offsets[r] + begin + i);
      transpose(block);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) store(to + (i + j) * kLanes, block[j]);
    }
    for (int64_t i = blocks; i < n; ++i) {
      Vec ids;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) ids[r] = load_one(data + offsets[r] + (begin + i) * stride);
      store(to + i * kLanes, ids);
    }
  }
  template <class T>
  static void write(const float* from, int64_t stride, const int64_t (&offsets)[kRows], int rows, int64_t begin,
                    int64_t n, T* data) {
    if (rows == kRows && consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(data + offsets[0] + (begin + i) * stride, load(from + i * kLanes));
      return;
    }
    const int64_t blocks = stride == 1 && rows == kRows ? n / kLanes * kLanes : 0;
    for (int64_t i = 0; i < blocks; i += kLanes) {
      Vec block[kLanes];
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) block[j] = load(from + (i + j) * kLanes);
      transpose(block);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) store(data + offsets[r] + begin + i, block[r]);
    }
    for (int r = 0; r < rows; ++r) {
      T* row = data + offsets[r] + begin * stride;
      for (int64_t i = blocks; i < n; ++i) store_one(row + i * stride, from[i * kLanes + r]);
    }
  }
  static int64_t full(int64_t n) { return n; }
  static int64_t padded(int64_t n) { return n; }
  static Vec of_rows(const float (&x)[kRows]) { return load(x); }
  static Vec max_over_row(Vec x) { return x; }
  static Vec sum_over_row(Vec x) { return x; }
};

}  // namespace
}  // namespace dimo::cpu
