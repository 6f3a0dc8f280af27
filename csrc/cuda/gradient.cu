// A gradient that was computed in the forward pass, times what backward brings. Rows whose multiplier is 1 are not
// touched, so that an ordinary loss.backward() moves no gradient and waits for nothing.
#include <cstdint>

#include "cuda/launch.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kThreads = 256;

__global__ __launch_bounds__(kThreads) void scale_gradient_kernel(const __grid_constant__ ScaleGradientArgs args) {
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    float scale = args.upstream[row * args.upstream_stride];
    if (args.factor != nullptr) scale *= args.factor[row * args.factor_stride];
    if (scale == 1.0f && args.from.data == args.to.data) continue;
    const int64_t from = row_offset(args.shape, args.from, row), to = row_offset(args.shape, args.to, row);
    for (int64_t i = threadIdx.x; i < args.shape.vocab; i += kThreads) {
      const float x = load_element(args.from, from + i * args.from.vocab_stride);
      // A masked-out row may meet an infinite multiplier: its gradient stays exactly zero.
      store_element(args.to, to + i * args.to.vocab_stride, x == 0.0f ? 0.0f : x * scale);
    }
  }
}

}  // namespace

int scale_gradient(const ScaleGradientArgs& given, void* stream) {
  if (given.shape.rows == 0 || given.shape.vocab == 0) return cudaSuccess;
  ScaleGradientArgs args = given;
  merge_dims(args.shape, {&args.from, &args.to});
  return launch_resident(scale_gradient_kernel, 1, args.shape.rows, kThreads, 0, stream, args);
}

}  // namespace dimo::cuda
