// Rows that are read twice: those with a strided vocabulary, and long ones on GPUs without clusters.
#pragma once

#include "cuda/cross_entropy_block.h"

namespace dimo::cuda {
namespace {

// Statistics of the ids begin, begin + step, ... of a row, read kPack at a time so that loads do not wait for one
// another.
template <class T>
__device__ Statistics sweep(const CrossEntropyArgs& args, const T* row, int begin, int step, float target_logit) {
  const int size = static_cast<int>(args.valid_vocab);
  const bool smooth = args.label_smoothing > 0.0f;
  Statistics s;
  for (int id = begin; id < size; id += kPack * step) {
    float z[kPack], top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const int at = id + i * step;
      z[i] = at < size ? to_float(row[at * args.logits.vocab_stride]) : -INFINITY;
      top = fmaxf(top, z[i]);
      if (smooth && at < size) s.distance += z[i] - target_logit;
    }
    s.raise(top);
#pragma unroll
    for (int i = 0; i < kPack; ++i) s.sum += s.weight(z[i]);
  }
  return s;
}

template <class T>
__device__ void write_again(const CrossEntropyArgs& args, const T* row, T* gradient, int begin, int step, int target,
                            const Row& result) {
  const int size = static_cast<int>(args.valid_vocab);
#pragma unroll 8
  for (int id = begin; id < size; id += step) {
    const float z = to_float(row[id * args.logits.vocab_stride]);
    gradient[id * args.gradient.vocab_stride] =
        from_float<T>(id == target ? result.gradient_of_target() : result.gradient(z));
  }
}

// A lane a row, since neighbouring rows are neighbours in memory; the warps of the block share the ids.
template <class T>
__global__ __launch_bounds__(kMostThreads) void strided_kernel(const __grid_constant__ CrossEntropyArgs args,
                                                               int counts) {
  __shared__ float board[3][kMostWarps][kWarp];
  const float factor = factor_of(args, counts);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, vocab = static_cast<int>(args.shape.vocab);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int target = target_of(args, row);
  const bool there = row < args.shape.rows, wanted = there && args.gradient.data != nullptr;
  const T* const from = there ? at<const T>(args.logits, row_offset(args.shape, args.logits, row)) : nullptr;
  T* const to = wanted ? at<T>(args.gradient, row_offset(args.shape, args.gradient, row)) : nullptr;
  const float target_logit = target >= 0 ? to_float(from[target * args.logits.vocab_stride]) : 0.0f;
  Statistics s;
  if (target >= 0) s = sweep(args, from, warp, kMostWarps, target_logit);
  board[0][warp][lane] = s.top;
  board[1][warp][lane] = s.sum;
  board[2][warp][lane] = s.distance;
  __syncthreads();
  s = {};
  for (int i = 0; i < kMostWarps; ++i) s.merge(board[0][i][lane], board[1][i][lane], board[2][i][lane]);
  const Row result(args, s, target_logit, factor);
  int written = 0;
  if (wanted && target >= 0 && !result.lost()) {
    write_again(args, from, to, warp, kMostWarps, target, result);
    written = static_cast<int>(args.valid_vocab);
  }
  if (wanted)
    for (int id = written + warp; id < vocab; id += kMostWarps)
      to[id * args.gradient.vocab_stride] = from_float<T>(0.0f);
  const float value = target >= 0 ? result.value() : 0.0f;
  if (there && warp == 0 && args.total == nullptr) args.value[row] = value;
  add_up(args, warp == 0 ? value : 0.0f);
}

template <class T>
__global__ __launch_bounds__(kMostThreads) void stream_kernel(const __grid_constant__ CrossEntropyArgs args,
                                                              int counts) {
  const float factor = factor_of(args, counts);
  Team<0> team(shared_memory<char>());
  const int rank = team.rank(), threads = team.size(), vocab = static_cast<int>(args.shape.vocab);
  const bool wanted = args.gradient.data != nullptr;
  float part = 0.0f;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    const int target = target_of(args, row);
    const int64_t to = wanted ? row_offset(args.shape, args.gradient, row) : 0;
    float value = 0.0f;
    int written = 0;
    if (target >= 0) {
      const T* const from = at<const T>(args.logits, row_offset(args.shape, args.logits, row));
      const float target_logit = to_float(from[target * args.logits.vocab_stride]);
      Statistics s = sweep(args, from, rank, threads, target_logit);
      agree(s, team);
      const Row result(args, s, target_logit, factor);
      value = result.value();
      if (wanted && !result.lost()) {
        write_again(args, from, at<T>(args.gradient, to), rank, threads, target, result);
        written = static_cast<int>(args.valid_vocab);
      }
    }
    if (wanted) write_zeros<T>(args.gradient, to, written, vocab, rank, threads);
    if (rank != 0) continue;
    part += value;
    if (args.total == nullptr) args.value[row] = value;
  }
  add_up(args, part);
}

}  // namespace
}  // namespace dimo::cuda
