// A gradient that was computed in the forward pass, times what backward brings, on the CPU: rows over threads;
// gradient_rows.cpp has the rows.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

// Elements [begin, end) as one row.
ScaleGradientArgs run_of(ScaleGradientArgs args, int64_t begin, int64_t end) {
  args.shape = {1, end - begin, 0, {}};
  for (LogitRows* rows : {&args.from, &args.to})
    rows->data = static_cast<char*>(rows->data) + begin * bytes_of(rows->dtype);
  return args;
}

}  // namespace

void scale_gradient(const ScaleGradientArgs& given, int num_threads) {
  constexpr int64_t kEntriesPerTask = 131072;  // about 0.1 ms
  const auto kernel = DIMO_PICK(scale_gradient_rows);
  ScaleGradientArgs args = given;
  merge_dims(args.shape, {&args.from, &args.to});
  if (is_one_multiplier(args)) {
    lay_rows_densely(args.shape, {&args.from, &args.to});
    merge_dims(args.shape, {&args.from, &args.to});
    if (is_dense(args.shape, args.from) && is_dense(args.shape, args.to))  // no rows: a run of numbers
      return parallel_rows(args.shape.rows * args.shape.vocab, kEntriesPerTask, num_threads,
                           [&](int64_t begin, int64_t end) { kernel(run_of(args, begin, end), 0, 1); });
  }
  const int64_t rows = std::max<int64_t>(kEntriesPerTask / std::max<int64_t>(args.shape.vocab, 1), 1);
  parallel_rows(args.shape.rows, rows, num_threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace dimo::cpu
