// Categorical draws from more than 64 ids: a warp or several race through a row's chunks, then one picks inside the
// winner.
#pragma once

#include <cstdint>

#include "cuda/sampling_pick.h"

namespace dimo::cuda {
namespace {

constexpr int64_t kWarpVocab = 4096;  // up to here a warp a row
constexpr int kManyWarps = 8;
constexpr int kRowsPerBlock = 4;  // where each has a warp
// Warps that a multiprocessor is to hold, as registers allow without spills.
constexpr int resident_warps(bool guided) { return guided ? 24 : 32; }

// Who has won among some chunks: their top and mass, the winner's score and random words.
struct Winner {
  float top, total, score;
  int32_t chunk;
  uint32_t word1, word2;
};

// What the lanes know becomes what all know.
__device__ inline Winner united(const Lanes<kWarp>& lanes, Winner own, float rate) {
  Winner all;
  all.top = lanes.max(own.top);
  const float shrink = exp2f((own.top - finite(all.top)) * rate);  // 0 for a lane without a chunk
  all.total = lanes.sum(own.total * shrink);
  own.score *= shrink;
  all.score = lanes.max(own.score);
  const int lane = lanes.first(own.score == all.score || !(all.score >= 0.0f));
  all.chunk = lanes.from(lane, own.chunk);
  all.word1 = lanes.from(lane, own.word1);
  all.word2 = lanes.from(lane, own.word2);
  return all;
}

template <int kWarps, bool kGuided, class Filter>
__device__ Winner run_race(const Lanes<kWarp>& lanes, const Row<kGuided>& source, const Filter& filter, int64_t row,
                           int warp, unsigned char* slots, float rate) {
  ChunkRace<ScalarMath> race;
  uint32_t word1 = 0, word2 = 0;
  float chunk_top = -INFINITY, chunk_sum = 0.0f;
  source.template each_chunk<kWarps>(
      lanes.rank, warp, slots,
      [&](int, int slot, float (&z)[kShare]) {
        filter.apply(z);
        float sum = 0.0f;
        const float top = largest(lanes, z), usable = finite(top);
#pragma unroll
        for (int i = 0; i < kShare; ++i) sum += exp2_fast((z[i] - usable) * rate);
        sum = lanes.sum(sum);
        if (lanes.rank == slot) {
          chunk_top = top;
          chunk_sum = sum;
        }
      },
      [&](int first) {
        const int chunk = first + kWarps * lanes.rank;
        const Words4 words = source.stream(row).words(static_cast<uint32_t>(chunk));
        if (race.enter(chunk_top, chunk_sum, negative_log(~words.word[0]), chunk, rate)) {
          word1 = words.word[1];
          word2 = words.word[2];
        }
        chunk_top = -INFINITY;
        chunk_sum = 0.0f;
      });
  return united(lanes, {race.top, race.total, race.best / race.rival, race.chunk, word1, word2}, rate);
}

// One lane of one warp writes.
template <bool kGuided, class Filter>
__device__ void finish(const Lanes<kWarp>& lanes, const Row<kGuided>& source, const Filter& filter,
                       const DrawRules& rules, const Winner& winner, int64_t row) {
  if (winner.top == -INFINITY || !(winner.total < INFINITY)) {
    if (lanes.rank == 0) put(source.args, row, -1, -INFINITY);
    return;
  }
  float z[kShare];
  const int first = winner.chunk * kChunk;
  source.load(first + lanes.rank * kShare, source.vocab(), z);
  filter.apply(z);
  pick(lanes, source.args, rules, z, kShare, winner.word1, winner.word2, first, winner.top, winner.total, row);
}

// Bytes of shared memory for the chunks of a warp.
__host__ __device__ inline int ring_bytes(const SampleCategoricalArgs& args) {
  return kSlots * (slot_bytes(args.logits) + slot_bytes(args.uncond));
}

__device__ inline unsigned char* slots_of_warp(const SampleCategoricalArgs& args) {
  return shared_memory<unsigned char>() + threadIdx.x / kWarp * ring_bytes(args);
}

template <bool kGuided>
__global__ __launch_bounds__(kRowsPerBlock* kWarp, resident_warps(kGuided) / kRowsPerBlock) void warp_rows_kernel(
    const SampleCategoricalArgs args, const DrawRules rules) {
  const Lanes<kWarp> lanes;
  unsigned char* const slots = slots_of_warp(args);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowsPerBlock;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsPerBlock + threadIdx.x / kWarp; row < args.shape.rows;
       row += step) {
    if (!is_wanted(args, row)) {
      if (lanes.rank == 0) keep(args, row);
      continue;
    }
    const Row<kGuided> source(args, row);
    const Winner winner = run_race<1>(lanes, source, NoFilter{}, row, 0, slots, rules.rate);
    finish(lanes, source, NoFilter{}, rules, winner, row);
  }
}

// What the warps of a block tell each other about a row.
struct Board {
  Winner winners[2][kManyWarps];  // a warp may be a row ahead of the one that picks
  float tops[kManyWarps];
  int ids[kManyWarps];
  Wide sums[kManyWarps];
  uint32_t digit;
  Wide before, weight;
};

// The first warp picks; the others go on.
template <int kWarps, bool kGuided, class Filter>
__device__ void draw(const Row<kGuided>& source, const Filter& filter, const DrawRules& rules, int64_t row,
                     unsigned char* slots, int parity, Board& board) {
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Winner winner = run_race<kWarps>(lanes, source, filter, row, warp, slots, rules.rate);
  if constexpr (kWarps > 1) {
    if (lanes.rank == 0) board.winners[parity][warp] = winner;
    __syncthreads();
    if (warp > 0) return;
    winner = lanes.rank < kWarps ? board.winners[parity][lanes.rank] : Winner{-INFINITY, 0.0f, 0.0f, 0, 0, 0};
    winner = united(lanes, winner, rules.rate);
  }
  finish(lanes, source, filter, rules, winner, row);
}

template <bool kGuided>
__global__ __launch_bounds__(kManyWarps* kWarp, resident_warps(kGuided) /
                                                    kManyWarps) void block_rows_kernel(const SampleCategoricalArgs args,
                                                                                       const DrawRules rules) {
  __shared__ Board board;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    if (!is_wanted(args, row)) {
      if (threadIdx.x == 0) keep(args, row);
      continue;
    }
    draw<kManyWarps>(Row<kGuided>(args, row), NoFilter{}, rules, row, slots_of_warp(args), parity, board);
    parity ^= 1;
  }
}

}  // namespace
}  // namespace dimo::cuda
