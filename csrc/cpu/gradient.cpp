// A gradient that was computed in the forward pass, times what backward brings, on the CPU: rows over threads;
// gradient_rows.cpp has the rows.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {

void scale_gradient(const ScaleGradientArgs& given, int num_threads) {
  constexpr int64_t kEntriesPerTask = 131072;  // about 0.1 ms
  ScaleGradientArgs args = given;
  if (args.upstream_stride == 0 && args.factor_stride == 0) lay_rows_densely(args.shape, {&args.from, &args.to});
  merge_dims(args.shape, {&args.from, &args.to});
  const int64_t rows = std::max<int64_t>(kEntriesPerTask / std::max<int64_t>(args.shape.vocab, 1), 1);
  const auto kernel = DIMO_PICK(scale_gradient_rows);
  parallel_rows(args.shape.rows, rows, num_threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace dimo::cpu
