// Masked cross-entropy and its gradient: one launch over the logits, which reads each of them once and writes each
// gradient once. Before it, where values are reduced, a launch that counts tokens (9 bytes each). Rows that do not
// count are not read: zeros are written.
//
// A row lives in the registers of the threads that share it: lanes of a warp, a block or a cluster of blocks, as the
// vocabulary asks. Rows whose vocabulary is strided, and long ones on GPUs without clusters, are read twice.
#include <cstdint>
#include <type_traits>

#include "common/cross_entropy.h"
#include "cuda/launch.h"
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

// --- a block or a cluster a row -----------------------------------------------------------------------------------

// Blocks go from row to row. While one is worked on, the packs of the next are on their way to the other half of the
// shared memory, each to the cells of the thread that will use them, so that no barrier is needed.
template <class T>
class Block {
 public:
  __device__ Block(const CrossEntropyArgs& args, int slice, float factor, char* shared)
      : args_(args), team_(shared), rank_(team_.rank()), threads_(team_.size()), factor_(factor) {
    cells_ = reinterpret_cast<uint4*>(shared + Team<0>::scratch_bytes(team_.entries()));
    half_ = slice / kPack * kCells;
    const int vocab = static_cast<int>(args.shape.vocab), size = static_cast<int>(args.valid_vocab);
    begin_ = min(static_cast<int>(cluster_rank()) * slice, vocab);
    vocab_ = min(slice, vocab - begin_);
    size_ = min(max(size - begin_, 0), vocab_);
  }

  static size_t shared_bytes(int64_t slice, int64_t entries) {
    return static_cast<size_t>(Team<0>::scratch_bytes(static_cast<int>(entries)) +
                               2 * slice * static_cast<int>(sizeof(T)));
  }

  // The sum of the values of the thread's rows.
  __device__ float run() {
    const int64_t step = gridDim.x / cluster_size();
    int64_t row = blockIdx.x / cluster_size();
    int target = target_of(args_, row), next_target = target_of(args_, row + step);
    float part = 0.0f;
    Sent sent = fetch(row, target, 0);
    for (int odd = 0; row < args_.shape.rows; row += step, odd ^= 1) {
      const EarlyTarget later(args_, row + 2 * step);
      wait_for_copies();
      const Sent next = fetch(row + step, next_target, odd ^ 1);
      float value = 0.0f;
      const int written = target >= 0 ? work(row, target, sent, cells_ + odd * half_, value) : 0;
      if (args_.gradient.data != nullptr && written < vocab_)
        write_zeros<T>(args_.gradient, row_offset(args_.shape, args_.gradient, row) + begin_, written, vocab_, rank_,
                       threads_);
      if (begin_ == 0 && rank_ == 0) {
        part += value;
        if (args_.total == nullptr) args_.value[row] = value;
      }
      sent = next;
      target = next_target;
      next_target = later.value(args_);
    }
    if (cluster_size() > 1) cluster_sync();  // no block leaves while others write to its shared memory
    return part;
  }

 private:
  static constexpr int kCells = kPack * sizeof(T) / 16;

  // What is known of a row beside its packs.
  struct Sent {
    Split split{0, 0, 0, 0};
    unsigned single = 0, target_logit = 0;  // bits
  };

  __device__ Sent fetch(int64_t row, int target, int odd) const {
    Sent sent;
    if (target < 0) return sent;  // also behind the last row
    const int64_t offset = row_offset(args_.shape, args_.logits, row);
    sent.target_logit = load_bits(at<const T>(args_.logits, offset + target));
    const T* const first = at<const T>(args_.logits, offset + begin_);
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(first) / sizeof(T) % kPack);
    sent.split = Split(size_, misaligned, threads_, 1 << 16);
    const auto* from = reinterpret_cast<const uint4*>(first + sent.split.head);
    for (int cell = rank_ * kCells; cell < sent.split.packs * kCells; cell += threads_ * kCells)
#pragma unroll
      for (int c = 0; c < kCells; ++c) copy_async(cells_ + odd * half_ + cell + c, from + cell + c);
    const int single = sent.split.single(rank_);
    if (single < size_) sent.single = load_bits(first + single);
    return sent;
  }

  // Calls visit(pack, numbers) for the packs of the thread.
  template <class Visit>
  __device__ void each_pack(const Sent& sent, const uint4* cells, const Visit& visit) const {
#pragma unroll 4
    for (int pack = rank_; pack < sent.split.packs; pack += threads_) {
      float z[kPack];
      unpack<T>(cells + pack * kCells, z);
      visit(pack, z);
    }
  }

  // How many gradients were written.
  __device__ int work(int64_t row, int target, const Sent& sent, const uint4* cells, float& value) {
    const bool single = sent.split.single(rank_) < size_;
    const float single_logit = from_bits<T>(sent.single), target_logit = from_bits<T>(sent.target_logit);
    Statistics s;
    if (single) s.top = fmaxf(s.top, single_logit);
    each_pack(sent, cells, [&](int, const float (&z)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) s.top = fmaxf(s.top, z[i]);
    });
    s.top = fold_lanes<kWarp>(Fold::max, s.top);
    if (single) s.sum = s.weight(single_logit);
    each_pack(sent, cells, [&](int, const float (&z)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) s.sum += s.weight(z[i]);
    });
    if (args_.label_smoothing > 0.0f) {
      if (single) s.distance = single_logit - target_logit;
      each_pack(sent, cells, [&](int, const float (&z)[kPack]) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) s.distance += z[i] - target_logit;
      });
    }
    agree(s, team_);
    const Row result(args_, s, target_logit, factor_);
    value = result.value();
    if (args_.gradient.data == nullptr || result.lost()) return 0;
    write(row, target, sent, cells, result);
    return size_;
  }

  __device__ void write(int64_t row, int target, const Sent& sent, const uint4* cells, const Row& result) const {
    LogitRows to = args_.gradient;
    to.dtype = kDType<T>;
    const Split& split = sent.split;
    const int64_t first = row_offset(args_.shape, args_.gradient, row) + begin_;
    const bool whole = to.vocab_stride == 1 && reinterpret_cast<uintptr_t>(at<T>(to, first + split.head)) % 16 == 0;
    each_pack(sent, cells, [&](int pack, float (&z)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) z[i] = result.gradient(z[i]);
      const int64_t begin = first + split.pack(pack) * to.vocab_stride;
      if (whole) {
        store_pack(to, begin, z);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) *at<T>(to, begin + i * to.vocab_stride) = from_float<T>(z[i]);
      }
    });
    const int single = split.single(rank_), own = target - begin_, pack = (own - split.head) / kPack;
    if (single < size_) *at<T>(to, first + single * to.vocab_stride) = from_float<T>(result.gradient(from_bits<T>(sent.single)));
    // The thread that wrote the target's gradient writes it once more.
    const bool in_pack = own >= split.head && pack < split.packs;
    if (own >= 0 && own < size_ && (in_pack ? pack % threads_ == rank_ : single == own))
      *at<T>(to, first + own * to.vocab_stride) = from_float<T>(result.gradient_of_target());
  }

  const CrossEntropyArgs& args_;
  Team<0> team_;
  const int rank_, threads_;
  uint4* cells_;
  int half_;  // cells of a half
  const float factor_;
  int begin_, vocab_, size_;  // of the block's slice; size_ counts the valid ids
};

template <class T>
__global__ __launch_bounds__(kMostThreads, 2) void block_kernel(const __grid_constant__ CrossEntropyArgs args,
                                                                int counts, int slice) {
  const float factor = factor_of(args, counts);
  Block<T> block(args, slice, factor, shared_memory<char>());
  add_up(args, block.run());
}

// --- two sweeps over memory ---------------------------------------------------------------------------------------

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
