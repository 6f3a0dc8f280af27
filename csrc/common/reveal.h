// Which masked positions are revealed: the same numbers on every backend.
//
// Static: a file compiled for several instruction sets includes this.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/masking.h"
#include "common/philox.h"
#include "common/rows.h"
#include "ops.h"

namespace dimo {

// The random word of a position of a sample.
DIMO_HOST_DEVICE static inline uint32_t reveal_word(const int64_t* key, int64_t key_stride, int64_t sample,
                                                    int64_t position) {
  const RowStream stream(key, key_stride, OperatorTag::reveal, sample);
  const Words4 words = stream.words(static_cast<uint32_t>(position / 4));
  const uint32_t low = position & 1 ? words.word[1] : words.word[0],
                 high = position & 1 ? words.word[3] : words.word[2];
  return position & 2 ? high : low;  // selected, not indexed: that would put the words into memory
}

// Whether a row of a draw is wanted.
DIMO_HOST_DEVICE static inline bool is_wanted(const SampleCategoricalArgs& args, int64_t row) {
  const WantedRows& wanted = args.wanted;
  if (wanted.state == nullptr) return true;
  if (wanted.state[row] != wanted.mask_id) return false;
  const int64_t sample = quotient(row, args.rows_per_sample);
  const uint64_t below = bernoulli_threshold(wanted.chances != nullptr ? wanted.chances[sample] : wanted.chance);
  if (below >> 32 != 0) return true;
  return reveal_word(args.key, args.key_stride, sample, row - sample * args.rows_per_sample) < below;
}

constexpr uint64_t kNoCandidate = ~uint64_t{0};  // behind the key of every masked position

// Orders by confidence, the largest first: log-probability + noise_scale * Gumbel noise.
DIMO_HOST_DEVICE static inline uint64_t confidence_key(float log_prob, double noise_scale, uint32_t word) {
  const double noise = -log(-log((static_cast<double>(word) + 0.5) * 0x1p-32));
  const double confidence = static_cast<double>(log_prob) + noise_scale * noise + 0.0;  // no negative zero
  uint64_t bits;
  memcpy(&bits, &confidence, sizeof bits);
  return bits >> 63 != 0 ? bits : ~bits & (~uint64_t{0} >> 1);
}

}  // namespace dimo
