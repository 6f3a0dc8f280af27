// Confident reveals on the CPU: the draw of the masked positions, then a choice among them; samples over threads. The
// choice reads 20 bytes and writes 8 a token.
#include "common/reveal.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/select.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int64_t kTokensPerTask = 8192;  // about 0.1 ms

// Fills keys with those of the masked positions and returns how many there are.
int64_t confidence_keys(const RevealConfidentArgs& args, int64_t sample, int64_t* keys) {
  const SampleCategoricalArgs& draw = args.draw;
  const int64_t length = draw.rows_per_sample, first = sample * length;
  const RowStream stream(draw.key, draw.key_stride, OperatorTag::reveal, sample);
  int64_t masked = 0;
  Words4 words = {};
  for (int64_t i = 0; i < length; ++i) {
    if (i % 4 == 0) words = stream.words(static_cast<uint32_t>(i / 4));
    const bool here = draw.wanted.state[first + i] == draw.wanted.mask_id;
    const uint64_t key =
        here ? confidence_key(draw.log_prob[first + i], args.noise_scale, words.word[i % 4]) : kNoCandidate;
    keys[i] = static_cast<int64_t>(key);
    masked += here;
  }
  return masked;
}

void reveal_sample(const RevealConfidentArgs& args, int64_t sample) {
  const int64_t length = args.draw.rows_per_sample, first = sample * length;
  const int64_t* const state = args.draw.wanted.state + first;
  int64_t* const out = args.out_tokens + first;  // room for the keys
  const int64_t masked = confidence_keys(args, sample, out);
  const int64_t k = std::min(args.counts != nullptr ? args.counts[sample] : args.count, masked);
  if (k <= 0) return void(std::copy(state, state + length, out));
  const KeySearch search = find_smallest(k, out, length);
  const uint64_t bound = search.bound();
  int64_t ties = search.tied ? search.rank : length;
  for (int64_t i = 0; i < length; ++i) {
    const uint64_t key = static_cast<uint64_t>(out[i]);
    const bool revealed = key < bound || (key == bound && ties-- > 0);
    out[i] = revealed ? args.draw.tokens[first + i] : state[i];
  }
}

}  // namespace

void reveal_confident(const RevealConfidentArgs& args, int num_threads) {
  if (args.draw.shape.rows == 0) return;
  sample_categorical(args.draw, num_threads);
  const int64_t length = args.draw.rows_per_sample;
  parallel_rows(args.draw.shape.rows / length, std::max<int64_t>(kTokensPerTask / length, 1), num_threads,
                [&](int64_t begin, int64_t end) {
                  for (int64_t sample = begin; sample < end; ++sample) reveal_sample(args, sample);
                });
}

}  // namespace dimo::cpu
