// Token-level f-divergence and its gradient on the CPU: the rows of one task, in SIMD. Compiled once an instruction set
// (DIMO_ISA); cpu/divergence.cpp chooses. From memory it reads every logit once (rows that fit the first-level cache)
// and writes every gradient once.
#include "common/divergences.h"
#include "cpu/divergence_tile.h"
#include "cpu/isa.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

template <class Layout, class Divergence, bool kWhole>
void run_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  Buffers buffers;
  Tile<Layout, Divergence, kWhole> tile(args, buffers);
  int64_t counted[Layout::kRows];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if ((args.mask != nullptr && !args.mask[row]) || factor_of(args, row) == 0.0f) {
      args.value[row] = 0.0f;
      if (args.gradient.data != nullptr) zero_row(args.shape, args.gradient, row);
      continue;
    }
    if (count == Layout::kRows) {
      tile.run(counted, count, row);
      count = 0;
    }
    counted[count++] = row;
  }
  if (count > 0) tile.run(counted, count, counted[0]);
}

template <class Layout, class Divergence>
void run_width(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  const bool whole = args.shape.vocab <= Layout::kCapacity;
  return whole ? run_rows<Layout, Divergence, true>(args, begin, end)
               : run_rows<Layout, Divergence, false>(args, begin, end);
}

template <class Divergence>
void run_layout(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  const bool strided = args.teacher.vocab_stride != 1 || args.auxiliary.vocab_stride != 1;
  const bool across = strided || args.shape.vocab <= kShortVocab;
  return across ? run_width<Across, Divergence>(args, begin, end) : run_width<Along, Divergence>(args, begin, end);
}

}  // namespace

void DIMO_ISA::token_divergence_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  with_divergence<VecMath>(args.kind,
                           [&](auto divergence) { run_layout<typename decltype(divergence)::type>(args, begin, end); });
}

}  // namespace dimo::cpu
