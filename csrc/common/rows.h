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

// Of one element.
DIMO_HOST_DEVICE static inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

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

// a / b; 64-bit division is slow on a GPU.
DIMO_HOST_DEVICE static inline int64_t quotient(int64_t a, int64_t b) {
  if (((a | b) >> 32) != 0) return a / b;
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Where a row begins in each tensor, in elements.
template <int kTensors>
DIMO_HOST_DEVICE static inline void row_offsets(const RowShape& shape, int64_t row,
                                                const LogitRows* const (&tensors)[kTensors],
                                                int64_t (&offsets)[kTensors]) {
  for (int t = 0; t < kTensors; ++t) offsets[t] = 0;
  DIMO_LOOP
  for (int d = shape.dims - 1; d > 0; --d) {
    const int64_t outer = quotient(row, shape.sizes[d]), inner = row - outer * shape.sizes[d];
    for (int t = 0; t < kTensors; ++t) offsets[t] += inner * tensors[t]->strides[d];
    row = outer;
  }
  if (shape.dims == 0) return;
  for (int t = 0; t < kTensors; ++t) offsets[t] += row * tensors[t]->strides[0];
}

DIMO_HOST_DEVICE static inline int64_t row_offset(const RowShape& shape, const LogitRows& logits, int64_t row) {
  int64_t offset[1];
  row_offsets(shape, row, {&logits}, offset);
  return offset[0];
}

// Where a row of a table begins, in elements; of ids outside the table, the first or the last one.
DIMO_HOST_DEVICE static inline int64_t table_offset(const LogitRows& table, int64_t table_rows, int64_t id) {
  return (id < 0 ? 0 : (id < table_rows ? id : table_rows - 1)) * table.strides[0];
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
