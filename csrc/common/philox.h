// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and the counters of this
// library.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace dimo {

struct Words4 {
  uint32_t word[4];
};

// What separates the random streams of operators that are given the same key. Python uses the same numbers.
enum class OperatorTag : uint32_t {
  mask_tokens = 1,
  init_mask = 2,
  init_ids = 3,
  sample_categorical = 4,
  perturb_embeddings = 5,
  reveal = 6,
  uniform = 7,
  fold_in = 255,
};

struct RandomKey {
  uint64_t seed;
  uint64_t offset;
};

constexpr int64_t kMaxPhiloxBlocks = int64_t{1} << 24;  // the operator's tag occupies the bits above

DIMO_HOST_DEVICE static inline Words4 philox4x32(Words4 counter, uint32_t key0, uint32_t key1) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = kMultiplier0 * counter.word[0];
    const uint64_t product1 = kMultiplier1 * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return counter;
}

// Four random words: a pure function of the key, the operator and the logical position, never of the launch geometry.
DIMO_HOST_DEVICE static inline Words4 random_words(RandomKey key, OperatorTag tag, uint32_t row, uint32_t block) {
  const Words4 counter = {{block | static_cast<uint32_t>(tag) << 24, row, static_cast<uint32_t>(key.offset),
                           static_cast<uint32_t>(key.offset >> 32)}};
  return philox4x32(counter, static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

// The key that a key and a number give, independent of the key's own draws and of other numbers.
DIMO_HOST_DEVICE static inline RandomKey folded_key(RandomKey key, int64_t n) {
  const Words4 words = random_words(key, OperatorTag::fold_in, static_cast<uint32_t>(n), 0);
  return {words.word[0] | static_cast<uint64_t>(words.word[1]) << 32,
          words.word[2] | static_cast<uint64_t>(words.word[3]) << 32};
}

// A uniform id below `count` from one word; the bias is at most count / 2^32.
DIMO_HOST_DEVICE static inline int64_t scaled_word(uint32_t word, uint32_t count) {
  return static_cast<int64_t>(static_cast<uint64_t>(word) * count >> 32);
}

// The random stream of one row: `keys` holds one (seed, offset) for all rows, or (stride 2) one a sample; the number of
// the row, in all or within its sample, tells apart the rows of a key.
struct RowStream {
  RandomKey key;
  OperatorTag tag;
  uint32_t row;

  DIMO_HOST_DEVICE RowStream(const int64_t* keys, int64_t key_stride, OperatorTag operator_tag, int64_t row_index,
                             int64_t rows_per_sample = 1)
      : tag(operator_tag), row(static_cast<uint32_t>(row_index)) {
    if (key_stride != 0) {
      const int64_t sample = row_index / rows_per_sample;
      row = static_cast<uint32_t>(row_index - sample * rows_per_sample);
      keys += sample * key_stride;
    }
    key = {static_cast<uint64_t>(keys[0]), static_cast<uint64_t>(keys[1])};
  }

  DIMO_HOST_DEVICE Words4 words(uint32_t block) const { return random_words(key, tag, row, block); }
};

}  // namespace dimo
