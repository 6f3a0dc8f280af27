// Long vocabularies: a block, or the blocks of a cluster, have a row.
#pragma once

#include "cuda/divergence_fast.h"
#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

constexpr int kMostThreads = 512, kMostBlocks = 16;  // a block, a cluster
constexpr int64_t kMostRows = 1 << 30;               // of a long vocabulary: no GPU holds more

// What a block's threads tell each other; in registers it would cost more.
struct alignas(16) Notes {
  int ticket;   // a row
  int put_off;  // the last row that was put off
  int step;     // from a team's row to its next
};

// Blocks go from row to row. While one is worked on, the packs of the next are on their way to shared memory.
template <class Divergence, int kPacks>
class Block {
 public:
  __device__ Block(const TokenDivergenceArgs& args, const Rates& rates, const Divergence& divergence, int slice,
                   char* shared)
      : args_(args),
        rates_(rates),
        divergence_(divergence),
        shared_(shared),
        team_(shared),
        rank_(team_.rank()),
        threads_(team_.size()) {
    if (rank_ == 0) {
      if (has_mailboxes()) mailbox()->open();
      *notes() = {-1, -1, static_cast<int>(gridDim.x / cluster_size())};
    }
    __syncthreads();
    begin_ = min(static_cast<int64_t>(cluster_rank()) * slice, args.shape.vocab);
    size_ = min(static_cast<int64_t>(slice), args.shape.vocab - begin_);
  }

  __device__ void run() {
    // Begins with a turn that only fetches.
    int row = -1, next = blockIdx.x / cluster_size(), later = next + notes()->step;
    bool counts = false, next_counts = mask_bits(args_, next) != 0;
    while (row < static_cast<int>(args_.shape.rows)) {
      // What is derived from these does not stay in registers from row to row.
      forget(rank_);
      forget(threads_);
      const unsigned later_mask = mask_bits(args_, later);
      const int last = request(later);
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
          put_off(row);
      }
      row = next;
      next = later;
      later = receive(last);
      counts = next_counts;
      next_counts = later_mask != 0;
    }
    sync_cluster();
    for (int late = notes()->put_off; late >= 0;) {
      const Token token = {late, begin_, size_, scale_of(args_, late), factor_of(args_, late)};
      late = static_cast<int>(load_32_bits(args_.value + late));
      team_ = general_row<Divergence, 0>(args_, divergence_, token, team_);
    }
    sync_cluster();  // no block leaves while others write to its shared memory
  }

 private:
  __device__ void sync_cluster() {
    if (cluster_size() > 1)
      cluster_sync();
    else
      team_.sync();
  }

  // Rows that are not ordinary wait until the others are done, in a list that runs through their values: in the loop
  // they would cost every row registers.
  __device__ void put_off(int row) {
    if (rank_ != 0) return;
    if (begin_ == 0) args_.value[row] = __int_as_float(notes()->put_off);
    notes()->put_off = row;
  }

  // Behind what the team shares.
  __device__ Mailbox* mailbox() const {
    return reinterpret_cast<Mailbox*>(shared_ + Team<0>::scratch_bytes(team_.entries()));
  }
  __device__ Notes* notes() const { return reinterpret_cast<Notes*>(mailbox() + 2); }
  __device__ uint4* cells() const { return reinterpret_cast<uint4*>(notes() + 1); }

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
    // In the auxiliary's own memory the gradient waits until the row is known to be ordinary: else it is read again.
    const bool wanted = args_.gradient.data != nullptr, in_place = args_.gradient.data == args_.auxiliary.data;
    const bool whole = starts_cell(args_.gradient, first + split.head);
    const auto take = [&](int s) {
      if (wanted && !in_place) write(split, first, whole, s);
    };
    float value = 0.0f;
    if (!fast_.finish(args_, rates_, divergence_, team_, each, token.factor, take, value)) return false;
    if (in_place) each([&](int s) { write(split, first, whole, s); });
    if (begin_ == 0 && rank_ == 0) write_value(args_, token, value);
    return true;
  }

  // Writes the pack that ends with a slot, or the single element.
  __device__ void write(const Split& split, int64_t first, bool whole, int s) const {
    const LogitRows& to = args_.gradient;
    if (s == kPacks * kPack) return store_element(to, first + split.single(rank_), fast_.z_q[s]);
    if (s % kPack != kPack - 1) return;
    const int64_t begin = first + split.pack(rank_ + s / kPack * threads_);
    const float* const pack = &fast_.z_q[s - (kPack - 1)];
    if (whole) return store_pack(to, begin, pack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) store_element(to, begin + i, pack[i]);
  }

  // Rows that do not count make blocks unequally fast: then a counter in memory hands out rows. The first thread asks
  // for one early, and all get it late.
  __device__ int request(int row) const {
    if (args_.ticket == nullptr) return row + notes()->step;
    return rank_ == 0 ? 2 * notes()->step + atomicAdd(args_.ticket, 1) : 0;
  }

  __device__ int receive(int row) {
    if (args_.ticket == nullptr) return row;
    if (threads_ == kWarp) return __shfl_sync(0xffffffffu, row, 0);
    if (rank_ == 0) notes()->ticket = row;
    __syncthreads();
    row = notes()->ticket;
    __syncthreads();
    return row;
  }

  // Sends for a row that counts.
  __device__ void fetch(int row) {
    int64_t first[3];
    first_elements(args_, row, begin_, {&args_.teacher, &args_.auxiliary, &args_.uncond}, first);
    const bool guided = args_.uncond.data != nullptr;
    split_ = Split(size_, misalignment(args_.auxiliary, first[1]), threads_, kPacks);
    sent_ = may_be_fast(args_) && (args_.gradient.data == nullptr || args_.gradient.vocab_stride == 1) &&
            starts_cell(args_.auxiliary, first[1] + split_.head) &&
            starts_cell(args_.teacher, first[0] + split_.head) &&
            (!guided || starts_cell(args_.uncond, first[2] + split_.head)) && size_ - kPack * split_.packs <= threads_;
    if (!sent_) return;
    if (has_mailboxes() && rank_ == 0) {
      const int cells = cells_of(args_.teacher.dtype) + cells_of(args_.auxiliary.dtype);
      mailbox()->expect((cells + (guided ? cells_of(args_.uncond.dtype) : 0)) * 16 * split_.packs);
    }
    uint4* cells = this->cells();
    send(cells, args_.teacher, first[0]);
    send(cells, args_.auxiliary, first[1]);
    if (guided) send(cells, args_.uncond, first[2]);
  }

  __device__ void send(uint4*& cells, const LogitRows& logits, int64_t first) const {
    const int per_pack = cells_of(logits.dtype);
    if (has_mailboxes()) {
      if (rank_ == 0 && split_.packs > 0)
        mailbox()->copy(cells, address_of(logits, first + split_.head), per_pack * 16 * split_.packs);
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
    if (has_mailboxes()) {
      mailbox()->wait(phase_);
      phase_ ^= 1;
    } else {
      wait_for_copies();
    }
    const uint4* cells = this->cells();
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
  const Divergence& divergence_;
  char* const shared_;
  Team<0> team_;
  int rank_, threads_;
  int begin_, size_, phase_ = 0;
  FastRow<Divergence, 0, kPacks * kPack + 1> fast_;
  // Of the row that was sent for:
  Split split_{0, 0, 0, 0};
  bool sent_ = false;
};

template <class Divergence, int kPacks>
__global__ __launch_bounds__(kMostThreads, 1) void block_kernel(const __grid_constant__ TokenDivergenceArgs args,
                                                                const __grid_constant__ Rates rates,
                                                                const __grid_constant__ Divergence divergence,
                                                                int slice) {
  Block<Divergence, kPacks>(args, rates, divergence, slice, shared_memory<char>()).run();
}

}  // namespace
}  // namespace dimo::cuda
