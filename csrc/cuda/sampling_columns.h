// Categorical draws from rows whose ids lie apart, such as logits [B, V, H, W] seen as [B, H, W, V]: lanes across rows.
#pragma once

#include <cstdint>

#include "cuda/sampling_race.h"

namespace dimo::cuda {
namespace {

constexpr int kColumnWarps = 8, kColumnBlocks = 3;  // of a block; of a multiprocessor

// The race between every kColumnWarps-th chunk of a row, all by one lane.
template <bool kGuided>
__device__ Winner run_race_alone(const Row<kGuided>& source, int64_t row, int warp, float rate) {
  ChunkRace<ScalarMath> race;
  uint32_t word1 = 0, word2 = 0;
  const RowStream stream = source.stream(row);
#pragma unroll 1
  for (int first = warp * kChunk; first < source.vocab(); first += kColumnWarps * kChunk) {
    const int end = first + kChunk < source.vocab() ? first + kChunk : source.vocab();
    float top = -INFINITY, sum = 0.0f;
#pragma unroll 1
    for (int id = first; id < end; id += kShare) {
      float z[kShare], higher = top;
      source.load(id, end, z);
#pragma unroll
      for (int i = 0; i < kShare; ++i) higher = fmaxf(higher, z[i]);
      const float usable = finite(higher);
      sum *= exp2_fast((top - usable) * rate);
#pragma unroll
      for (int i = 0; i < kShare; ++i) sum += exp2_fast((z[i] - usable) * rate);
      top = higher;
    }
    const Words4 words = stream.words(static_cast<uint32_t>(first / kChunk));
    if (race.enter(top, sum, negative_log(~words.word[0]), first / kChunk, rate)) {
      word1 = words.word[1];
      word2 = words.word[2];
    }
  }
  return {race.top, race.total, race.best / race.rival, race.chunk, word1, word2};
}

// 32 rows a block: a lane races for its row, then a warp picks for one row after the other.
template <bool kGuided>
__global__ __launch_bounds__(kColumnWarps* kWarp, kColumnBlocks) void columns_kernel(const SampleCategoricalArgs args,
                                                                                     const DrawRules rules) {
  __shared__ Winner winners[kColumnWarps][kWarp];
  const Lanes<kWarp> lanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kWarp, own = first + lanes.rank;
  if (own < args.shape.rows && is_wanted(args, own))
    winners[warp][lanes.rank] = run_race_alone(Row<kGuided>(args, own), own, warp, rules.rate);
  __syncthreads();
  for (int64_t row = first + warp; row < first + kWarp && row < args.shape.rows; row += kColumnWarps) {
    if (!is_wanted(args, row)) {
      if (lanes.rank == 0) keep(args, row);
      continue;
    }
    Winner winner = {-INFINITY, 0.0f, 0.0f, 0, 0, 0};
    if (lanes.rank < kColumnWarps) winner = winners[lanes.rank][row - first];
    winner = united(lanes, winner, rules.rate);
    finish(lanes, Row<kGuided>(args, row), NoFilter{}, rules, winner, row);
  }
}

}  // namespace
}  // namespace dimo::cuda
