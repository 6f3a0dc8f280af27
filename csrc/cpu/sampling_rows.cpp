// Categorical draws on the CPU: the rows of one task, in SIMD. Compiled once an instruction set (DIMO_ISA);
// cpu/sampling.cpp chooses. Without filters memory is read once, and the winner's chunk again from the cache.
//
// A long row lies along the lanes of a register. Short rows, and rows whose vocabulary is strided, lie across them: one
// row a lane. Filters and greedy draws take a row at a time; a filter's threshold is searched over the row in the
// cache, where it is written once as floats if it is not there as such.
#include <cmath>
#include <type_traits>

#include "common/reveal.h"
#include "common/sampling.h"
#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/philox.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int64_t kShortVocab = 8 * kLanes;  // up to here rows lie across the lanes
constexpr int kStep = 2 * kLanes;            // ids that a step of a sweep takes
constexpr int64_t kResident = 16384;         // ids of a row that filters keep as floats; of a longer one, a chunk

constexpr int64_t kMaxima = 1024;  // chunks whose largest logits, a lane each, bound the k-th of the row

// Of the digits of a threshold's search: the shorter the row, the fewer sums are worth clearing.
constexpr int digit_bits(int64_t ids) { return ids <= 128 ? 5 : ids <= 4096 ? 8 : 11; }

DIMO_INLINE Vec minus_infinity() { return VecMath::splat(-INFINITY); }

float scale_of(const SampleCategoricalArgs& args, int64_t row) {
  return args.guidance != nullptr ? args.guidance[row / args.rows_per_sample] : args.guidance_scale;
}

// No function of the standard library that the compiler may leave uninlined: its copy could be merged into other files.
template <class T>
DIMO_INLINE T least(T a, T b) {
  return a < b ? a : b;
}

template <class T>
DIMO_INLINE void fill(T* begin, const T* end, T value) {
  for (; begin != end; ++begin) *begin = value;
}

int64_t chunks_of(const SampleCategoricalArgs& args) { return (args.shape.vocab + kChunk - 1) / kChunk; }

// uncond + s (cond - uncond); -inf on either side gives -inf, s = 1 ignores the unconditional side.
DIMO_INLINE Vec guided(Vec cond, Vec uncond, Vec scale) {
  const Int filtered = VecMath::min(cond, uncond) == -INFINITY;
  const Vec mixed = filtered ? minus_infinity() : uncond + scale * (cond - uncond);
  return scale == 1.0f ? cond : mixed;
}

// Weights in [0, 1] as multiples of 2^-40: two numbers of 20 bits, so that 256 of either sum up in 32.
struct Fixed {
  Int high, low;

  DIMO_INLINE explicit Fixed(Vec weight) {
    const Vec scaled = weight * 0x1p20f;
    high = __builtin_convertvector(scaled, Int);
    low = __builtin_convertvector((scaled - __builtin_convertvector(high, Vec)) * 0x1p20f, Int);
  }
};

DIMO_INLINE uint64_t joined(int64_t high, int64_t low) {
  return static_cast<uint64_t>((high << kHalfWeightBits) + low);
}

void put(const SampleCategoricalArgs& args, int64_t row, bool dead, int64_t token, float log_prob) {
  args.tokens[row] = dead ? -1 : token;
  if (args.log_prob != nullptr) args.log_prob[row] = dead ? -INFINITY : log_prob;
}

// --- one row along the lanes ----------------------------------------------------------------------------------------

class Along {
 public:
  explicit Along(const SampleCategoricalArgs& args) : args_(args), rules_(args), chunks_(chunks_of(args)) {}

  void run(const int64_t* rows, int) {
    const int64_t row = *rows;
    locate(row);
    if (rules_.greedy) return greedy(row);
    if (!rules_.filtered) return draw<false>(row);
    if (direct_ == nullptr && args_.shape.vocab <= kResident) fill_resident();
    if (!find_top()) return put(args_, row, true, 0, 0.0f);
    find_limit();
    draw<true>(row);
  }

 private:
  void locate(int64_t row) {
    logits_ = row_offset(args_.shape, args_.logits, row);
    scale_ = scale_of(args_, row);
    guided_ = args_.uncond.data != nullptr && scale_ != 1.0f;
    if (guided_) uncond_ = row_offset(args_.shape, args_.uncond, row);
    const bool as_is = args_.logits.dtype == DType::float32 && args_.logits.vocab_stride == 1 && !guided_;
    direct_ = as_is ? static_cast<const float*>(args_.logits.data) + logits_ : nullptr;
    streams_.set_all(args_.key, args_.key_stride, args_.rows_per_sample, row);
  }

  static void read(const LogitRows& logits, int64_t offset, int64_t n, float* to) {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      read_run(static_cast<const T*>(logits.data) + offset, logits.vocab_stride, n, to);
    });
  }

  int64_t ids_of(int64_t c) const { return least<int64_t>(args_.shape.vocab - c * kChunk, kChunk); }

  // The ids of a chunk, rounded up to what a step of a sweep takes.
  int64_t width_of(int64_t c) const { return (ids_of(c) + kStep - 1) / kStep * kStep; }

  // Writes a chunk as floats, -inf beyond the last id.
  void convert(int64_t c, float* to) {
    const int64_t begin = c * kChunk, n = ids_of(c);
    read(args_.logits, logits_ + begin * args_.logits.vocab_stride, n, to);
    fill<float>(to + n, to + width_of(c), -INFINITY);
    if (!guided_) return;
    read(args_.uncond, uncond_ + begin * args_.uncond.vocab_stride, n, other_);
    fill<float>(other_ + n, other_ + width_of(c), -INFINITY);
    for (int64_t i = 0; i < n; i += kLanes)
      store(to + i, guided(load(to + i), load(other_ + i), VecMath::splat(scale_)));
  }

  const float* chunk(int64_t c) {
    const int64_t begin = c * kChunk, n = ids_of(c);
    if (direct_ != nullptr && n == width_of(c)) return direct_ + begin;
    if (direct_ != nullptr) {
      std::memcpy(chunk_, direct_ + begin, static_cast<size_t>(n) * sizeof(float));
      fill<float>(chunk_ + n, chunk_ + width_of(c), -INFINITY);
    } else {
      convert(c, chunk_);
    }
    return chunk_;
  }

  void fill_resident() {
    for (int64_t c = 0; c < chunks_; ++c) convert(c, resident_ + c * kChunk);
    direct_ = resident_;
  }

  // False where there is none to draw from.
  bool find_top() {
    Vec top = minus_infinity();
    Int usable = ~Int{};
    for (int64_t c = 0; c < chunks_; ++c) {
      const float* const z = chunk(c);
      Vec chunk_top = minus_infinity();
      for (int i = 0; i < width_of(c); i += kLanes) {
        chunk_top = VecMath::max(load(z + i), chunk_top);
        usable &= load(z + i) < INFINITY;
      }
      if (c < kMaxima) store(maxima_ + c * kLanes, chunk_top);
      top = VecMath::max(chunk_top, top);
    }
    top_ = largest_lane(top);
    return top_ > -INFINITY && !any_lane(~usable);
  }

  void greedy(int64_t row) {
    if (!find_top()) return put(args_, row, true, 0, 0.0f);
    for (int64_t c = 0;; ++c) {
      const float* const z = chunk(c);
      for (int i = 0; i < ids_of(c); ++i)
        if (z[i] == top_) return put(args_, row, false, c * kChunk + i, 0.0f);
    }
  }

  // --- filters

  void find_limit() {
    uint32_t limit = 0x7f800000;
    const auto row = [&](int64_t c) { return Part{chunk(c), width_of(c)}; };
    if (rules_.top_k > 0) {
      // The k-th largest of the maxima of parts of the row is no larger than that of the row: it leaves few candidates.
      const int64_t maxima = least<int64_t>(chunks_, kMaxima) * kLanes;
      const auto part = [&](int64_t c) {
        return Part{maxima_ + c * kChunk, least<int64_t>(maxima - c * kChunk, kChunk)};
      };
      if (maxima >= rules_.top_k) limit = search<false>(limit, maxima, part);
      limit = search<false>(limit, args_.shape.vocab, row);
    }
    if (rules_.top_p < 1.0) limit = search<true>(limit, args_.shape.vocab, row);
    std::memcpy(&limit_, &limit, sizeof limit_);
    limit_ = least(limit_, rules_.min_p_drop);
  }

  struct Part {
    const float* z;
    int64_t width;  // a multiple of kLanes
  };

  // The threshold of top-p (kMass) or top-k among the drops up to a limit, of `ids` ids in parts of kChunk.
  template <bool kMass, class PartOf>
  uint32_t search(uint32_t limit, int64_t ids, const PartOf& part) {
    DropSearch search(static_cast<uint64_t>(rules_.top_k), digit_bits(ids));
    const size_t bins = size_t{1} << search.digit_bits;
    for (bool first = true; !search.done; first = false) {
      std::memset(histogram_, 0, bins * sizeof *histogram_);
      for (int64_t i = 0; i * kChunk < ids; ++i) count<kMass>(part(i), search, limit);
      if (kMass && first) {
        uint64_t total = 0;
        for (size_t i = 0; i < bins; ++i) total += histogram_[i];
        search.needed = needed_mass(rules_.top_p, total);
      }
      uint32_t digit = 0;
      uint64_t before = 0;
      for (; before + histogram_[digit] < search.needed; ++digit) before += histogram_[digit];
      search.descend(digit, before, histogram_[digit]);
    }
    return least(search.bound(), limit);
  }

  template <bool kMass>
  void count(const Part& part, const DropSearch& search, uint32_t limit) {
    const int above = search.shift + search.width;
    const Int prefix = Int{} + static_cast<int32_t>(search.prefix), largest = Int{} + static_cast<int32_t>(limit);
    alignas(64) int32_t drops[kLanes], high[kLanes], low[kLanes], wanted[kLanes];
    for (int i = 0; i < part.width; i += kLanes) {
      const Vec drop = top_ - load(part.z + i);
      const Int bits = reinterpret_cast<Int>(drop);
      const Int candidate = (bits >> above == prefix) & (bits <= largest);
      if (!any_lane(candidate)) continue;
      store_bytes(drops, bits);
      store_bytes(wanted, candidate);
      if constexpr (kMass) {
        const Fixed weight(VecMath::exp2(-drop * rules_.rate));
        store_bytes(high, weight.high);
        store_bytes(low, weight.low);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        uint64_t weight = 1;
        if constexpr (kMass) weight = joined(high[lane], low[lane]);
        histogram_[search.digit(static_cast<uint32_t>(drops[lane]))] += wanted[lane] != 0 ? weight : 0;
      }
    }
  }

  template <bool kFiltered>
  DIMO_INLINE Vec kept(const float* z) const {
    const Vec logit = load(z);
    if constexpr (kFiltered)
      return top_ - logit <= limit_ ? logit : minus_infinity();
    else
      return logit;
  }

  // --- the draw

  template <bool kFiltered>
  DIMO_INLINE float chunk_top(const float* z, int64_t width) const {
    Vec a = minus_infinity(), b = a;
    for (int i = 0; i < width; i += kStep) {
      a = VecMath::max(kept<kFiltered>(z + i), a);
      b = VecMath::max(kept<kFiltered>(z + i + kLanes), b);
    }
    return largest_lane(VecMath::max(a, b));
  }

  template <bool kFiltered>
  DIMO_INLINE float chunk_sum(const float* z, int64_t width, float top) const {
    const Vec usable = VecMath::splat(top == -INFINITY ? 0.0f : top);
    Vec a = Vec{}, b = Vec{};
    for (int i = 0; i < width; i += kStep) {
      a += VecMath::exp2((kept<kFiltered>(z + i) - usable) * rules_.rate);
      b += VecMath::exp2((kept<kFiltered>(z + i + kLanes) - usable) * rules_.rate);
    }
    return sum_of_lanes(a + b);
  }

  template <bool kFiltered>
  void draw(int64_t row) {
    ChunkRace<VecMath> race;
    alignas(64) float tops[kLanes], sums[kLanes];
    for (int64_t first = 0; first < chunks_; first += kLanes) {
      const int64_t n = least<int64_t>(chunks_ - first, kLanes);
      fill<float>(tops, tops + kLanes, -INFINITY);
      fill(sums, sums + kLanes, 0.0f);
      for (int64_t i = 0; i < n; ++i) {
        const float* const z = chunk(first + i);
        tops[i] = chunk_top<kFiltered>(z, width_of(first + i));
        sums[i] = chunk_sum<kFiltered>(z, width_of(first + i), tops[i]);
      }
      const Bits32 index = lane_numbers() + static_cast<uint32_t>(first);
      const Vec exponential = chunks_ == 1 ? VecMath::splat(1.0f) : negative_log(~streams_.words(index).word[0]);
      race.enter(load(tops), load(sums), exponential, reinterpret_cast<Int>(index), rules_.rate);
    }
    finish<kFiltered>(row, race);
  }

  template <bool kFiltered>
  void finish(int64_t row, const ChunkRace<VecMath>& race) {
    const float top = largest_lane(race.top);
    const Vec shrink = VecMath::exp2((race.top - top) * rules_.rate);
    const float total = sum_of_lanes(race.total * shrink);
    if (top == -INFINITY || !(total < INFINITY)) return put(args_, row, true, 0, 0.0f);
    const Vec score = race.best * shrink / race.rival;
    int winner = 0;
    for (int lane = 1; lane < kLanes; ++lane) winner = score[lane] > score[winner] ? lane : winner;
    const int64_t c = race.chunk[winner];
    const float* const z = chunk(c);
    const int id = pick<kFiltered>(z, c);
    const float log_prob = (z[id] - top) * rules_.inverse_temperature - __builtin_logf(total);
    put(args_, row, false, c * kChunk + id, log_prob);
  }

  template <bool kFiltered>
  int pick(const float* z, int64_t c) const {
    const int64_t width = width_of(c);
    const float top = chunk_top<kFiltered>(z, width);
    alignas(64) int32_t highs[kChunk], lows[kChunk];
    Int high = Int{}, low = Int{};
    for (int i = 0; i < width; i += kLanes) {
      const Fixed weight(VecMath::exp2((kept<kFiltered>(z + i) - top) * rules_.rate));
      store_bytes(highs + i, weight.high);
      store_bytes(lows + i, weight.low);
      high += weight.high;
      low += weight.low;
    }
    const RandomKey key = {streams_.seed_low[0] | static_cast<uint64_t>(streams_.seed_high[0]) << 32,
                           streams_.offset_low[0] | static_cast<uint64_t>(streams_.offset_high[0]) << 32};
    const Words4 words = random_words(key, streams_.tag, streams_.row[0], static_cast<uint32_t>(c));
    const uint64_t target = pick_target(joined(sum_of_lanes(high), sum_of_lanes(low)), words.word[1], words.word[2]);
    uint64_t through = 0;
    int id = 0;
    for (;; id += kLanes) {
      const uint64_t block =
          joined(sum_of_lanes(load_bytes<Int>(highs + id)), sum_of_lanes(load_bytes<Int>(lows + id)));
      if (through + block > target) break;
      through += block;
    }
    while ((through += joined(highs[id], lows[id])) <= target) ++id;
    return id;
  }

  const SampleCategoricalArgs& args_;
  const DrawRules rules_;
  const int64_t chunks_;
  int64_t logits_ = 0, uncond_ = 0;
  float scale_ = 1.0f;
  bool guided_ = false;
  const float* direct_ = nullptr;  // the row where it lies as floats
  LaneStreams streams_ = {OperatorTag::sample_categorical, {}, {}, {}, {}, {}};
  float top_ = 0.0f, limit_ = 0.0f;  // of a filtered row
  alignas(64) float chunk_[kChunk], other_[kChunk], resident_[kResident], maxima_[kMaxima * kLanes];
  uint64_t histogram_[1 << digit_bits(kResident)];
};

// --- a row a lane ---------------------------------------------------------------------------------------------------

class Across {
 public:
  explicit Across(const SampleCategoricalArgs& args) : args_(args), rules_(args), chunks_(chunks_of(args)) {}

  // At most kLanes rows.
  void run(const int64_t* rows, int count) {
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = rows[r < count ? r : 0];  // idle lanes repeat the first row
      logits_[r] = row_offset(args_.shape, args_.logits, row);
      if (args_.uncond.data != nullptr) uncond_[r] = row_offset(args_.shape, args_.uncond, row);
      scale_[r] = scale_of(args_, row);
      streams_.set(r, args_.key, args_.key_stride, args_.rows_per_sample, row);
    }
    race_ = ChunkRace<VecMath>();
    for (int64_t c = 0; c < chunks_; ++c) enter_chunk(c, least<int64_t>(args_.shape.vocab - c * kChunk, kChunk));
    const Vec log_prob = (logit_ - race_.top) * rules_.inverse_temperature - VecMath::log(race_.total);
    for (int r = 0; r < count; ++r) {
      const bool dead = race_.top[r] == -INFINITY || !(race_.total[r] < INFINITY);
      put(args_, rows[r], dead, token_[r], log_prob[r]);
    }
  }

 private:
  using Offsets = int64_t[kLanes];

  static void read(const LogitRows& logits, const Offsets& offsets, int64_t begin, int64_t n, float* to) {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* const data = static_cast<const T*>(logits.data) + begin * logits.vocab_stride;
      bool consecutive = true;
      for (int r = 1; r < kLanes; ++r) consecutive &= offsets[r] == offsets[0] + r;
      if (consecutive)
        for (int64_t i = 0; i < n; ++i) store(to + i * kLanes, load(data + offsets[0] + i * logits.vocab_stride));
      else
        for (int r = 0; r < kLanes; ++r)
          for (int64_t i = 0; i < n; ++i) to[i * kLanes + r] = load_one(data + offsets[r] + i * logits.vocab_stride);
    });
  }

  void enter_chunk(int64_t c, int64_t n) {
    read(args_.logits, logits_, c * kChunk, n, z_);
    if (args_.uncond.data != nullptr) {
      read(args_.uncond, uncond_, c * kChunk, n, weights_);
      for (int64_t i = 0; i < n * kLanes; i += kLanes) store(z_ + i, guided(load(z_ + i), load(weights_ + i), scale_));
    }
    Vec top = minus_infinity(), sum = Vec{};
    for (int64_t i = 0; i < n * kLanes; i += kLanes) top = VecMath::max(load(z_ + i), top);
    const Vec usable = ChunkRace<VecMath>::finite(top);
    for (int64_t i = 0; i < n * kLanes; i += kLanes) {
      const Vec weight = VecMath::exp2((load(z_ + i) - usable) * rules_.rate);
      sum += weight;
      store(weights_ + i, weight);
    }
    const LaneWords words = streams_.words(Bits32{} + static_cast<uint32_t>(c));
    const Vec exponential = chunks_ == 1 ? VecMath::splat(1.0f) : negative_log(~words.word[0]);
    const Int better = race_.enter(top, sum, exponential, Int{}, rules_.rate);
    if (any_lane(better)) pick(words, c, n, better);
  }

  // The pick of each lane inside this chunk becomes that of the lanes where it is the best chunk.
  void pick(const LaneWords& words, int64_t c, int64_t n, Int better) {
    Int high = Int{}, low = Int{}, target_high = Int{}, target_low = Int{};
    for (int64_t i = 0; i < n * kLanes; i += kLanes) {
      const Fixed weight(VecMath::max(load(weights_ + i), Vec{}));  // NaN in a dead row becomes 0
      high += weight.high;
      low += weight.low;
    }
    for (int r = 0; r < kLanes; ++r) {
      if (better[r] == 0) continue;
      const uint64_t target = pick_target(joined(high[r], low[r]), words.word[1][r], words.word[2][r]);
      target_high[r] = static_cast<int32_t>(target >> kHalfWeightBits);
      target_low[r] = static_cast<int32_t>(target & ((1u << kHalfWeightBits) - 1));
    }
    Int token = Int{}, found = Int{};
    Vec logit = Vec{};
    high = low = Int{};
    for (int64_t i = 0; i < n; ++i) {
      const Fixed weight(VecMath::max(load(weights_ + i * kLanes), Vec{}));
      low += weight.low;
      high += weight.high + (low >> kHalfWeightBits);
      low &= (1 << kHalfWeightBits) - 1;
      const Int over = (high > target_high) | ((high == target_high) & (low > target_low));
      const Int here = over & ~found;
      token = here ? Int{} + static_cast<int32_t>(c * kChunk + i) : token;
      logit = here ? load(z_ + i * kLanes) : logit;
      found |= over;
    }
    token_ = better ? token : token_;
    logit_ = better ? logit : logit_;
  }

  const SampleCategoricalArgs& args_;
  const DrawRules rules_;
  const int64_t chunks_;
  Offsets logits_ = {}, uncond_ = {};
  Vec scale_ = Vec{}, logit_ = Vec{};
  Int token_ = Int{};
  LaneStreams streams_ = {OperatorTag::sample_categorical, {}, {}, {}, {}, {}};
  ChunkRace<VecMath> race_;
  alignas(64) float z_[kChunk * kLanes], weights_[kChunk * kLanes];
};

// Draws the rows that are wanted, kTogether at a time.
template <class Rows, int kTogether>
void draw_rows(const SampleCategoricalArgs& args, int64_t begin, int64_t end) {
  Rows rows(args);
  int64_t wanted[kTogether];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (is_wanted(args, row))
      wanted[count++] = row;
    else
      args.tokens[row] = args.wanted.state[row];
    if (count > 0 && (count == kTogether || row + 1 == end)) {
      rows.run(wanted, count);
      count = 0;
    }
  }
}

}  // namespace

void DIMO_ISA::sample_categorical_rows(const SampleCategoricalArgs& args, int64_t begin, int64_t end) {
  const DrawRules rules(args);
  const bool strided = args.logits.vocab_stride != 1 && (args.uncond.data == nullptr || args.uncond.vocab_stride != 1);
  const bool across = !rules.filtered && !rules.greedy && (strided || args.shape.vocab <= kShortVocab);
  if (across)
    draw_rows<Across, kLanes>(args, begin, end);
  else
    draw_rows<Along, 1>(args, begin, end);
}

}  // namespace dimo::cpu
