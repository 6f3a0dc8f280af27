// Key derivation and uniform words: one thread a key or four words, one launch. Moves at most 40 bytes a thread:
// launch-bound.
#include "common/random.h"

#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

constexpr int kThreads = 128;

__global__ __launch_bounds__(kThreads) void fold_in_kernel(FoldInArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < args.count) fold_in_one(args, index);
}

__global__ __launch_bounds__(kThreads) void uniform_words_kernel(UniformWordsArgs args) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block * kWordsABlock < args.count) uniform_words_of(args, block);
}

template <class Args>
int launch_threads(void (*kernel)(Args), int64_t threads, const Args& args, void* stream) {
  if (threads == 0) return cudaSuccess;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, args);
}

}  // namespace

int fold_in(const FoldInArgs& args, void* stream) { return launch_threads(fold_in_kernel, args.count, args, stream); }

int uniform_words(const UniformWordsArgs& args, void* stream) {
  return launch_threads(uniform_words_kernel, (args.count + kWordsABlock - 1) / kWordsABlock, args, stream);
}

}  // namespace dimo::cuda
