// Categorical draws on the CPU: rows over threads; sampling_rows.cpp has the rows.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {

void sample_categorical(const SampleCategoricalArgs& given, int num_threads) {
  SampleCategoricalArgs args = given;
  merge_dims(args.shape, {&args.logits, &args.uncond});
  constexpr int64_t kEntriesPerTask = 131072;  // about 0.1 ms
  constexpr int64_t kRowsAcross = 16;          // short rows are taken so many at a time
  const int64_t rows = kEntriesPerTask / std::max<int64_t>(args.shape.vocab, 1);
  const auto kernel = DIMO_PICK(sample_categorical_rows);
  parallel_rows(args.shape.rows, std::max(rows / kRowsAcross * kRowsAcross, kRowsAcross), num_threads,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace dimo::cpu
