// Masked cross-entropy on the CPU: the count of tokens, rows over threads, the sum; cross_entropy_rows.cpp has the
// rows.
#include <algorithm>

#include "common/cross_entropy.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

int64_t count_tokens(const CrossEntropyArgs& args) {
  int64_t count = 0;
  for (int64_t row = 0; row < args.shape.rows; ++row) count += counts(args.targets, args.mask, args.valid_vocab, row);
  return count;
}

// In an order that depends on nothing but n, with enough sums side by side to fill a register.
double sum_of(const float* values, int64_t n) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
    for (int k = 0; k < kSums; ++k) sums[k] += static_cast<double>(values[i + k]);
  for (; i < n; ++i) sums[i % kSums] += static_cast<double>(values[i]);
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  return sums[0];
}

}  // namespace

void masked_cross_entropy(const CrossEntropyArgs& given, int num_threads) {
  CrossEntropyArgs args = given;
  merge_dims(args.shape, {&args.logits, &args.gradient});
  constexpr int64_t kEntriesPerTask = 65536;  // about 0.1 ms
  constexpr int64_t kRowsAcross = 16;         // short rows are taken so many at a time
  constexpr int64_t kRowsOfColumns = 256;
  *args.factor = args.mean ? args.scale / static_cast<float>(std::max<int64_t>(count_tokens(args), 1)) : args.scale;
  // Where the vocabulary is strided, many rows share what is read at once.
  const int64_t rows = args.logits.vocab_stride == 1 ? kEntriesPerTask / args.shape.vocab : kRowsOfColumns;
  const auto kernel = DIMO_PICK(cross_entropy_rows);
  parallel_rows(args.shape.rows, std::max(rows / kRowsAcross * kRowsAcross, kRowsAcross), num_threads,
                [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (args.total != nullptr) *args.total = static_cast<float>(sum_of(args.value, args.shape.rows));
}

}  // namespace dimo::cpu
