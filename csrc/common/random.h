// One element of fold_in, four of uniform_words: the same on CPU and CUDA.
#pragma once

#include "common/philox.h"
#include "ops.h"

namespace dimo {

DIMO_HOST_DEVICE inline void fold_in_one(const FoldInArgs& args, int64_t index) {
  const int64_t* key = args.key + index * args.key_stride;
  const int64_t n = args.numbers != nullptr ? args.numbers[index] : args.n;
  const RandomKey folded = folded_key({static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1])}, n);
  args.out[2 * index] = static_cast<int64_t>(folded.seed);
  args.out[2 * index + 1] = static_cast<int64_t>(folded.offset);
}

constexpr int64_t kWordsABlock = 4;

DIMO_HOST_DEVICE inline void uniform_words_of(const UniformWordsArgs& args, int64_t block) {
  const Words4 words = RowStream(args.key, 0, OperatorTag::uniform, 0).words(static_cast<uint32_t>(block));
  for (int64_t i = 0; i < kWordsABlock && block * kWordsABlock + i < args.count; ++i)
    args.out[block * kWordsABlock + i] = words.word[i];
}

}  // namespace dimo
