// Token-level f-divergence on the CPU: rows over threads; divergence_rows.cpp has the rows.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {

void token_divergence(const TokenDivergenceArgs& given, int num_threads) {
  TokenDivergenceArgs args = given;
  merge_dims(args.shape, {&args.teacher, &args.uncond, &args.auxiliary, &args.gradient});
  // About 0.1 ms, or where that leaves tasks enough a huge page of fresh memory, which two threads would both clear.
  constexpr int64_t kFewEntries = 65536, kManyEntries = 524288, kTasksPerThread = 16;
  constexpr int64_t kRowsAcross = 16;  // short rows are taken so many at a time
  const int64_t share = args.shape.rows * args.shape.vocab / (kTasksPerThread * std::max(num_threads, 1));
  const int64_t entries = std::clamp(share, kFewEntries, kManyEntries);
  const int64_t rows = entries / std::max<int64_t>(args.shape.vocab, 1);
  const auto kernel = DIMO_PICK(token_divergence_rows);
  parallel_rows(args.shape.rows, std::max(rows / kRowsAcross * kRowsAcross, kRowsAcross), num_threads,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace dimo::cpu
