// A gradient times what backward brings: the rows of one task, in SIMD. Compiled once an instruction set (DIMO_ISA);
// cpu/gradient.cpp chooses. Reads and writes every element once; in place, rows whose multiplier is 1 are not touched.
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int64_t kChunk = 1024;

float scale_of(const ScaleGradientArgs& args, int64_t row) {
  const float scale = args.upstream[row * args.upstream_stride];
  return args.factor != nullptr ? scale * args.factor[row * args.factor_stride] : scale;
}

template <class T>
void scale_row(const ScaleGradientArgs& args, int64_t row, float scale, float* chunk) {
  const T* from = static_cast<const T*>(args.from.data) + row_offset(args.shape, args.from, row);
  T* to = static_cast<T*>(args.to.data) + row_offset(args.shape, args.to, row);
  for (int64_t begin = 0; begin < args.shape.vocab; begin += kChunk) {
    const int64_t rest = args.shape.vocab - begin, n = rest < kChunk ? rest : kChunk;
    read_run(from + begin * args.from.vocab_stride, args.from.vocab_stride, n, chunk);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec x = load(chunk + i);
      // A masked-out row may meet an infinite multiplier: its gradient stays exactly zero.
      store(chunk + i, x == 0.0f ? Vec{} : x * scale);
    }
    write_run(chunk, args.to.vocab_stride, n, to + begin * args.to.vocab_stride);
  }
}

}  // namespace

void DIMO_ISA::scale_gradient_rows(const ScaleGradientArgs& args, int64_t begin, int64_t end) {
  const bool in_place = args.from.data == args.to.data;
  alignas(64) float chunk[kChunk] = {};
  for (int64_t row = begin; row < end; ++row) {
    const float scale = scale_of(args, row);
    if (in_place && scale == 1.0f) continue;
    with_type(args.from.dtype,
              [&](auto* type) { scale_row<std::remove_pointer_t<decltype(type)>>(args, row, scale, chunk); });
  }
}

}  // namespace dimo::cpu
