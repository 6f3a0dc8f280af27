// Long vocabularies: a block, or the blocks of a cluster, have a row.
#pragma once

#include "cuda/cross_entropy_row.h"
#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

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
    if (single < size_)
      *at<T>(to, first + single * to.vocab_stride) = from_float<T>(result.gradient(from_bits<T>(sent.single)));
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

}  // namespace
}  // namespace dimo::cuda
