// Token-level f-divergence and its gradient on the CPU: the rows of one task, in SIMD. Compiled once an instruction set
// (DIMO_ISA); cpu/divergence.cpp chooses. From memory it reads every logit once (rows that fit the first-level cache)
// and writes every gradient once.
#include "common/divergences.h"
#include "cpu/divergence_tile.h"
#include "cpu/isa.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

bool counts(const TokenDivergenceArgs& args, int64_t row) {
  return (args.mask == nullptr || args.mask[row]) && factor_of(args, row) != 0.0f;
}

// Value and gradient are 0.
void skip_row(const TokenDivergenceArgs& args, int64_t row) {
  args.value[row] = 0.0f;
  if (args.gradient.data != nullptr) zero_row(args.shape, args.gradient, row);
}

// Whether rows lie side by side, as in [B, V, H, W]: they share cache lines, those that do not count come along.
bool side_by_side(const TokenDivergenceArgs& args) {
  const int32_t last = args.shape.dims - 1;
  if (last < 0 || args.shape.sizes[last] < kLanes) return false;
  for (const LogitRows* logits : {&args.teacher, &args.uncond, &args.auxiliary, &args.gradient})
    if (logits->data != nullptr && (logits->vocab_stride == 1 || logits->strides[last] != 1)) return false;
  return true;
}

template <class Tile>
void run_counting(Tile& tile, const TokenDivergenceArgs& args, const int64_t* rows, int count, uint32_t counting,
                  int64_t next) {
  if (counting != 0) return tile.run(rows, count, counting, next);
  for (int r = 0; r < count; ++r) skip_row(args, rows[r]);
}

template <class Layout, class Divergence, bool kWhole>
void run_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  Buffers buffers;
  Tile<Layout, Divergence, kWhole> tile(args, buffers);
  const bool together = Layout::kRows > 1 && side_by_side(args);
  int64_t rows[Layout::kRows] = {};
  int count = 0;
  uint32_t counting = 0;
  for (int64_t row = begin; row < end; ++row) {
    const bool wanted = counts(args, row);
    if (!wanted && !together) {
      skip_row(args, row);
      continue;
    }
    if (count == Layout::kRows) {
      run_counting(tile, args, rows, count, counting, row);
      count = 0;
      counting = 0;
    }
    counting |= static_cast<uint32_t>(wanted) << count;
    rows[count++] = row;
  }
  run_counting(tile, args, rows, count, counting, rows[0]);
  finish_streams();
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
