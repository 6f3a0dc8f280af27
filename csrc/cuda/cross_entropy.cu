// Masked cross-entropy and its gradient: one launch over the logits, which reads each of them once and writes each
// gradient once. Before it, where values are reduced, a launch that counts tokens (9 bytes each). Rows that do not
// count are not read: zeros are written.
//
// A row lives in the registers of the threads that share it: lanes of a warp, a block or a cluster of blocks, as the
// vocabulary asks. Rows whose vocabulary is strided, and long ones on GPUs without clusters, are read twice.
#include <cstdint>

#include "common/cross_entropy.h"
#include "cuda/cross_entropy_block.h"
#include "cuda/cross_entropy_sweeps.h"
#include "cuda/launch.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

// --- lanes a row --------------------------------------------------------------------------------------------------

// kLanes neighbours share a row and take its elements in turn: warps read memory without gaps.
template <class T, int kLanes, int kHeld>
__global__ __launch_bounds__(128, 6) void lanes_kernel(const __grid_constant__ CrossEntropyArgs args, int counts) {
  constexpr int kRows = 128 / kLanes;
  Team<kLanes> team(nullptr);
  const int rank = team.rank(), vocab = static_cast<int>(args.shape.vocab), size = static_cast<int>(args.valid_vocab);
  const bool smooth = args.label_smoothing > 0.0f, wanted = args.gradient.data != nullptr;
  const float factor = factor_of(args, counts);
  const auto each = [&](const auto& visit) {
#pragma unroll
    for (int s = 0; s < kHeld; ++s)
      if (s * kLanes + rank < size) visit(s);
  };
  float part = 0.0f;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRows;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes; row < args.shape.rows;
       row += step) {
    const int target = target_of(args, row);
    const int64_t to = wanted ? row_offset(args.shape, args.gradient, row) : 0;
    float value = 0.0f;
    int written = 0;
    if (target >= 0) {
      const T* const from = at<const T>(args.logits, row_offset(args.shape, args.logits, row));
      float z[kHeld];
      Statistics s;
      each([&](int i) { z[i] = to_float(from[i * kLanes + rank]); });
      const float target_logit = to_float(from[target]);
      each([&](int i) { s.top = fmaxf(s.top, z[i]); });
      s.top = fold_lanes<kLanes>(Fold::max, s.top);
      each([&](int i) { s.sum += s.weight(z[i]); });
      if (smooth) each([&](int i) { s.distance += z[i] - target_logit; });
      s.sum = fold_lanes<kLanes>(Fold::sum, s.sum);
      if (smooth) s.distance = fold_lanes<kLanes>(Fold::sum, s.distance);
      const Row result(args, s, target_logit, factor);
      value = result.value();
      if (wanted && !result.lost()) {
        T* const gradient = at<T>(args.gradient, to);
        each([&](int i) {
          gradient[(i * kLanes + rank) * args.gradient.vocab_stride] = from_float<T>(result.gradient(z[i]));
        });
        if (target % kLanes == rank)
          gradient[target * args.gradient.vocab_stride] = from_float<T>(result.gradient_of_target());
        written = size;
      }
    }
    if (wanted && written < vocab) write_zeros<T>(args.gradient, to, written, vocab, rank, kLanes);
    if (rank != 0) continue;
    part += value;
    if (args.total == nullptr) args.value[row] = value;
  }
  add_up(args, part);
}

// --- launches -----------------------------------------------------------------------------------------------------

template <class T, int kLanes, int kHeld>
int launch_lanes(const CrossEntropyArgs& args, int counts, void* stream) {
  constexpr int64_t kRows = 128 / kLanes;
  return launch_resident(lanes_kernel<T, kLanes, kHeld>, 1, (args.shape.rows + kRows - 1) / kRows, 128, 0, stream, args,
                         counts);
}

// Packs that a thread has of a row, if a block of a size allowed can have so few.
constexpr int64_t kPacks = 4;
// Of a row in a block's shared memory, which holds two: two blocks fit a processor.
constexpr int64_t kMostRowBytes = 48 << 10;

template <class T>
int launch_blocks(const CrossEntropyArgs& args, int64_t cluster, int counts, void* stream) {
  const int64_t slice = ((args.shape.vocab + cluster - 1) / cluster + kPack - 1) / kPack * kPack;
  int64_t threads = ((args.shape.vocab + cluster - 1) / cluster / kPack + kPacks - 1) / kPacks;
  threads = threads < kMostThreads ? (threads + kWarp - 1) / kWarp * kWarp : kMostThreads;
  return launch_resident(block_kernel<T>, static_cast<unsigned>(cluster), args.shape.rows,
                         static_cast<unsigned>(threads), Block<T>::shared_bytes(slice, threads / kWarp * cluster),
                         stream, args, counts, static_cast<int>(slice));
}

template <class T>
int launch_geometry(const CrossEntropyArgs& args, int counts, void* stream) {
  const int64_t vocab = args.shape.vocab, rows = args.shape.rows;
  if (args.logits.vocab_stride != 1 && vocab > 1) {
    const int64_t blocks = (rows + kWarp - 1) / kWarp;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    return launch(strided_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kMostThreads), 0, stream, args, counts);
  }
  if (vocab <= 4 * 5) return launch_lanes<T, 4, 5>(args, counts, stream);
  if (vocab <= 8 * 9) return launch_lanes<T, 8, 9>(args, counts, stream);
  if (vocab <= kWarp * 9) return launch_lanes<T, kWarp, 9>(args, counts, stream);
  int64_t cluster = 1;
  while (vocab * static_cast<int64_t>(sizeof(T)) > cluster * kMostRowBytes) cluster *= 2;
  if (cluster == 1 || (cluster <= 16 && has_clusters())) return launch_blocks<T>(args, cluster, counts, stream);
  return launch_resident(stream_kernel<T>, 1, rows, kMostThreads, Block<T>::shared_bytes(0, kMostWarps), stream, args,
                         counts);
}

}  // namespace

int masked_cross_entropy(const CrossEntropyArgs& given, void* stream) {
  CrossEntropyArgs args = given;
  merge_dims(args.shape, {&args.logits, &args.gradient});
  const int counts = static_cast<int>(count_blocks(args));
  if (args.shape.rows == 0) return launch(empty_kernel, dim3(1), dim3(1), 0, stream, args);
  if (args.total != nullptr) {
    const dim3 grid(static_cast<unsigned>(counts));
    const int error = launch(count_kernel, grid, dim3(kCountThreads), 0, stream, args);
    if (error != cudaSuccess) return error;
  }
  switch (args.logits.dtype) {
    case DType::float32:
      return launch_geometry<float>(args, counts, stream);
    case DType::float16:
      return launch_geometry<__half>(args, counts, stream);
    case DType::bfloat16:
      return launch_geometry<__nv_bfloat16>(args, counts, stream);
  }
  return cudaErrorInvalidConfiguration;
}

}  // namespace dimo::cuda
