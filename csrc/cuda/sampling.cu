// Categorical draws: one launch, no workspace. Every logit is read once, 2 or 4 bytes, and the winner's chunk again
// from the cache; filters read the row again, from the L2 cache for the most part: twice under top-k, whose few ids are
// then listed in shared memory, once for every digit of the threshold where too many stay. Tokens and log-probabilities
// are all that is written.
//
// A row of up to 33 ids belongs to a lane, of up to 64 to 8 lanes, a longer one to a warp, a long one to a block, whose
// warps take its chunks in turn while the next ones are on their way into shared memory. One lane keeps the sums of one
// chunk: 32 chunks at a time then race in parallel. The pick inside the winner goes through its ids in order.
#include <cstdint>
#include <type_traits>

#include "common/sampling.h"
#include "common/scalar_math.h"
#include "cuda/chunks.h"
#include "cuda/launch.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kShortLanes = 8;
constexpr int64_t kShortVocab = kShortLanes * kShare;
constexpr int64_t kWarpVocab = 4096;  // up to here a warp a row
constexpr int kManyWarps = 8;
constexpr int kRowsPerBlock = 4;  // where each has a warp
// Warps that a multiprocessor is to hold, as registers allow without spills.
constexpr int resident_warps(bool guided) { return guided ? 24 : 32; }
constexpr int64_t kMostBlocks = 1 << 14;
constexpr float kOne = 0x1p40f;  // in fixed point

// A filter: ids that lie further than the limit below the top are dropped.
struct Filter {
  float top, limit;

  __device__ void apply(float (&z)[kShare]) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) z[i] = top - z[i] <= limit ? z[i] : -INFINITY;
  }
};
struct NoFilter {
  __device__ void apply(float (&)[kShare]) const {}
};

template <int kLanes>
__device__ float largest(const Lanes<kLanes>& lanes, const float (&z)[kShare]) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < kShare; ++i) top = fmaxf(top, z[i]);
  return lanes.max(top);
}

__device__ inline float finite(float top) { return ChunkRace<ScalarMath>::finite(top); }

__device__ inline void put(const SampleCategoricalArgs& args, int64_t row, int64_t token, float log_prob) {
  args.tokens[row] = token;
  args.log_prob[row] = log_prob;
}

// Draws among the ids that the lanes hold, `share` neighbours each, by weights in 40-bit fixed point; one lane writes.
template <int kLanes>
__device__ void pick(const Lanes<kLanes>& lanes, const SampleCategoricalArgs& args, const DrawRules& rules,
                     const float (&z)[kShare], int share, uint32_t word1, uint32_t word2, int first, float row_top,
                     float row_total, int64_t row) {
  const float top = largest(lanes, z);
  float weight[kShare];
  Wide own = 0;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    weight[i] = i < share ? exp2_fast((z[i] - top) * rules.rate) * kOne : 0.0f;
    own += static_cast<Wide>(weight[i]);
  }
  const Wide through = lanes.scan(own), target = pick_target(lanes.from(kLanes - 1, through), word1, word2);
  Wide before = through - own;
  if (target < before || target >= through) return;
  int id = -1;
  float logit = 0.0f;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    before += static_cast<Wide>(weight[i]);
    if (id < 0 && target < before) {
      id = i;
      logit = z[i];
    }
  }
  put(args, row, first + lanes.rank * share + id, (logit - row_top) * rules.inverse_temperature - logf(row_total));
}

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
  const int64_t source_row = row < args.shape.rows ? row : first;
  const Row<kGuided> source(args, source_row);
  const Words4 words = source.stream(source_row).words(0);  // meanwhile
  wait_for_copies();
  __syncthreads();
  if (row >= args.shape.rows) return;

  LaneRow own = {vocab, {}};
  each_id(source.cond, vocab, span, [&](int i, float z) { own.x[i] = z; });
  if constexpr (kGuided) {
    if (source.guided())
      each_id(source.uncond, vocab, uncond_span, [&](int i, float z) { own.x[i] = source.mixed(own.x[i], z); });
  }
  float top = -INFINITY;
  bool dead = false;  // a logit is no number, or infinite
  own.each([&](int i, float& z) {
    z = i < vocab ? z : -INFINITY;
    top = fmaxf(top, z);
    dead |= !(z < INFINITY);
  });
  if (dead || top == -INFINITY) return put(args, row, -1, -INFINITY);
  own.each([&](int, float& x) { x = top - x; });
  float limit = INFINITY;
  if constexpr (kFiltered) {
    if (rules.greedy) {
      int id = vocab;
      own.each([&](int i, float drop) { id = drop == 0.0f && i < id ? i : id; });
      return put(args, row, id, 0.0f);
    }
    if (rules.top_k > 0) limit = own.threshold(limit, static_cast<int>(rules.top_k), [](float) { return 1; });
    if (rules.top_p < 1.0) {
      const auto mass = [&](float drop) { return static_cast<Wide>(exp2_fast(-drop * rules.rate) * kOne); };
      Wide total = 0;
      own.each([&](int, float drop) { total += drop <= limit ? mass(drop) : 0; });
      limit = own.threshold(limit, Wide{needed_mass(rules.top_p, total)}, mass);
    }
    limit = fminf(limit, rules.min_p_drop);
  }
  // Weights in fixed point but for the fraction.
  float sum = 0.0f;
  Wide total = 0;
  own.each([&](int, float& x) {
    x = x <= limit ? exp2_fast(-x * rules.rate) * kOne : 0.0f;
    sum += x;
    total += static_cast<Wide>(x);
  });
  const Wide target = pick_target(total, words.word[1], words.word[2]);
  Wide before = 0;
  int id = 0;
  float weight = 0.0f;
  own.each([&](int i, float x) {
    if (before <= target) {  // at last true for the one that is picked
      id = i;
      weight = x;
    }
    before += static_cast<Wide>(x);
  });
  put(args, row, id, logf(weight / sum));
}

// --- up to 64 ids ---------------------------------------------------------------------------------------------------

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

// --- more ids: kWarps warps a row -----------------------------------------------------------------------------------

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
  for (int64_t row = blockIdx.x; row < args.shape.rows; row += gridDim.x, parity ^= 1)
    draw<kManyWarps>(Row<kGuided>(args, row), NoFilter{}, rules, row, slots_of_warp(args), parity, board);
}

// --- filters and greedy draws ---------------------------------------------------------------------------------------

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
  source.template each_chunk<kWarps>(
      lanes.rank, warp, slots,
      [&](int chunk, int, const float (&z)[kShare]) {
#pragma unroll
        for (int i = 0; i < kShare; ++i)
          if (!(z[i] <= own.top)) own = {z[i] < INFINITY ? z[i] : INFINITY, chunk * kChunk + lanes.rank + i * kWarp};
      },
      [](int) {});
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
  source.template each_chunk<kWarps>(
      lanes.rank, warp, slots,
      [&](int, int, const float (&z)[kShare]) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          drops[i] = fmaxf(drops[i], z[i]);
          dead |= !(z[i] < INFINITY);
        }
      },
      [](int) {});
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
      const Bin weight = kMass ? static_cast<Bin>(exp2_fast(-drop * rules.rate) * kOne) : 1;
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
__global__ __launch_bounds__(kWarps* kWarp, (resident_warps(kGuided) - 8) /
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
      source.template each_chunk<kWarps>(
          rank % kWarp, rank / kWarp, slots,
          [&](int, int, const float (&z)[kShare]) {
#pragma unroll
            for (int i = 0; i < kShare; ++i) visit(top - z[i]);
          },
          [](int) {});
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
    draw<kWarps>(source, filter, rules, row, slots, parity, board);
  }
}

template <class Kernel>
int launch_rows(Kernel kernel, int64_t rows_per_block, int threads, const SampleCategoricalArgs& args,
                const DrawRules& rules, void* stream) {
  const int64_t blocks = (args.shape.rows + rows_per_block - 1) / rows_per_block;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  const auto shared_bytes = static_cast<size_t>(threads / kWarp * ring_bytes(args));
  return launch(kernel, grid, dim3(static_cast<unsigned>(threads)), shared_bytes, stream, args, rules);
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
  if (rules.greedy || rules.filtered) {
    if (vocab <= kWarpVocab) return launch_rows(filtered_rows_kernel<1, 8, kGuided>, 1, kWarp, args, rules, stream);
    return launch_rows(filtered_rows_kernel<kManyWarps, 11, kGuided>, 1, kManyWarps * kWarp, args, rules, stream);
  }
  if (vocab <= kShortVocab)
    return launch_rows(short_rows_kernel<kGuided>, kShortThreads / kShortLanes, kShortThreads, args, rules, stream);
  if (vocab <= kWarpVocab)
    return launch_rows(warp_rows_kernel<kGuided>, kRowsPerBlock, kRowsPerBlock * kWarp, args, rules, stream);
  return launch_rows(block_rows_kernel<kGuided>, 1, kManyWarps * kWarp, args, rules, stream);
}

}  // namespace

int sample_categorical(const SampleCategoricalArgs& given, void* stream) {
  if (given.shape.rows == 0) return cudaSuccess;
  SampleCategoricalArgs args = given;
  merge_dims(args.shape, {&args.logits, &args.uncond});
  return args.uncond.data != nullptr ? launch_geometry<true>(args, stream) : launch_geometry<false>(args, stream);
}

}  // namespace dimo::cuda
