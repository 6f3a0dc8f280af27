// Categorical draws: one launch, no workspace. Every logit is read once, 2 or 4 bytes, and the winner's chunk again
// from the cache; sampling_filters.h says what filters read. Tokens and log-probabilities are all that is written.
//
// A row of up to 33 ids belongs to a lane, of up to 64 to 8 lanes, a longer one to a warp, a long one to a block, whose
// warps take its segments in turn; of rows whose ids lie apart 32 belong to a block. The pick inside the winning chunk
// goes through its ids in order.
#include <cstdint>

#include "cuda/sampling_columns.h"
#include "cuda/sampling_filters.h"
#include "cuda/sampling_race.h"
#include "cuda/sampling_short.h"

namespace dimo::cuda {
namespace {

constexpr int64_t kMostBlocks = 1 << 14;

template <class Kernel>
int launch_rows(Kernel kernel, int64_t rows_per_block, int threads, size_t shared_bytes,
                const SampleCategoricalArgs& args, const DrawRules& rules, void* stream) {
  const int64_t blocks = (args.shape.rows + rows_per_block - 1) / rows_per_block;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  return launch(kernel, grid, dim3(static_cast<unsigned>(threads)), shared_bytes, stream, args, rules);
}

template <int kWarps, int kBits, bool kGuided>
int launch_filtered_rows(const SampleCategoricalArgs& args, const DrawRules& rules, void* stream) {
  const auto shared_bytes = static_cast<size_t>(kWarps * ring_bytes(args));
  return launch_rows(filtered_rows_kernel<kWarps, kBits, kGuided>, 1, kWarps * kWarp, shared_bytes, args, rules,
                     stream);
}

template <bool kGuided, bool kFiltered>
int launch_lane_rows(const SampleCategoricalArgs& args, const DrawRules& rules, void* stream) {
  const int64_t blocks = (args.shape.rows + kLaneRows - 1) / kLaneRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  bool dense = true;
  for (const LogitRows* logits : {&args.logits, &args.uncond})
    dense &= logits->data == nullptr ||
             (is_dense(args.shape, *logits) && reinterpret_cast<uintptr_t>(logits->data) % kCell == 0);
  const int bytes = span_bytes(args.logits, args.shape.vocab) + span_bytes(args.uncond, args.shape.vocab);
  return launch(lane_rows_kernel<kGuided, kFiltered>, dim3(static_cast<unsigned>(blocks)), dim3(kLaneRows),
                dense ? static_cast<size_t>(bytes) : 0, stream, args, rules, dense);
}

template <bool kGuided>
int launch_geometry(const SampleCategoricalArgs& args, void* stream) {
  const DrawRules rules(args);
  const int64_t vocab = args.shape.vocab;
  if (vocab <= kHeld)
    return rules.greedy || rules.filtered ? launch_lane_rows<kGuided, true>(args, rules, stream)
                                          : launch_lane_rows<kGuided, false>(args, rules, stream);
  if (rules.greedy || rules.filtered)
    return vocab <= kFilteredWarpVocab ? launch_filtered_rows<1, 8, kGuided>(args, rules, stream)
                                       : launch_filtered_rows<kManyWarps, 11, kGuided>(args, rules, stream);
  if (args.logits.vocab_stride != 1 || (kGuided && args.uncond.vocab_stride != 1)) {
    const int64_t blocks = (args.shape.rows + kWarp - 1) / kWarp;
    if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
    return launch(columns_kernel<kGuided>, dim3(static_cast<unsigned>(blocks)), dim3(kColumnWarps * kWarp), 0, stream,
                  args, rules);
  }
  if (vocab <= kShortVocab)
    return launch_rows(short_rows_kernel<kGuided>, kShortThreads / kShortLanes, kShortThreads, 0, args, rules, stream);
  if (vocab <= kWarpVocab)
    return launch_rows(warp_rows_kernel<kGuided>, kRowWarps, kRowWarps * kWarp, 0, args, rules, stream);
  return launch_rows(block_rows_kernel<kGuided>, 1, kRowWarps * kWarp, 0, args, rules, stream);
}

}  // namespace

int sample_categorical(const SampleCategoricalArgs& given, void* stream) {
  if (given.shape.rows == 0) return cudaSuccess;
  SampleCategoricalArgs args = given;
  merge_dims(args.shape, {&args.logits, &args.uncond});
  return args.uncond.data != nullptr ? launch_geometry<true>(args, stream) : launch_geometry<false>(args, stream);
}

}  // namespace dimo::cuda
