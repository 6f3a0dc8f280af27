// What every kernel of the cross-entropy shares: which tokens count, sums over blocks, a row's statistics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/cross_entropy.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;
constexpr int kMostThreads = 512;
constexpr int kMostWarps = kMostThreads / kWarp;

template <class T>
constexpr DType kDType = DType::float32;
template <>
constexpr DType kDType<__half> = DType::float16;
template <>
constexpr DType kDType<__nv_bfloat16> = DType::bfloat16;

// Whether row and id are there, and the token counts.
__device__ int target_of(const CrossEntropyArgs& args, int64_t row) {
  if (row >= args.shape.rows || !counts(args.targets, args.mask, args.valid_vocab, row)) return -1;
  return static_cast<int>(args.targets[row]);
}

// The same, loaded early and looked at late, so that nothing waits for memory.
struct EarlyTarget {
  unsigned mask = 0;
  unsigned long long id = 0;

  __device__ EarlyTarget(const CrossEntropyArgs& args, int64_t row) {
    if (row >= args.shape.rows) return;
    mask = args.mask != nullptr ? load_8_bits(args.mask + row) : 1;
    id = load_64_bits(args.targets + row);
  }
  __device__ int value(const CrossEntropyArgs& args) const {
    return mask != 0 && id < static_cast<unsigned long long>(args.valid_vocab) ? static_cast<int>(id) : -1;
  }
};

template <class T>
__device__ T* at(const LogitRows& logits, int64_t element) {
  return static_cast<T*>(logits.data) + element;
}

// --- counting and summing -----------------------------------------------------------------------------------------

// The first word of the workspace is the number of blocks that are done, the others are counts of tokens.
constexpr int kMostCounts = static_cast<int>(kCrossEntropyWorkspace) - 1;
constexpr int kCountThreads = 512, kCountRows = 8 * kCountThreads;  // of a block

// Sum over the block; `scratch` holds a number a warp. Only thread 0 gets it.
template <class Number>
__device__ Number block_sum(Number x, Number* scratch) {
  __syncthreads();  // lanes that shared other rows come together; the scratch is free
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (unsigned warp = 1; warp < blockDim.x / kWarp && threadIdx.x == 0; ++warp) x += scratch[warp];
  return x;
}

__global__ __launch_bounds__(kCountThreads, 2) void count_kernel(const __grid_constant__ CrossEntropyArgs args) {
  __shared__ unsigned scratch[kMostWarps];
  if (blockIdx.x == 0 && threadIdx.x == 0) args.workspace[0] = 0;
  unsigned count = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCountThreads;
  if (args.mean)
    for (int64_t row = blockIdx.x * static_cast<int64_t>(kCountThreads) + threadIdx.x; row < args.shape.rows;
         row += step)
      count += target_of(args, row) >= 0;
  count = block_sum(count, scratch);
  if (threadIdx.x == 0) args.workspace[1 + blockIdx.x] = count;
}

int64_t count_blocks(const CrossEntropyArgs& args) {
  const int64_t blocks = (args.shape.rows + kCountRows - 1) / kCountRows;
  return !args.mean ? 1 : blocks < kMostCounts ? blocks : kMostCounts;
}

// What multiplies value and gradient. All lanes of a warp call it.
__device__ float factor_of(const CrossEntropyArgs& args, int counts) {
  float factor = args.scale;
  if (args.mean) {
    unsigned long long count = 0;
    for (int i = threadIdx.x % kWarp; i < counts; i += kWarp) count += args.workspace[1 + i];
    for (int step = kWarp / 2; step > 0; step /= 2) count += __shfl_xor_sync(0xffffffffu, count, step);
    factor /= static_cast<float>(count > 0 ? count : 1);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.factor = factor;
  return factor;
}

// Adds up what all threads bring, those of the first block of each cluster. The last block to come does it, in an order
// that depends on the launch alone.
__device__ void add_up(const CrossEntropyArgs& args, float part) {
  if (args.total == nullptr || cluster_rank() != 0) return;
  __shared__ float scratch[kMostWarps];
  __shared__ bool last;
  const unsigned teams = gridDim.x / cluster_size();
  part = block_sum(part, scratch);
  if (threadIdx.x == 0) {
    args.value[blockIdx.x / cluster_size()] = part;
    __threadfence();
    last = atomicAdd(args.workspace, 1u) == teams - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  part = 0.0f;
  for (unsigned i = threadIdx.x; i < teams; i += blockDim.x) part += args.value[i];
  part = block_sum(part, scratch);
  if (threadIdx.x == 0) *args.total = part;
}

// Of no rows.
__global__ void empty_kernel(const __grid_constant__ CrossEntropyArgs args) {
  *args.factor = args.scale;
  if (args.total != nullptr) *args.total = 0.0f;
}

// --- one row ------------------------------------------------------------------------------------------------------

// What a thread, a warp, all threads know of a row.
struct Statistics {
  float top = -INFINITY;
  float sum = 0.0f;       // of exp(z - base)
  float distance = 0.0f;  // sum of z - the target's logit, where labels are smoothed

  // Where every logit is -inf the base is 0, so that no difference of infinities arises.
  __device__ float base() const { return top == -INFINITY ? 0.0f : top; }
  __device__ float weight(float z) const { return exp2_fast((z - base()) * kLog2E); }

  __device__ void raise(float higher) {
    const float before = top;
    top = fmaxf(top, higher);
    if (before != -INFINITY) sum *= exp2_fast((before - top) * kLog2E);
  }
  __device__ void merge(float other_top, float other_sum, float other_distance) {
    raise(other_top);
    sum += other_top == -INFINITY && other_sum == 0.0f ? 0.0f : other_sum * weight(other_top);
    distance += other_distance;
  }
  __device__ bool dead() const { return top == -INFINITY && sum == 0.0f; }
};

template <int kLanes>
__device__ void agree_among_lanes(Statistics& s) {
  const float top = fold_lanes<kLanes>(Fold::max, s.top);
  if (s.top != -INFINITY) s.sum *= exp2_fast((s.top - top) * kLog2E);
  s = {top, fold_lanes<kLanes>(Fold::sum, s.sum), fold_lanes<kLanes>(Fold::sum, s.distance)};
}

template <int kLanes>
__device__ void agree(Statistics& s, Team<kLanes>& team) {
  agree_among_lanes<Team<kLanes>::kFirst>(s);
  if constexpr (kLanes == 0) {
    const int entries = team.entries();
    if (entries == 1) return;
    const float* board = team.share({s.top, s.sum, s.distance});
    s = {};
    for (int i = threadIdx.x % kWarp; i < entries; i += kWarp)
      s.merge(board[i], board[entries + i], board[2 * entries + i]);
    agree_among_lanes<kWarp>(s);
  }
}

// The gradient of a logit, and what follows from all of them.
class Row {
 public:
  __device__ Row(const CrossEntropyArgs& args, const Statistics& s, float target_logit, float factor)
      : s_(s), target_logit_(target_logit), factor_(factor), confidence_(1.0f - args.label_smoothing) {
    lost_ = s.dead() || s.sum != s.sum;  // NaN: a diverged row
    smoothing_ = args.label_smoothing / static_cast<float>(args.valid_vocab);
    scale_ = lost_ ? 0.0f : args.factor_in_gradient ? factor : 1.0f;
    share_ = scale_ / s.sum;
    shift_ = smoothing_ * scale_;
  }

  __device__ bool lost() const { return lost_; }
  __device__ float gradient(float z) const { return s_.weight(z) * share_ - shift_; }
  __device__ float gradient_of_target() const {
    return (s_.weight(target_logit_) / s_.sum - smoothing_ - confidence_) * scale_;
  }
  __device__ float value() const {
    if (s_.dead()) return 0.0f;
    float value = log2f(s_.sum) * kLn2 + (s_.base() - target_logit_);
    if (smoothing_ > 0.0f) value -= smoothing_ * s_.distance;
    if (target_logit_ == -INFINITY && !lost_) value = INFINITY;
    return value * factor_;
  }

 private:
  Statistics s_;
  float target_logit_, factor_, confidence_, smoothing_, scale_, share_, shift_;
  bool lost_;
};

// `rank` of `threads` threads write zeros to ids [begin, end) of a row.
template <class T>
__device__ void write_zeros(const LogitRows& to, int64_t row_begin, int begin, int end, int rank, int threads) {
  T* const row = at<T>(to, row_begin);
  const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row + begin) / sizeof(T) % kPack);
  if (to.vocab_stride == 1 && end - begin >= kWarp * kPack) {
    constexpr int kCell = 16 / sizeof(T);
    const int head = begin + (kPack - misaligned) % kPack, cells = (end - head) / kCell, tail = head + cells * kCell;
    for (int i = rank; i < cells; i += threads) reinterpret_cast<uint4*>(row + head)[i] = make_uint4(0, 0, 0, 0);
    for (int i = begin + rank; i < head; i += threads) row[i] = from_float<T>(0.0f);
    begin = tail;
  }
  for (int i = begin + rank; i < end; i += threads) row[i * to.vocab_stride] = from_float<T>(0.0f);
}

}  // namespace
}  // namespace dimo::cuda
