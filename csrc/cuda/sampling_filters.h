// Categorical draws with filters, and greedy ones, from more than 33 ids: the row is read again, from the L2 cache for
// the most part: twice under top-k, whose few ids are then listed in shared memory, once for every digit of the
// threshold where too many stay.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/sampling_race.h"

namespace dimo::cuda {
namespace {

// Bytes of shared memory for the chunks of a warp.
__host__ __device__ inline int ring_bytes(const SampleCategoricalArgs& args) {
  return kSlots * (slot_bytes(args.logits) + slot_bytes(args.uncond));
}

__device__ inline unsigned char* slots_of_warp(const SampleCategoricalArgs& args) {
  return shared_memory<unsigned char>() + threadIdx.x / kWarp * ring_bytes(args);
}

constexpr int64_t kFilteredWarpVocab = 4096;  // up to here a warp a row

// Warps that a multiprocessor is to hold, as registers allow without spills.
constexpr int filtering_warps(bool guided) { return guided ? 16 : 24; }

struct Largest {
  float top;  // +inf where a logit is no number, or infinite
  int id;     // the lowest
};

template <int kWarps, bool kGuided>
__device__ Largest find_largest(const Row<kGuided>& source, unsigned char* slots, Board& board) {
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  constexpr int kNone = 0x7fffffff;
  Largest own = {-INFINITY, kNone};
  source.template each_chunk<kWarps>(lanes.rank, warp, slots, [&](int chunk, const float (&z)[kShare]) {
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (!(z[i] <= own.top)) own = {z[i] < INFINITY ? z[i] : INFINITY, chunk * kChunk + lanes.rank + i * kWarp};
  });
  const auto lower = [](int a, int b) { return a < b ? a : b; };
  Largest all;
  all.top = lanes.max(own.top);
  all.id = lanes.reduce(own.top == all.top ? own.id : kNone, lower);
  if constexpr (kWarps > 1) {
    __syncthreads();  // the row before has been read
    if (lanes.rank == 0) {
      board.tops[warp] = all.top;
      board.ids[warp] = all.id;
    }
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) {
      const float top = board.tops[w];
      const int id = board.ids[w];
      if (top > all.top || (top == all.top && id < all.id)) all = {top, id};
    }
  }
  return all;
}

// Sums over the threads up to each, and over all.
template <int kWarps>
__device__ Wide scan_block(Wide own, Board& board, Wide* total) {
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Wide through = lanes.scan(own);
  if (lanes.rank == kWarp - 1) board.sums[warp] = through;
  __syncthreads();
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) through += *total;
    *total += board.sums[w];
  }
  return through;
}

// The largest logits of kShare shares of what each thread sees, as drops, and the largest of all: +inf where one is no
// number, or infinite.
template <int kWarps, bool kGuided>
__device__ float find_largest_of_shares(const Row<kGuided>& source, unsigned char* slots, Board& board,
                                        float (&drops)[kShare]) {
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  bool dead = false;
#pragma unroll
  for (int i = 0; i < kShare; ++i) drops[i] = -INFINITY;
  source.template each_chunk<kWarps>(lanes.rank, warp, slots, [&](int, const float (&z)[kShare]) {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      drops[i] = fmaxf(drops[i], z[i]);
      dead |= !(z[i] < INFINITY);
    }
  });
  float top = dead ? INFINITY : drops[0];
#pragma unroll
  for (int i = 1; i < kShare; ++i) top = fmaxf(top, drops[i]);
  top = lanes.max(top);
  if constexpr (kWarps > 1) {
    __syncthreads();  // the row before has been read
    if (lanes.rank == 0) board.tops[warp] = top;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, board.tops[w]);
  }
#pragma unroll
  for (int i = 0; i < kShare; ++i) drops[i] = top - drops[i];
  return top;
}

__device__ inline void add(unsigned* bin, unsigned weight) { atomicAdd(bin, weight); }
// Half by half: shared memory adds 32 bits by itself, but not 64.
__device__ inline void add(Wide* bin, Wide weight) {
  auto* const halves = reinterpret_cast<unsigned*>(bin);
  const auto low = static_cast<unsigned>(weight);
  const bool carry = atomicAdd(halves, low) + low < low;
  const unsigned high = static_cast<unsigned>(weight >> 32) + carry;
  if (high != 0) atomicAdd(halves + 1, high);
}

// The threshold of top-p (kMass) or top-k among the drops up to a limit, for all threads: each_drop(visit) calls
// visit(drop) for those that the thread has.
template <bool kMass, int kWarps, int kBits, class EachDrop>
__device__ uint32_t find_threshold(const EachDrop& each_drop, const DrawRules& rules, uint32_t limit, Wide* bins,
                                   Board& board) {
  using Bin = std::conditional_t<kMass, Wide, unsigned>;
  constexpr int kBins = 1 << kBits, kThreads = kWarps * kWarp, kOwnBins = kBins / kThreads;
  auto* const histogram = reinterpret_cast<Bin*>(bins);
  DropSearch search(static_cast<uint64_t>(rules.top_k), kBits);
  for (bool first = true; !search.done; first = false) {
    for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += kThreads) histogram[bin] = 0;
    __syncthreads();
    each_drop([&](float drop) {
      const uint32_t bits = __float_as_uint(drop);
      if (bits > limit || !search.candidate(bits)) return;
      const Bin weight = kMass ? static_cast<Bin>(fixed(exp2_fast(-drop * rules.rate))) : 1;
      if (weight != 0) add(&histogram[search.digit(bits)], weight);
    });
    __syncthreads();
    const int begin = static_cast<int>(threadIdx.x) * kOwnBins;
    Wide own = 0, total;
    for (int i = 0; i < kOwnBins; ++i) own += histogram[begin + i];
    const Wide through = scan_block<kWarps>(own, board, &total);
    if (kMass && first) search.needed = needed_mass(rules.top_p, total);
    Wide before = through - own;
    if (before < search.needed && search.needed <= through) {
      int digit = begin;
      for (; before + histogram[digit] < search.needed; ++digit) before += histogram[digit];
      board.digit = static_cast<uint32_t>(digit);
      board.before = before;
      board.weight = histogram[digit];
    }
    __syncthreads();
    search.descend(board.digit, board.before, board.weight);
  }
  return search.bound() < limit ? search.bound() : limit;
}

// The few drops that top-k leaves, in no order.
template <int kMost>
struct List {
  int count;
  float drops[kMost];
};

template <int kWarps, int kBits, bool kGuided>
__global__ __launch_bounds__(kWarps* kWarp, filtering_warps(kGuided) /
                                                kWarps) void filtered_rows_kernel(const SampleCategoricalArgs args,
                                                                                  const DrawRules rules) {
  constexpr int kThreads = kWarps * kWarp, kListed = kWarps == 1 ? 512 : 2048;
  constexpr uint32_t kInfinite = 0x7f800000;
  __shared__ Board board;
  __shared__ Wide bins[1 << kBits];
  __shared__ List<kListed> list;
  unsigned char* const slots = slots_of_warp(args);
  const int rank = static_cast<int>(threadIdx.x);
  int parity = 0;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x, parity ^= 1) {
    if (!is_wanted(args, row)) {
      if (rank == 0) keep(args, row);
      continue;
    }
    const Row<kGuided> source(args, row);
    if (rules.greedy) {
      const Largest largest = find_largest<kWarps>(source, slots, board);
      const bool dead = !(fabsf(largest.top) < INFINITY);
      if (rank == 0) put(args, row, dead ? -1 : largest.id, dead ? -INFINITY : 0.0f);
      continue;
    }
    float shares[kShare];
    const float top = find_largest_of_shares<kWarps>(source, slots, board, shares);
    if (!(fabsf(top) < INFINITY)) {
      if (rank == 0) put(args, row, -1, -INFINITY);
      continue;
    }
    const auto in_row = [&](const auto& visit) {
      source.template each_chunk<kWarps>(rank % kWarp, rank / kWarp, slots, [&](int, const float (&z)[kShare]) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) visit(top - z[i]);
      });
    };
    const auto in_shares = [&](const auto& visit) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) visit(shares[i]);
    };
    int listed = kListed + 1;
    const auto in_list = [&](const auto& visit) {
      for (int i = rank; i < listed; i += kThreads) visit(list.drops[i]);
    };
    uint32_t limit = kInfinite;
    if (rules.top_k > 0 && rules.top_k <= kThreads * kShare) {
      // As far down as the k-th largest of the shares' largest logits lie k ids or more, but few others.
      limit = find_threshold<false, kWarps, kBits>(in_shares, rules, limit, bins, board);
      if (rank == 0) list.count = 0;
      __syncthreads();
      in_row([&](float drop) {
        if (__float_as_uint(drop) > limit || drop == INFINITY) return;
        const int at = atomicAdd(&list.count, 1);
        if (at < kListed) list.drops[at] = drop;
      });
      __syncthreads();
      listed = list.count;
    }
    const bool few = listed <= kListed;
    if (few) {
      if (listed > rules.top_k) limit = find_threshold<false, kWarps, kBits>(in_list, rules, limit, bins, board);
      if (rules.top_p < 1.0) limit = find_threshold<true, kWarps, kBits>(in_list, rules, limit, bins, board);
    } else {
      if (rules.top_k > 0) limit = find_threshold<false, kWarps, kBits>(in_row, rules, limit, bins, board);
      if (rules.top_p < 1.0) limit = find_threshold<true, kWarps, kBits>(in_row, rules, limit, bins, board);
    }
    const Filter filter = {top, fminf(__uint_as_float(limit), rules.min_p_drop)};
    draw<kWarps, kStridedChunks>(source, filter, rules, row, parity, board);
  }
}

}  // namespace
}  // namespace dimo::cuda
