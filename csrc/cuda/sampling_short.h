// Categorical draws from short vocabularies: up to 33 ids a lane a row, filters and greedy draws included, up to 64 ids
// 8 lanes a row.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/sampling_pick.h"

namespace dimo::cuda {
namespace {

// --- up to 33 ids: a lane a row -------------------------------------------------------------------------------------

constexpr int kHeld = 33;
// Ids are worked on 1 + 8 + 8 + ... at a time, so that none waits for another.
constexpr int kGroup = 8;
__device__ constexpr bool begins_group(int i) { return i % kGroup == 1; }
constexpr int kLaneRows = 128;  // of a block

// Bytes of shared memory for a block's rows of one tensor, and what the last row's last group reads beyond.
__host__ __device__ inline int span_bytes(const LogitRows& logits, int64_t vocab) {
  return logits.data == nullptr ? 0 : (kLaneRows * static_cast<int>(vocab) + kGroup) * bytes_of(logits.dtype);
}

// Starts copying a block's rows of one tensor, which follow one another without gaps.
__device__ inline void fetch_span(const LogitRows& logits, int64_t first, int ids, unsigned char* to) {
  const int bytes = ids << log2_bytes_of(logits.dtype), rank = static_cast<int>(threadIdx.x);
  const char* const from = address_of(logits, first);
  for (int i = rank * kCell; i < bytes; i += kLaneRows * kCell) copy_cell(to + i, from + i, from + bytes);
}

// Calls visit(i, its logit) for the ids of a line, which lie in the block's span or (null) in memory; and for what is
// left of the last group with some number.
template <class Visit>
__device__ void each_id(const Line& line, int vocab, const unsigned char* span, const Visit& visit) {
  with_type(line.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto each = [&](const auto& load) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (begins_group(i) && i >= vocab) break;
        visit(i, to_float(load(i)));
      }
    };
    if (span != nullptr) {
      const T* const from = reinterpret_cast<const T*>(span) + static_cast<int>(threadIdx.x) * vocab;
      each([&](int i) { return from[i]; });
    } else {
      const T* const from = reinterpret_cast<const T*>(line.data);
      each([&](int i) { return from[(i < vocab ? i : 0) * line.logits.vocab_stride]; });
    }
  });
}

// The ids of a row in a lane's registers: logits, then drops below the largest, then weights; -inf, inf or 0 where the
// last group goes on beyond the row.
struct LaneRow {
  const int vocab;
  float x[kHeld];

  template <class Visit>
  __device__ void each(const Visit& visit) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (begins_group(i) && i >= vocab) break;
      visit(i, x[i]);
    }
  }

  // The least drop with which the weights of the drops up to it reach what is needed; `limit` where that is less. Goes
  // from drop to drop in order of size.
  template <class Sum, class Weight>
  __device__ float threshold(float limit, Sum needed, const Weight& weight) {
    float drop = -1.0f;
    for (Sum through = 0; through < needed;) {
      float next = INFINITY;
      each([&](int, float other) { next = other > drop ? fminf(next, other) : next; });
      if (!(next < limit)) return limit;
      drop = next;
      Sum ties = 0;
      each([&](int, float other) { ties += other == drop; });
      through += ties * weight(drop);
    }
    return drop;
  }
};

template <bool kGuided, bool kFiltered>
__global__ __launch_bounds__(kLaneRows, kGuided ? 5 : 6) void lane_rows_kernel(const SampleCategoricalArgs args,
                                                                               const DrawRules rules, bool dense) {
  const int vocab = static_cast<int>(args.shape.vocab);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kLaneRows, row = first + threadIdx.x;
  unsigned char* const span = dense ? shared_memory<unsigned char>() : nullptr;
  unsigned char* const uncond_span = dense ? span + span_bytes(args.logits, vocab) : nullptr;
  if (dense) {
    const int64_t left = args.shape.rows - first;
    const int ids = static_cast<int>(left < kLaneRows ? left : kLaneRows) * vocab;
    fetch_span(args.logits, first * vocab, ids, span);
    if (kGuided) fetch_span(args.uncond, first * vocab, ids, uncond_span);
  }
  const bool wanted = row < args.shape.rows && is_wanted(args, row);
  const int64_t source_row = row < args.shape.rows ? row : first;
  const Row<kGuided> source(args, source_row);
  const Words4 words = source.stream(source_row).words(0);  // meanwhile
  wait_for_copies();
  __syncthreads();
  if (row >= args.shape.rows) return;
  if (!wanted) return keep(args, row);

  LaneRow own = {vocab, {}};
  each_id(source.cond, vocab, span, [&](int i, float z) { own.x[i] = z; });
  if constexpr (kGuided) {
    if (source.guided())
      each_id(source.uncond, vocab, uncond_span, [&](int i, float z) { own.x[i] = source.mixed(own.x[i], z); });
  }
  if (vocab % kGroup != 1) own.each([&](int i, float& z) { z = i < vocab ? z : -INFINITY; });
  float top = -INFINITY;
  own.each([&](int, float z) { top = fmaxf(top, z); });
  float limit = INFINITY;
  if constexpr (kFiltered) {
    bool dead = top == -INFINITY;  // or a logit is no number, or infinite
    own.each([&](int, float z) { dead |= !(z < INFINITY); });
    if (dead) return put(args, row, -1, -INFINITY);
  }
  own.each([&](int, float& x) { x = top - x; });
  if constexpr (kFiltered) {
    if (rules.greedy) {
      int id = vocab;
      own.each([&](int i, float drop) { id = drop == 0.0f && i < id ? i : id; });
      return put(args, row, id, 0.0f);
    }
    if (rules.top_k > 0) limit = own.threshold(limit, static_cast<int>(rules.top_k), [](float) { return 1; });
    if (rules.top_p < 1.0) {
      const auto mass = [&](float drop) { return fixed(exp2_fast(-drop * rules.rate)); };
      Wide total = 0;
      own.each([&](int, float drop) { total += drop <= limit ? mass(drop) : 0; });
      limit = own.threshold(limit, Wide{needed_mass(rules.top_p, total)}, mass);
    }
    limit = fminf(limit, rules.min_p_drop);
  }
  float sum = 0.0f;
  Fixed total;
  own.each([&](int, float& x) {
    x = !kFiltered || x <= limit ? exp2_fast(-x * rules.rate) : 0.0f;
    sum += x;
    total.add(x);
  });
  if (!kFiltered && !(sum < INFINITY)) return put(args, row, -1, -INFINITY);
  const Wide target = pick_target(total.joined(), words.word[1], words.word[2]);
  Fixed before;
  int id = 0;
  float weight = 0.0f;
  own.each([&](int i, float x) {
    if (before.joined() <= target) {  // at last true for the one that is picked
      id = i;
      weight = x;
    }
    before.add(x);
  });
  put(args, row, id, logf(weight / sum));
}

// --- up to 64 ids ---------------------------------------------------------------------------------------------------

constexpr int kShortLanes = 8;
constexpr int64_t kShortVocab = kShortLanes * kShare;
constexpr int kShortThreads = 128, kShortWarps = 24;  // of a block; of a multiprocessor

template <bool kGuided>
__global__ __launch_bounds__(kShortThreads, kShortWarps* kWarp /
                                                kShortThreads) void short_rows_kernel(const SampleCategoricalArgs args,
                                                                                      const DrawRules rules) {
  const Lanes<kShortLanes> lanes;
  const int64_t step = static_cast<int64_t>(gridDim.x) * (kShortThreads / kShortLanes);
  const int vocab = static_cast<int>(args.shape.vocab), share = (vocab + kShortLanes - 1) / kShortLanes;
  const int first = lanes.rank * share, end = first + share < vocab ? first + share : vocab;
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * kShortThreads + threadIdx.x) / kShortLanes;
       row < args.shape.rows; row += step) {
    if (!is_wanted(args, row)) {
      if (lanes.rank == 0) keep(args, row);
      continue;
    }
    const Row<kGuided> source(args, row);
    const Words4 words = source.stream(row).words(0);
    float z[kShare];
    source.load(first, end, z);
    const float top = largest(lanes, z);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kShare; ++i)
      if (i < share) sum += exp2_fast((z[i] - finite(top)) * rules.rate);
    sum = lanes.sum(sum);
    if (top == -INFINITY || !(sum < INFINITY)) {
      if (lanes.rank == 0) put(args, row, -1, -INFINITY);
      continue;
    }
    pick(lanes, args, rules, z, share, words.word[1], words.word[2], 0, top, sum, row);
  }
}

}  // namespace
}  // namespace dimo::cuda
