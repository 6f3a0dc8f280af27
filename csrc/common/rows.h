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

// Where a row begins, in elements.
DIMO_HOST_DEVICE static inline int64_t row_offset(const RowShape& shape, const LogitRows& logits, int64_t row) {
  int64_t offset = 0;
  for (int d = shape.dims - 1; d > 0; --d) {
    offset += row % shape.sizes[d] * logits.strides[d];
    row /= shape.sizes[d];
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
