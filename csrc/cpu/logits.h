// Rows of logits on the CPU: between memory of any storage type and stride, and buffers of floats.
#pragma once

#include <cstring>

#include "common/rows.h"
#include "cpu/simd.h"

namespace dimo::cpu {
namespace {

template <class T>
inline void read_run(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = load_one(from + i * stride);
}

template <class T>
inline void write_run(const float* from, int64_t stride, int64_t n, T* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) store_one(to + i * stride, from[i]);
}

template <class T>
inline void zero_run(int64_t stride, int64_t n, T* to) {
  if (stride == 1)
    std::memset(to, 0, static_cast<size_t>(n) * sizeof(T));
  else
    for (int64_t i = 0; i < n; ++i) store_one(to + i * stride, 0.0f);
}

// Calls body with a typed null pointer that stands for the storage type.
template <class Body>
DIMO_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(static_cast<float*>(nullptr));
    case DType::float16:
      return body(static_cast<Half*>(nullptr));
    case DType::bfloat16:
      return body(static_cast<Bfloat16*>(nullptr));
  }
}

}  // namespace
}  // namespace dimo::cpu
