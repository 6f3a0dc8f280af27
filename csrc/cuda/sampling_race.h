// Categorical draws from more than 64 ids: a warp or several race through a row's chunks, then one picks inside the
// winner.
#pragma once

#include <cstdint>

#include "cuda/sampling_pick.h"

namespace dimo::cuda {
namespace {

constexpr int64_t kWarpVocab = 33 * kChunk;  // up to here a warp a row
constexpr int kManyWarps = 8;                // of a filtered row
constexpr int kRowWarps = 4;                 // of a block: with a row each, or one for all
constexpr int kSegmentChunks = 4;            // that a warp holds in registers
// Warps that a multiprocessor is to hold, as registers allow: the more, the faster.
constexpr int resident_warps(bool guided) { return guided ? 20 : 28; }

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

// The sums over all lanes of kValues numbers: of number lane / (32 / kValues).
template <int kValues>
__device__ float sum_each(const Lanes<kWarp>& lanes, float (&x)[kValues]) {
  int step = kWarp / 2;
#pragma unroll
  for (int half = kValues / 2; half > 0; half /= 2, step /= 2) {
    const bool upper = (lanes.rank & step) != 0;  // has the upper half of the numbers from here on
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(lanes.mask, given, step);
    }
  }
#pragma unroll
  for (; step > 0; step /= 2) x[0] += __shfl_xor_sync(lanes.mask, x[0], step);
  return x[0];
}

// Of segment after segment of a warp the lanes keep the chunks' masses, a chunk each, until all have one: then 32 race
// at once.
template <int kWarps, int kChunks, bool kGuided, class Filter>
__device__ Winner run_race(const Lanes<kWarp>& lanes, const Row<kGuided>& source, const Filter& filter, int64_t row,
                           int warp, float rate) {
  constexpr int kIds = kChunks * kChunk, kSharers = kWarp / kChunks;  // lanes that know a chunk's mass
  ChunkRace<ScalarMath> race;
  uint32_t word1 = 0, word2 = 0;
  float chunk_top = -INFINITY, chunk_sum = 0.0f;
  const int segments = (source.vocab() + kIds - 1) / kIds;
  int slot = 0;
#pragma unroll 1
  for (int segment = warp; segment < segments; segment += kWarps) {
    const int first = segment * kIds, left = source.vocab() - first;
    Segment<kChunks> z;
    source.load(lanes.rank, first, left, z);
    float top = -INFINITY;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      filter.apply(z[c]);
#pragma unroll
      for (int i = 0; i < kShare; ++i) top = fmaxf(top, z[c][i]);
    }
    top = lanes.max(top);
    const float usable = finite(top);
    float sums[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      sums[c] = 0.0f;
      if (c * kChunk < left) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) sums[c] += exp2_fast((z[c][i] - usable) * rate);
      }
    }
    const float sum = sum_each(lanes, sums);
    if (lanes.rank % kSharers == slot) {
      chunk_top = top;
      chunk_sum = sum;
    }
    if (++slot < kSharers && segment + kWarps < segments) continue;
    const int chunk = (segment + (lanes.rank % kSharers - slot + 1) * kWarps) * kChunks + lanes.rank / kSharers;
    const Words4 words = source.stream(row).words(static_cast<uint32_t>(chunk));
    if (race.enter(chunk_top, chunk_sum, negative_log(~words.word[0]), chunk, rate)) {
      word1 = words.word[1];
      word2 = words.word[2];
    }
    chunk_top = -INFINITY;
    chunk_sum = 0.0f;
    slot = 0;
  }
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

template <bool kGuided>
__global__ __launch_bounds__(kRowWarps* kWarp, resident_warps(kGuided) /
                                                   kRowWarps) void warp_rows_kernel(const SampleCategoricalArgs args,
                                                                                    const DrawRules rules) {
  const Lanes<kWarp> lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kRowWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp; row < args.shape.rows;
       row += step) {
    if (!is_wanted(args, row)) {
      if (lanes.rank == 0) keep(args, row);
      continue;
    }
    const Row<kGuided> source(args, row);
    const Winner winner = run_race<1, kSegmentChunks>(lanes, source, NoFilter{}, row, 0, rules.rate);
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
template <int kWarps, int kChunks, bool kGuided, class Filter>
__device__ void draw(const Row<kGuided>& source, const Filter& filter, const DrawRules& rules, int64_t row, int parity,
                     Board& board) {
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Winner winner = run_race<kWarps, kChunks>(lanes, source, filter, row, warp, rules.rate);
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
__global__ __launch_bounds__(kRowWarps* kWarp, resident_warps(kGuided) /
                                                   kRowWarps) void block_rows_kernel(const SampleCategoricalArgs args,
                                                                                     const DrawRules rules) {
  __shared__ Board board;
  int parity = 0;
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x) {
    if (!is_wanted(args, row)) {
      if (threadIdx.x == 0) keep(args, row);
      continue;
    }
    draw<kRowWarps, kSegmentChunks>(Row<kGuided>(args, row), NoFilter{}, rules, row, parity, board);
    parity ^= 1;
  }
}

}  // namespace
}  // namespace dimo::cuda
