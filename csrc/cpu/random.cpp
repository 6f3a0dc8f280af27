// Key derivation on the CPU: some 20 ns a key, one thread.
#include "common/random.h"

namespace dimo::cpu {

void fold_in(const FoldInArgs& args, int) {
  for (int64_t index = 0; index < args.count; ++index) fold_in_one(args, index);
}

}  // namespace dimo::cpu
