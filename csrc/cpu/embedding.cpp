// Embedding noise on the CPU: rows over threads; embedding_rows.cpp has the rows.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {

void perturb_embeddings(const PerturbEmbeddingsArgs& args, int num_threads) {
  constexpr int64_t kEntriesPerTask = 32768;  // about 0.1 ms
  const int64_t rows = std::max<int64_t>(kEntriesPerTask / std::max<int64_t>(args.shape.vocab, 1), 1);
  const auto kernel = DIMO_PICK(perturb_embeddings_rows);
  parallel_rows(args.shape.rows, rows, num_threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

}  // namespace dimo::cpu
