// The CPU divergence of as many rows as a register takes. Logits are converted to float, mixed (guidance) and put into
// buffers; the sweeps over them are the same for rows along and across the lanes (cpu/layouts.h).
#pragma once

#include <type_traits>

#include "common/divergences.h"
#include "common/rows.h"
#include "cpu/divergence_softmax.h"
#include "cpu/layouts.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int kStagger = 320;        // floats, so that short buffers do not meet in the same sets of a cache
constexpr int64_t kNearVocab = 640;  // rows up to here are fetched into the first-level cache

struct Buffers {
  alignas(64) float p[kBuffer + kStagger];         // the teacher's logits, mixed; then rows side by side
  alignas(64) float q[kBuffer + kStagger];         // the auxiliary's
  alignas(64) float weight_p[kBuffer + kStagger];  // their softmax, not yet normalised
  alignas(64) float weight_q[kBuffer + kStagger];
  alignas(64) float other[kBuffer + kStagger];  // unconditional logits, then pulls, then the gradient
};

float factor_of(const TokenDivergenceArgs& args, int64_t row) {
  return args.factor != nullptr ? args.factor[row * args.factor_stride] : 1.0f;
}

// kWhole: a row fits the buffers, so that it is read once and every weight is computed once.
template <class Layout, class Divergence, bool kWhole>
class Tile {
 public:
  Tile(const TokenDivergenceArgs& args, Buffers& buffers)
      : args_(args),
        divergence_(args.parameter),
        buffers_(buffers),
        scale_(VecMath::splat(args.guidance_scale)),
        teacher_softmax_(args.teacher_temperature),
        auxiliary_softmax_(args.auxiliary_temperature),
        rate_difference_(teacher_softmax_.inverse_temperature - auxiliary_softmax_.inverse_temperature),
        alike_(alike(args.teacher, args.auxiliary) &&
               (args.uncond.data == nullptr || alike(args.teacher, args.uncond))),
        streams_(
            (Layout::kRows == 1 ? args.gradient.vocab_stride == 1 : kWhole && is_dense(args.shape, args.gradient)) &&
            args.gradient.dtype == DType::float32 && is_large(args.shape, args.gradient)) {}

  // At most Layout::kRows rows, which of them count (bit r), and the one that will be run next. Those that do not count
  // leave zeros.
  void run(const int64_t* rows, int count, uint32_t counting, int64_t next) {
    counting_ = Layout::kRows == 1 ? ~Int{} : (lane_bits() & static_cast<int32_t>(counting)) != 0;
    locate(rows, count);
    row_ = rows[0];
    next_ = next + Layout::kAhead < args_.shape.rows ? next + Layout::kAhead : next;
    summed_ = false;
    gather_statistics();
    if (args_.gradient.data != nullptr) sum_pull();
    write(rows, count);
  }

 private:
  using Offsets = int64_t[Layout::kRows];

  static bool alike(const LogitRows& a, const LogitRows& b) {
    return a.dtype == b.dtype && a.vocab_stride == 1 && b.vocab_stride == 1;
  }

  // Idle lanes repeat the first row.
  void locate(const int64_t* rows, int count) {
    const LogitRows* const tensors[] = {&args_.teacher, &args_.uncond, &args_.auxiliary, &args_.gradient};
    int64_t* const offsets[] = {teacher_, uncond_, auxiliary_, gradient_};
    const int64_t first = rows[0];
    consecutive_ = count == Layout::kRows && rows[count - 1] == first + count - 1;
    int64_t all[Layout::kRows];
    for (int r = 0; r < Layout::kRows; ++r) all[r] = consecutive_ ? first + r : rows[r < count ? r : 0];
    if (consecutive_ && args_.shape.dims == 1) {
      for (int t = 0; t < 4; ++t) {
        const int64_t stride = tensors[t]->strides[0];
        for (int r = 0; r < Layout::kRows; ++r) offsets[t][r] = (first + r) * stride;
      }
    } else {
      for (int r = 0; r < Layout::kRows; ++r) {
        int64_t row[4];
        row_offsets(args_.shape, all[r], tensors, row);
        for (int t = 0; t < 4; ++t) offsets[t][r] = row[t];
      }
    }
    alignas(64) float lanes[Layout::kRows];
    if (args_.guidance != nullptr) {
      for (int r = 0; r < Layout::kRows; ++r) lanes[r] = args_.guidance[all[r] / args_.rows_per_sample];
      scale_ = Layout::of_rows(lanes);
    }
    if (args_.factor != nullptr) {
      for (int r = 0; r < Layout::kRows; ++r) lanes[r] = factor_of(args_, all[r]);
      factor_ = Layout::of_rows(lanes);
    }
  }

  // What is read and written next, from id begin of a row on.
  Ahead look_ahead(int64_t row, int64_t begin) const {
    Ahead ahead;
    ahead.near = kWhole && (Layout::kRows > 1 || args_.shape.vocab <= kNearVocab);
    const auto look = [&](const LogitRows& logits, const char*& data, int64_t& step) {
      if (logits.data == nullptr) return;
      const int64_t element = row_offset(args_.shape, logits, row) + begin * logits.vocab_stride;
      data = static_cast<const char*>(logits.data) + element * bytes_of(logits.dtype);
      // Short rows follow one another, so do the rows of one id where the vocabulary is strided.
      step = (logits.vocab_stride == 1 ? kLanes : logits.vocab_stride) * bytes_of(logits.dtype);
    };
    look(args_.teacher, ahead.teacher, ahead.teacher_step);
    look(args_.uncond, ahead.uncond, ahead.uncond_step);
    look(args_.auxiliary, ahead.auxiliary, ahead.auxiliary_step);
    const bool written_later = !streams_ && args_.gradient.data != args_.auxiliary.data;
    if (written_later) look(args_.gradient, ahead.gradient, ahead.gradient_step);
    return ahead;
  }

  void read(const LogitRows& logits, const Offsets& offsets, int64_t begin, int64_t n, float* to) const {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Layout::read(static_cast<const T*>(logits.data), logits.vocab_stride, offsets, begin, n, to);
    });
  }

  // Fills the buffers with ids [begin, begin + n) and raises the tops.
  void prepare(int64_t begin, int64_t n, Tops& tops) const {
    with_guidance(guidance_, [&](auto guidance) {
      constexpr Guidance kGuidance = decltype(guidance)::value;
      if (alike_)
        return with_type(args_.teacher.dtype, [&](auto* type) { mix_alike<kGuidance>(type, begin, n, tops); });
      read(args_.teacher, teacher_, begin, n, buffers_.p);
      read(args_.auxiliary, auxiliary_, begin, n, buffers_.q);
      if (kGuidance != Guidance::off) read(args_.uncond, uncond_, begin, n, buffers_.other);
      const float *p = buffers_.p, *u = buffers_.other, *q = buffers_.q;
      mix<kGuidance>(p, u, q, scale_, n * Layout::kRows, buffers_.p, buffers_.q, tops);
    });
  }

  template <Guidance kGuidance, class T>
  void mix_alike(T*, int64_t begin, int64_t n, Tops& tops) const {
    const auto at = [&](const LogitRows& logits, int64_t offset) {
      return logits.data == nullptr ? nullptr : static_cast<const T*>(logits.data) + offset + begin;
    };
    if constexpr (Layout::kRows == 1)
      mix<kGuidance>(at(args_.teacher, teacher_[0]), at(args_.uncond, uncond_[0]), at(args_.auxiliary, auxiliary_[0]),
                     scale_, n, buffers_.p, buffers_.q, tops);
    else
      mix_across<kGuidance>(at(args_.teacher, 0), teacher_, at(args_.uncond, 0), uncond_, at(args_.auxiliary, 0),
                            auxiliary_, scale_, n, buffers_.p, buffers_.q, tops);
  }

  // Calls visit(begin, n) for the chunks of the vocabulary.
  template <class Visit>
  DIMO_INLINE void each_chunk(const Visit& visit) const {
    constexpr int64_t kChunk =
        kWhole ? Layout::kCapacity : Layout::kCapacity / 4;  // short ones stay in the first cache
    for (int64_t begin = 0; begin < args_.shape.vocab; begin += kChunk)
      visit(begin, args_.shape.vocab - begin < kChunk ? args_.shape.vocab - begin : kChunk);
  }

  // The same in a sweep after the first one.
  template <class Visit>
  DIMO_INLINE void each_chunk_again(const Visit& visit) const {
    each_chunk([&](int64_t begin, int64_t n) DIMO_INLINE_LAMBDA {
      Tops tops;
      if constexpr (!kWhole) prepare(begin, n, tops);
      visit(begin, n);
    });
  }

  // Calls visit(last, i) for the registers of a chunk, where last, a constant of its type, says that the register is
  // filled up with -inf.
  template <class Visit>
  DIMO_INLINE static void each_register(int64_t n, const Visit& visit) {
    const int64_t full = Layout::full(n) * kLanes;
    for (int64_t i = 0; i < full; i += kLanes) visit(std::false_type{}, i);
    if (Layout::kRows == 1 && full < n) visit(std::true_type{}, full);
  }

  // Differences of logits, 0 where the register is filled up.
  template <bool kLast>
  DIMO_INLINE Vec difference(int64_t n, int64_t i, Vec z_p, Vec z_q) const {
    const Vec d = z_p - z_q;
    if constexpr (kLast) return lane_numbers() < static_cast<int32_t>(n - i) ? d : Vec{};
    return d;
  }

  void gather_statistics() {
    guidance_ = args_.uncond.data == nullptr || all(scale_ == 1.0f) ? Guidance::off
                : any(scale_ == 1.0f)                               ? Guidance::careful
                                                                    : Guidance::quick;
    sum_weights();
    if (guidance_ == Guidance::quick && any(~is_finite(moment_) & counting_)) {
      guidance_ = Guidance::careful;
      sum_weights();
    }
    const Int clean = is_finite(moment_);  // -inf makes it NaN or infinite
    filtered_ = any(~clean & counting_) || args_.teacher_log_floor > -kInfinity;
    teacher_softmax_.finish(Layout::sum_over_row(teacher_softmax_.sum));
    auxiliary_softmax_.finish(Layout::sum_over_row(auxiliary_softmax_.sum));
    // log p - log q comes from the logits' difference, which is exact where they nearly agree; where the tops lie far
    // apart, from what is left above them.
    const Vec gap = (teacher_softmax_.top - auxiliary_softmax_.top) * auxiliary_softmax_.inverse_temperature;
    const Int near = VecMath::abs(gap) < kNearTops;
    base_p_ = near ? Vec{} : teacher_softmax_.top;
    base_q_ = near ? Vec{} : auxiliary_softmax_.top;
    shift_ = (near ? gap : Vec{}) + (teacher_softmax_.log_sum - auxiliary_softmax_.log_sum);
    dead_ = (teacher_softmax_.sum == 0.0f) | (auxiliary_softmax_.sum == 0.0f);
    mean_x_ = moment_ * auxiliary_softmax_.inverse_sum * auxiliary_softmax_.inverse_temperature - shift_;
    const bool ordinary = rate_difference_ == 0.0f && args_.teacher_log_floor == -kInfinity;
    ordinary_ = ordinary ? clean & near : Int{};
    far_ = ordinary_ & (mean_x_ < -kFarApart);
  }

  // Sums and tops of both sides, and the sum of q's weights times z_p - z_q.
  void sum_weights() {
    teacher_softmax_ = Softmax(args_.teacher_temperature);
    auxiliary_softmax_ = Softmax(args_.auxiliary_temperature);
    moment_ = Vec{};
    each_chunk([&](int64_t begin, int64_t n) DIMO_INLINE_LAMBDA {
      Tops tops{teacher_softmax_.highest, auxiliary_softmax_.highest};
      prepare(begin, n, tops);
      Ahead ahead = kWhole ? look_ahead(next_, 0) : look_ahead(row_, begin + n);
      teacher_softmax_.raise(Layout::max_over_row(tops.p));
      moment_ *= auxiliary_softmax_.raise(Layout::max_over_row(tops.q));
      const Softmax teacher = teacher_softmax_, auxiliary = auxiliary_softmax_;
      Vec sum_p = Vec{}, sum_q = Vec{}, moment = Vec{};
      each_register(n, [&](auto last, int64_t i) {
        ahead.fetch_teachers();
        if constexpr (!kWhole) ahead.fetch_rest();
        const Vec z_p = load(buffers_.p + i), z_q = load(buffers_.q + i);
        const Vec p = teacher.weight(z_p), q = auxiliary.weight(z_q);
        sum_p += p;
        sum_q += q;
        moment += q * difference<decltype(last)::value>(n, i, z_p, z_q);
        if constexpr (kWhole) {
          store(buffers_.weight_p + i, p);
          store(buffers_.weight_q + i, q);
        }
      });
      teacher_softmax_.sum += sum_p;
      auxiliary_softmax_.sum += sum_q;
      moment_ += moment;
      ahead_ = ahead;
    });
    moment_ = Layout::sum_over_row(moment_);
  }

  DIMO_INLINE Vec prob_p(int64_t i, Vec z) const {
    return (kWhole ? load(buffers_.weight_p + i) : teacher_softmax_.weight(z)) * teacher_softmax_.inverse_sum;
  }
  DIMO_INLINE Vec prob_q(int64_t i, Vec z) const {
    return (kWhole ? load(buffers_.weight_q + i) : auxiliary_softmax_.weight(z)) * auxiliary_softmax_.inverse_sum;
  }

  // The terms of the register at i; only a filtered one may hold -inf.
  template <bool kFiltered>
  DIMO_INLINE Terms<Vec> terms(int64_t i, Vec& q) const {
    const Vec z_p = load(buffers_.p + i), z_q = load(buffers_.q + i);
    q = prob_q(i, z_q);
    const Vec x = ((z_p - base_p_) - (z_q - base_q_)) * auxiliary_softmax_.inverse_temperature +
                  ((z_p - teacher_softmax_.top) * rate_difference_ - shift_);
    const Entry<Vec> entry = {prob_p(i, z_p), q, teacher_softmax_.log_prob(z_p), auxiliary_softmax_.log_prob(z_q), x};
    Terms<Vec> t;
    if constexpr (kFiltered)
      t = terms_at<VecMath>(divergence_, with_floor<VecMath>(entry, args_.teacher_log_floor));
    else
      t = divergence_.terms(entry);
    if constexpr (Divergence::kPullFromMean && Layout::kRows > 1) {
      const Terms<Vec> plain = divergence_.plain_terms(entry);
      t = {far_ ? plain.value : t.value, far_ ? plain.second : t.second, far_ ? plain.pull : t.pull};
    }
    return t;
  }

  // The same where every row is far.
  template <bool kLast>
  DIMO_INLINE Terms<Vec> plain_terms(int64_t n, int64_t i, Vec& q) const {
    const Vec z_p = load(buffers_.p + i), z_q = load(buffers_.q + i);
    q = prob_q(i, z_q);
    const Vec x = difference<kLast>(n, i, z_p, z_q) * auxiliary_softmax_.inverse_temperature - shift_;
    return divergence_.plain_terms({prob_p(i, z_p), q, Vec{}, Vec{}, x});
  }

  // Calls visit(i, q, terms) for the registers of a chunk.
  template <class Visit>
  DIMO_INLINE void each_terms(int64_t n, const Visit& visit) const {
    Vec q;
    if (filtered_)
      for (int64_t i = 0; i < Layout::padded(n) * kLanes; i += kLanes) {
        const Terms<Vec> t = terms<true>(i, q);
        visit(i, q, t);
      }
    else
      each_register(n, [&](auto last, int64_t i) {
        const Terms<Vec> t = terms<decltype(last)::value>(i, q);
        visit(i, q, t);
      });
  }

  // Of rows that are there whole it leaves the pulls in a buffer, and the values summed up.
  void sum_pull() {
    Vec pull = Vec{};
    value_ = second_ = Vec{};
    summed_ = !Divergence::kPullFromMean || any(~ordinary_ & counting_);
    if (summed_) {
      each_chunk_again([&](int64_t, int64_t n) DIMO_INLINE_LAMBDA {
        Vec part = Vec{}, value = Vec{}, second = Vec{};
        each_terms(n, [&](int64_t i, Vec, const Terms<Vec>& t) {
          part += t.pull;
          if constexpr (kWhole) {
            value += t.value;
            if constexpr (Divergence::kTwoValues) second += t.second;
            store(buffers_.other + i, t.pull);
          }
        });
        pull += part;
        value_ += value;
        second_ += second;
      });
      pull = Layout::sum_over_row(pull);
    }
    if constexpr (Divergence::kPullFromMean) pull = ordinary_ ? divergence_.pull_from_mean(mean_x_) : pull;
    pull_ = pull;
  }

  void write(const int64_t* rows, int count) {
    Int largest = Int{};  // magnitude of the gradient; as integers, NaN lies above infinity
    const bool wanted = args_.gradient.data != nullptr, kept = kWhole && summed_;
    const Vec scale = (args_.factor_in_gradient ? factor_ : VecMath::splat(1.0f)) / args_.auxiliary_temperature;
    const Int counting = counting_;
    Ahead ahead = ahead_;
    if (!kept) value_ = second_ = Vec{};
    each_chunk_again([&](int64_t begin, int64_t n) DIMO_INLINE_LAMBDA {
      Vec value = Vec{}, second = Vec{};
      const Vec pull = pull_;
      const auto put = [&](int64_t i, Vec q, Vec own) DIMO_INLINE_LAMBDA {
        Vec g = (own - q * pull) * scale;
        if constexpr (Layout::kRows > 1) g = counting ? g : Vec{};
        const Int magnitude = reinterpret_cast<Int>(g) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
        store(buffers_.other + i, g);
      };
      const auto add = [&](int64_t i, Vec q, const Terms<Vec>& t) {
        if constexpr (kWhole) ahead.fetch_rest();
        value += t.value;
        if constexpr (Divergence::kTwoValues) second += t.second;
        if (wanted) put(i, q, t.pull);
      };
      const bool far = Divergence::kPullFromMean && all(far_ | ~counting_);
      if (kept) {
        each_register(n, [&](auto, int64_t i) {
          ahead.fetch_rest();
          put(i, prob_q(i, load(buffers_.q + i)), load(buffers_.other + i));
        });
      } else if (far) {
        if constexpr (Divergence::kPullFromMean)
          each_register(n, [&](auto last, int64_t i) {
            Vec q;
            const Terms<Vec> t = plain_terms<decltype(last)::value>(n, i, q);
            add(i, q, t);
          });
      } else {
        each_terms(n, add);
      }
      value_ += value;
      second_ += second;
      if (wanted) store_gradient(begin, n, count);
    });
    const float bound = wanted ? overflow_bound(args_.gradient.dtype) : kInfinity;
    const Int usable = largest < reinterpret_cast<Int>(VecMath::splat(bound));
    finish(rows, count, Layout::sum_over_row(value_), Layout::sum_over_row(second_), usable);
  }

  void store_gradient(int64_t begin, int64_t n, int count) const {
    if (streams_ && consecutive_) {
      float* run = buffers_.other;
      if constexpr (Layout::kRows > 1) {  // side by side first
        int64_t offsets[Layout::kRows];
        for (int r = 0; r < Layout::kRows; ++r) offsets[r] = r * n;
        run = buffers_.p;
        Layout::write(buffers_.other, 1, offsets, count, 0, n, run);
      }
      return stream_run(run, Layout::kRows * n, static_cast<float*>(args_.gradient.data) + gradient_[0] + begin);
    }
    with_type(args_.gradient.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Layout::write(buffers_.other, args_.gradient.vocab_stride, gradient_, count, begin, n,
                    static_cast<T*>(args_.gradient.data));
    });
  }

  void finish(const int64_t* rows, int count, Vec value, Vec second, Int usable) const {
    if (Layout::kRows == 1) usable = all(usable) ? ~Int{} : Int{};
    const Vec divergence = dead_ | ~counting_ ? Vec{} : divergence_.combine(value, second);
    const Int lost = ~dead_ & (~usable | (divergence != divergence));
    float values[kLanes];
    store(values, counting_ ? divergence * factor_ : Vec{});
    if (consecutive_)
      std::memcpy(args_.value + rows[0], values, sizeof(float) * Layout::kRows);
    else
      for (int r = 0; r < count; ++r) args_.value[rows[r]] = values[r];
    const Int zeroed = (dead_ | lost) & counting_;
    if (args_.gradient.data == nullptr || !any(zeroed)) return;
    finish_streams();  // what was written first
    for (int r = 0; r < count; ++r) {
      if (zeroed[r] != 0) zero_row(args_.shape, args_.gradient, rows[r]);
      if (lost[r] != 0) __atomic_fetch_add(args_.zeroed, int64_t{1}, __ATOMIC_RELAXED);
    }
  }

  const TokenDivergenceArgs& args_;
  const Divergence divergence_;
  Buffers& buffers_;
  Offsets teacher_ = {}, uncond_ = {}, auxiliary_ = {}, gradient_ = {};
  Vec scale_, factor_ = VecMath::splat(1.0f), pull_ = Vec{}, moment_ = Vec{};
  Guidance guidance_ = Guidance::off;
  Softmax teacher_softmax_, auxiliary_softmax_;
  const float rate_difference_;
  int64_t row_ = 0, next_ = 0;
  Ahead ahead_ = {};
  const bool alike_;    // logits of one storage type whose ids follow one another
  const bool streams_;  // the gradient goes past the caches
  Vec base_p_ = Vec{}, base_q_ = Vec{}, shift_ = Vec{};
  Vec mean_x_ = Vec{};  // sum q x, where the row is ordinary
  Vec value_ = Vec{}, second_ = Vec{};
  Int dead_ = Int{}, ordinary_ = Int{};
  Int far_ = Int{};       // ordinary rows that need no series
  Int counting_ = Int{};  // the other lanes decide nothing
  bool filtered_ = false;
  bool summed_ = false;       // the pulls, entry by entry
  bool consecutive_ = false;  // a full tile of consecutive rows
};

}  // namespace
}  // namespace dimo::cpu
