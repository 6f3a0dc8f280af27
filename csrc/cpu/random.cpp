// Key derivation and uniform words on the CPU: some 20 ns a key or four words, one thread.
#include "common/random.h"

namespace dimo::cpu {

void fold_in(const FoldInArgs& args, int) {
  for (int64_t index = 0; index < args.count; ++index) fold_in_one(args, index);
}

void uniform_words(const UniformWordsArgs& args, int) {
  for (int64_t block = 0; block * kWordsABlock < args.count; ++block) uniform_words_of(args, block);
}

}  // namespace dimo::cpu
