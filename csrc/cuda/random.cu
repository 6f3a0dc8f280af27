// Key derivation: one thread a key, one launch. Reads at most 24 and writes 16 bytes a key: launch-bound.
#include "common/random.h"

#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

constexpr int kThreads = 128;

__global__ __launch_bounds__(kThreads) void fold_in_kernel(FoldInArgs args) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index < args.count) fold_in_one(args, index);
}

}  // namespace

int fold_in(const FoldInArgs& args, void* stream) {
  if (args.count == 0) return cudaSuccess;
  const int64_t blocks = (args.count + kThreads - 1) / kThreads;
  return launch(fold_in_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, args);
}

}  // namespace dimo::cuda
