// Rows of logits on the device: storage types, 16-byte loads and stores, sums over the threads that share a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/rows.h"

namespace dimo::cuda {

constexpr int kWarp = 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls body with a typed null pointer that stands for the storage type.
template <class Body>
__device__ inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(static_cast<float*>(nullptr));
    case DType::float16:
      return body(static_cast<__half*>(nullptr));
    case DType::bfloat16:
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

// kThreads threads that work on one row: part of a warp, a warp, or the whole block. `scratch` is shared memory for one
// number a warp; only a block needs it.
template <int kThreads>
struct Group {
  int rank;  // of this thread within the group
  float* scratch;

  __device__ explicit Group(float* shared) : rank(static_cast<int>(threadIdx.x) % kThreads), scratch(shared) {}

  __device__ void sync() const {
    if constexpr (kThreads > kWarp)
      __syncthreads();
    else
      __syncwarp(mask());
  }

  // Every thread gets the result; the order of the additions is fixed.
  template <class Combine>
  __device__ float reduce(float x, const Combine& combine) const {
    constexpr int kWidth = kThreads < kWarp ? kThreads : kWarp;
    for (int step = kWidth / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(mask(), x, step));
    if constexpr (kThreads > kWarp) {
      if (rank % kWarp == 0) scratch[rank / kWarp] = x;
      __syncthreads();
      x = scratch[0];
      for (int warp = 1; warp < kThreads / kWarp; ++warp) x = combine(x, scratch[warp]);
      __syncthreads();  // before the next call writes the scratch
    }
    return x;
  }

  __device__ float sum(float x) const {
    return reduce(x, [](float a, float b) { return a + b; });
  }
  // NaN is ignored beside a number.
  __device__ float max(float x) const {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
  __device__ float min(float x) const {
    return reduce(x, [](float a, float b) { return fminf(a, b); });
  }

 private:
  __device__ unsigned mask() const {
    if constexpr (kThreads >= kWarp)
      return 0xffffffffu;
    else
      return ((1u << kThreads) - 1u) << (threadIdx.x % kWarp / kThreads * kThreads);
  }
};

// Calls visit(index, value) for the elements of a row that fall to this thread: 16 bytes at a time where the row is
// contiguous, single elements at its unaligned edges.
template <class T, int kThreads, class Visit>
__device__ void each_element(const Group<kThreads>& group, const T* row, int64_t stride, int64_t vocab,
                             const Visit& visit) {
  constexpr int kPack = 16 / sizeof(T);
  if (stride != 1) {
    for (int64_t i = group.rank; i < vocab; i += kThreads) visit(i, to_float(row[i * stride]));
    return;
  }
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : (kPack - misaligned < vocab ? kPack - misaligned : vocab);
  const int64_t packs = (vocab - head) / kPack, tail = head + packs * kPack;
  for (int64_t i = group.rank; i < head; i += kThreads) visit(i, to_float(row[i]));
  for (int64_t pack = group.rank; pack < packs; pack += kThreads) {
    const int64_t begin = head + pack * kPack;
    const uint4 bits = *reinterpret_cast<const uint4*>(row + begin);
    T values[kPack];
    memcpy(values, &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < kPack; ++i) visit(begin + i, to_float(values[i]));
  }
  for (int64_t i = tail + group.rank; i < vocab; i += kThreads) visit(i, to_float(row[i]));
}

// Writes value(index) to every element of a row, in the same pattern.
template <class T, int kThreads, class Value>
__device__ void write_elements(const Group<kThreads>& group, T* row, int64_t stride, int64_t vocab,
                               const Value& value) {
  constexpr int kPack = 16 / sizeof(T);
  if (stride != 1) {
    for (int64_t i = group.rank; i < vocab; i += kThreads) row[i * stride] = from_float<T>(value(i));
    return;
  }
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
  const int64_t head = misaligned == 0 ? 0 : (kPack - misaligned < vocab ? kPack - misaligned : vocab);
  const int64_t packs = (vocab - head) / kPack, tail = head + packs * kPack;
  for (int64_t i = group.rank; i < head; i += kThreads) row[i] = from_float<T>(value(i));
  for (int64_t pack = group.rank; pack < packs; pack += kThreads) {
    const int64_t begin = head + pack * kPack;
    T values[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[i] = from_float<T>(value(begin + i));
    uint4 bits;
    memcpy(&bits, values, sizeof bits);
    *reinterpret_cast<uint4*>(row + begin) = bits;
  }
  for (int64_t i = tail + group.rank; i < vocab; i += kThreads) row[i] = from_float<T>(value(i));
}

// The largest magnitude that does not round to infinity lies below this.
__device__ inline float overflow_bound(DType dtype) {
  if (dtype == DType::float16) return 65520.0f;
  return dtype == DType::bfloat16 ? 0x1.ffp127f : INFINITY;
}

}  // namespace dimo::cuda
