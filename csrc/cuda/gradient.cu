// A gradient that was computed in the forward pass, times what backward brings. Rows whose multiplier is 1 are not
// touched, so that an ordinary loss.backward() moves no gradient and waits for nothing.
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kThreads = 256;

__device__ float scale_of(const ScaleGradientArgs& args, int64_t row) {
  const float scale = args.upstream[row * args.upstream_stride];
  return args.factor != nullptr ? scale * args.factor[row * args.factor_stride] : scale;
}

// A warp looks at 32 rows at once, and goes through those that change.
__global__ __launch_bounds__(kThreads) void scale_gradient_kernel(const __grid_constant__ ScaleGradientArgs args) {
  const int lane = threadIdx.x % kWarp;
  const bool in_place = args.from.data == args.to.data;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  int64_t first = (static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp) * kWarp;
  for (; first < args.shape.rows; first += warps * kWarp) {
    const float own = first + lane < args.shape.rows ? scale_of(args, first + lane) : 1.0f;
    unsigned changed = __ballot_sync(0xffffffffu, first + lane < args.shape.rows && !(in_place && own == 1.0f));
    for (; changed != 0; changed &= changed - 1) {
      const int next = __ffs(static_cast<int>(changed)) - 1;
      const float scale = __shfl_sync(0xffffffffu, own, next);
      const int64_t from = row_offset(args.shape, args.from, first + next);
      const int64_t to = row_offset(args.shape, args.to, first + next);
      for (int64_t i = lane; i < args.shape.vocab; i += kWarp) {
        const float x = load_element(args.from, from + i * args.from.vocab_stride);
        // A masked-out row may meet an infinite multiplier: its gradient stays exactly zero.
        store_element(args.to, to + i * args.to.vocab_stride, x == 0.0f ? 0.0f : x * scale);
      }
    }
  }
}

}  // namespace

int scale_gradient(const ScaleGradientArgs& given, void* stream) {
  if (given.shape.rows == 0 || given.shape.vocab == 0) return cudaSuccess;
  ScaleGradientArgs args = given;
  merge_dims(args.shape, {&args.from, &args.to});
  if (is_one_multiplier(args)) {
    lay_rows_densely(args.shape, {&args.from, &args.to});
    merge_dims(args.shape, {&args.from, &args.to});
  }
  return launch_resident(scale_gradient_kernel, 1, (args.shape.rows + kThreads - 1) / kThreads, kThreads, 0, stream,
                         args);
}

}  // namespace dimo::cuda
