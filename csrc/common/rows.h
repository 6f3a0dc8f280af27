// Rows of a vocabulary's logits in memory: any leading shape, any strides, three storage types.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace dimo {

enum class DType : int32_t { float32, float16, bfloat16 };

constexpr int kMaxDims = 8;

// The leading dimensions that all tensors of a call share. rows is their product; vocab the last dimension.
struct RowShape {
  int64_t rows;
  int64_t vocab;
  int32_t dims;
  int64_t sizes[kMaxDims];
};

// Strides are in elements.
struct LogitRows {
  void* data;
  DType dtype;
  int64_t vocab_stride;
  int64_t strides[kMaxDims];
};

// Static, like everything that a file compiled for several instruction sets includes: no copy is merged into another.

// Merges neighbouring dimensions that no tensor tells apart: most calls keep one.
template <int kTensors>
static inline void merge_dims(RowShape& shape, LogitRows* const (&tensors)[kTensors]) {
  int kept = 0;
  for (int d = 1; d < shape.dims; ++d) {
    bool merges = true;
    for (const LogitRows* t : tensors)
      merges &= t->data == nullptr || shape.sizes[kept] == 1 || t->strides[kept] == shape.sizes[d] * t->strides[d];
    if (!merges) ++kept;
    shape.sizes[kept] = merges ? shape.sizes[kept] * shape.sizes[d] : shape.sizes[d];
    for (LogitRows* t : tensors) t->strides[kept] = t->strides[d];
  }
  if (shape.dims > 0) shape.dims = kept + 1;
}

// Where a row begins, in elements.
DIMO_HOST_DEVICE static inline int64_t row_offset(const RowShape& shape, const LogitRows& logits, int64_t row) {
  int64_t offset = 0;
  for (int d = shape.dims - 1; d > 0; --d) {
    const int64_t size = shape.sizes[d];
    // 64-bit division is slow on a GPU.
    const int64_t outer = ((row | size) >> 32) == 0
                              ? static_cast<int64_t>(static_cast<uint32_t>(row) / static_cast<uint32_t>(size))
                              : row / size;
    offset += (row - outer * size) * logits.strides[d];
    row = outer;
  }
  return shape.dims > 0 ? offset + row * logits.strides[0] : 0;
}

// Whether rows and ids follow one another without gaps.
DIMO_HOST_DEVICE static inline bool is_dense(const RowShape& shape, const LogitRows& logits) {
  int64_t expected = shape.vocab;
  for (int d = shape.dims - 1; d >= 0; --d) {
    if (shape.sizes[d] != 1 && logits.strides[d] != expected) return false;
    expected *= shape.sizes[d];
  }
  return shape.vocab == 1 || logits.vocab_stride == 1;
}

}  // namespace dimo
