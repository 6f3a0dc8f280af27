// Forward masking and initial tokens on the CPU: rows over threads; reads at most 8 and writes at most 9 bytes a token,
// the draw costs more than either.
#include "common/masking.h"

#include <algorithm>

#include "common/philox.h"
#include "cpu/parallel.h"
#include "cpu/select.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int64_t kTokensPerTask = 16384;  // about 0.1 ms

// Fills keys with the row's sort keys. The output row serves as room for them, which spares an allocation.
void draw_keys(const RowStream& stream, int64_t length, int64_t* keys) {
  for (int64_t start = 0; start < length; start += 4) {
    const Words4 words = stream.words(static_cast<uint32_t>(start / 4));
    for (int64_t i = start; i < std::min(start + 4, length); ++i)
      keys[i] = static_cast<int64_t>(sort_key(words.word[i - start], i));
  }
}

int64_t masked_count(const MaskTokensArgs& args, int64_t row, const int64_t* keys) {
  const float ratio = scheduled_ratio(args.schedule, args.ratios != nullptr ? args.ratios[row] : args.ratio);
  int64_t count = 0;
  if (args.bernoulli) {
    const uint64_t threshold = bernoulli_threshold(ratio);
    count = std::count_if(keys, keys + args.length,
                          [=](int64_t key) { return static_cast<uint64_t>(key) >> 32 < threshold; });
  } else {
    count = exact_count(ratio, args.length);
  }
  return bounded_count(count, args.min_masked, args.length);
}

void mask_row(const MaskTokensArgs& args, int64_t row) {
  const int64_t* tokens = args.tokens + row * args.length;
  int64_t* out = args.out_tokens + row * args.length;
  bool* mask = args.out_mask + row * args.length;

  draw_keys(RowStream(args.key, args.key_stride, OperatorTag::mask_tokens, row), args.length, out);
  const int64_t k = masked_count(args, row, out);
  const uint64_t bound = k > 0 ? find_smallest(k, out, args.length).bound() : 0;
  for (int64_t i = 0; i < args.length; ++i) {
    mask[i] = k > 0 && static_cast<uint64_t>(out[i]) <= bound;
    out[i] = mask[i] ? args.mask_id : tokens[i];
  }
}

void init_row(const InitTokensArgs& args, int64_t row) {
  int64_t* out = args.out_tokens + row * args.length;
  draw_keys(RowStream(args.key, args.key_stride, OperatorTag::init_mask, row), args.length, out);
  const int64_t k = exact_count(args.ratio, args.length);
  const uint64_t bound = k > 0 ? find_smallest(k, out, args.length).bound() : 0;

  const RowStream ids(args.key, args.key_stride, OperatorTag::init_ids, row);
  for (int64_t start = 0; start < args.length; start += 4) {
    const Words4 words = ids.words(static_cast<uint32_t>(start / 4));
    for (int64_t i = start; i < std::min(start + 4, args.length); ++i) {
      const bool masked = k > 0 && static_cast<uint64_t>(out[i]) <= bound;
      out[i] = masked ? args.mask_id : scaled_word(words.word[i - start], args.vocab_size);
    }
  }
}

template <class Args>
void for_each_row(const Args& args, int num_threads, void (*do_row)(const Args&, int64_t)) {
  if (args.batch == 0 || args.length == 0) return;
  const int64_t rows_per_task = std::max<int64_t>(1, kTokensPerTask / args.length);
  parallel_rows(args.batch, rows_per_task, num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) do_row(args, row);
  });
}

}  // namespace

void mask_tokens(const MaskTokensArgs& args, int num_threads) { for_each_row(args, num_threads, mask_row); }

void init_tokens(const InitTokensArgs& args, int num_threads) { for_each_row(args, num_threads, init_row); }

}  // namespace dimo::cpu
