// Long vocabularies: a block, or the blocks of a cluster, have a row.
#pragma once

#include "cuda/divergence_fast.h"
#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

constexpr int kMostThreads = 512, kMostBlocks = 16;  // a block, a cluster
constexpr int64_t kMostRows = 1 << 30;               // of a long vocabulary: no GPU holds more

// Blocks go from row to row. While one is worked on, the packs of the next are on their way to shared memory.
template <class Divergence, int kPacks>
class Block {
 public:
  __device__ Block(const TokenDivergenceArgs& args, const Rates& rates, int slice, char* shared)
      : args_(args), rates_(rates), team_(shared), rank_(team_.rank()), threads_(team_.size()) {
    mailbox_ = reinterpret_cast<Mailbox*>(shared + Team<0>::scratch_bytes(team_.entries()));
    ticket_ = reinterpret_cast<int*>(mailbox_ + 1);
    cells_ = reinterpret_cast<uint4*>(mailbox_ + 2);
    if (kHasMailbox) {
      if (rank_ == 0) mailbox_->open();
      __syncthreads();
    }
    begin_ = min(static_cast<int64_t>(cluster_rank()) * slice, args.shape.vocab);
    size_ = min(static_cast<int64_t>(slice), args.shape.vocab - begin_);
  }

  __device__ void run() {
    // Begins with a turn that only fetches.
    const int rows = static_cast<int>(args_.shape.rows), step = gridDim.x / cluster_size();
    int row = -1, next = blockIdx.x / cluster_size(), later = next + step;
    bool counts = false, next_counts = mask_bits(args_, next) != 0;
    while (row < rows) {
      // What is derived from these does not stay in registers from row to row.
      forget(rank_);
      forget(threads_);
      const unsigned later_mask = mask_bits(args_, later);
      const int last = request(later, step);
      const Split split = split_;
      const bool sent = sent_;
      const Token token = {row, begin_, size_, counts ? scale_of(args_, row) : 1.0f,
                           counts ? factor_of(args_, row) : 0.0f};
      if (counts && sent) {
        take_cells(token, split);
        team_.sync();  // all cells are free
      }
      if (next_counts) fetch(next);
      if (row >= 0) {
        const int64_t first = args_.gradient.data != nullptr ? first_gradient(args_, row, begin_) : 0;
        if (token.factor == 0.0f)
          skip(token, first);
        else if (!(sent && work(token, split, first)))
          team_ = general_row<Divergence, 0>(args_, token, team_);
      }
      row = next;
      next = later;
      later = receive(last);
      counts = next_counts;
      next_counts = later_mask != 0;
    }
    if (cluster_size() > 1) cluster_sync();  // no block leaves while others write to its shared memory
  }

 private:
  __device__ void skip(const Token& token, int64_t first) {
    if (begin_ == 0 && rank_ == 0) args_.value[token.row] = 0.0f;
    if (args_.gradient.data != nullptr) write_zeros(args_.gradient, first, token, team_);
  }

  // Whether the row was an ordinary one.
  __device__ bool work(const Token& token, const Split& split, int64_t first) {
    const auto each = [&](const auto& visit) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (rank_ + k * threads_ < split.packs) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) visit(k * kPack + i);
        }
      }
      if (split.single(rank_) < size_) visit(kPacks * kPack);
    };
    if (!fast_.agree(rates_, team_, each)) return false;
    const LogitRows& to = args_.gradient;
    const bool whole = to.data != nullptr && starts_cell(to, first + split.head);
    float pack[kPack], value = 0.0f;
    const auto take = [&](int s, float gradient) {
      if (s == kPacks * kPack) {
        if (to.data != nullptr) store_element(to, first + split.single(rank_) * to.vocab_stride, gradient);
        return;
      }
      pack[s % kPack] = gradient;
      if (s % kPack != kPack - 1 || to.data == nullptr) return;
      const int begin = split.pack(rank_ + s / kPack * threads_);
      if (whole) return store_pack(to, first + begin, pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) store_element(to, first + (begin + i) * to.vocab_stride, pack[i]);
    };
    if (!fast_.finish(args_, rates_, team_, each, token.factor, take, value)) return false;
    if (begin_ == 0 && rank_ == 0) write_value(args_, token, value);
    return true;
  }

  // Rows that do not count make blocks unequally fast: then a counter in memory hands out rows. The first thread asks
  // for one early, and all get it late.
  __device__ int request(int row, int step) const {
    if (args_.ticket == nullptr) return row + step;
    return rank_ == 0 ? 2 * step + atomicAdd(args_.ticket, 1) : 0;
  }

  __device__ int receive(int row) {
    if (args_.ticket == nullptr) return row;
    if (threads_ == kWarp) return __shfl_sync(0xffffffffu, row, 0);
    if (rank_ == 0) *ticket_ = row;
    __syncthreads();
    row = *ticket_;
    __syncthreads();
    return row;
  }

  // Sends for a row that counts.
  __device__ void fetch(int row) {
    int64_t first[3];
    first_elements(args_, row, begin_, {&args_.teacher, &args_.auxiliary, &args_.uncond}, first);
    const bool guided = args_.uncond.data != nullptr;
    split_ = Split(size_, misalignment(args_.auxiliary, first[1]), threads_, kPacks);
    sent_ = may_be_fast(args_) && starts_cell(args_.auxiliary, first[1] + split_.head) &&
            starts_cell(args_.teacher, first[0] + split_.head) &&
            (!guided || starts_cell(args_.uncond, first[2] + split_.head)) && size_ - kPack * split_.packs <= threads_;
    if (!sent_) return;
    if (kHasMailbox && rank_ == 0) {
      const int cells = cells_of(args_.teacher.dtype) + cells_of(args_.auxiliary.dtype);
      mailbox_->expect((cells + (guided ? cells_of(args_.uncond.dtype) : 0)) * 16 * split_.packs);
    }
    uint4* cells = cells_;
    send(cells, args_.teacher, first[0]);
    send(cells, args_.auxiliary, first[1]);
    if (guided) send(cells, args_.uncond, first[2]);
  }

  __device__ void send(uint4*& cells, const LogitRows& logits, int64_t first) const {
    const int per_pack = cells_of(logits.dtype);
    if (kHasMailbox) {
      if (rank_ == 0 && split_.packs > 0)
        mailbox_->copy(cells, address_of(logits, first + split_.head), per_pack * 16 * split_.packs);
    } else {
      const char* const from = address_of(logits, first + split_.head);
      for (int pack = rank_; pack < split_.packs; pack += threads_)
        for (int c = pack * per_pack; c < (pack + 1) * per_pack; ++c) copy_async(cells + c, from + c * 16);
    }
    cells += kPacks * per_pack * threads_;
  }

  // Calls take(pack, numbers) for the packs of this thread, also those that the row does not have.
  template <class Take>
  __device__ void take_packs(const uint4*& cells, DType dtype, const Take& take) const {
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kCells = sizeof(T) / 2;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        float numbers[kPack];
        unpack<T>(cells + (rank_ + k * threads_) * kCells, numbers);
        take(k, numbers);
      }
      cells += kPacks * kCells * threads_;
    });
  }

  __device__ void take_cells(const Token& token, const Split& split) {
    unsigned single[3] = {};
    if (split.single(rank_) < size_) {  // in the cache, beside the packs
      int64_t first[3];
      first_elements(args_, token.row, begin_, {&args_.teacher, &args_.auxiliary, &args_.uncond}, first);
      single[0] = load_bits(args_.teacher, first[0] + split.single(rank_));
      single[1] = load_bits(args_.auxiliary, first[1] + split.single(rank_));
      if (args_.uncond.data != nullptr) single[2] = load_bits(args_.uncond, first[2] + split.single(rank_));
    }
    if (kHasMailbox) {
      mailbox_->wait(phase_);
      phase_ ^= 1;
    } else {
      wait_for_copies();
    }
    const uint4* cells = cells_;
    take_packs(cells, args_.teacher.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) fast_.z_p[k * kPack + i] = numbers[i];
    });
    take_packs(cells, args_.auxiliary.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) fast_.z_q[k * kPack + i] = numbers[i];
    });
    fast_.z_p[kPacks * kPack] = from_bits(args_.teacher.dtype, single[0]);
    fast_.z_q[kPacks * kPack] = from_bits(args_.auxiliary.dtype, single[1]);
    if (!is_guided(args_, token)) return;
    const auto mix = [&](float& z, float uncond) { z = uncond + token.scale * (z - uncond); };
    take_packs(cells, args_.uncond.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) mix(fast_.z_p[k * kPack + i], numbers[i]);
    });
    mix(fast_.z_p[kPacks * kPack], from_bits(args_.uncond.dtype, single[2]));
  }

  const TokenDivergenceArgs& args_;
  const Rates& rates_;
  Team<0> team_;
  int rank_, threads_;
  Mailbox* mailbox_;
  int* ticket_;
  uint4* cells_;
  int begin_, size_, phase_ = 0;
  FastRow<Divergence, 0, kPacks * kPack + 1> fast_;
  // Of the row that was sent for:
  Split split_{0, 0, 0, 0};
  bool sent_ = false;
};

template <class Divergence, int kPacks>
__global__ __launch_bounds__(kMostThreads, 1) void block_kernel(const __grid_constant__ TokenDivergenceArgs args,
                                                                const __grid_constant__ Rates rates, int slice) {
  Block<Divergence, kPacks>(args, rates, slice, shared_memory<char>()).run();
}

}  // namespace
}  // namespace dimo::cuda
