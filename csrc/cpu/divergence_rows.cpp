// Token-level f-divergence and its gradient on the CPU: the rows of one task, in SIMD. Compiled once an instruction set
// (DIMO_ISA); cpu/divergence.cpp chooses. From memory it reads every logit once (rows that fit the first-level cache)
// and writes every gradient once.
//
// Logits are converted to float, mixed (guidance) and put into buffers. A long row lies along the lanes of a register.
// Short rows, and rows whose vocabulary is strided, lie across them: one row a lane, so that no lane idles and nothing
// is summed over lanes. The sweeps over the buffers are the same for both.
#include <type_traits>

#include "common/divergences.h"
#include "common/rows.h"
#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int kBuffer = 4096;                // floats; five buffers stay in the second-level cache
constexpr int64_t kShortVocab = 8 * kLanes;  // up to here rows lie across the lanes

struct Buffers {
  alignas(64) float p[kBuffer];         // the teacher's logits, mixed
  alignas(64) float q[kBuffer];         // the auxiliary's
  alignas(64) float weight_p[kBuffer];  // their softmax, not yet normalised
  alignas(64) float weight_q[kBuffer];
  alignas(64) float other[kBuffer];  // unconditional logits, then the gradient
};

DIMO_INLINE Vec minus_infinity() { return VecMath::splat(-kInfinity); }

// --- between memory and buffers -------------------------------------------------------------------------------------

// The largest magnitude that does not round to infinity lies below this.
float overflow_bound(DType dtype) {
  if (dtype == DType::float16) return 65520.0f;
  return dtype == DType::bfloat16 ? 0x1.ffp127f : kInfinity;
}

void zero_row(const TokenDivergenceArgs& args, int64_t row) {
  const int64_t offset = row_offset(args.shape, args.gradient, row);
  with_type(args.gradient.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    zero_run(args.gradient.vocab_stride, args.shape.vocab, static_cast<T*>(args.gradient.data) + offset);
  });
}

float scale_of(const TokenDivergenceArgs& args, int64_t row) {
  return args.guidance != nullptr ? args.guidance[row / args.rows_per_sample] : args.guidance_scale;
}

float factor_of(const TokenDivergenceArgs& args, int64_t row) {
  return args.factor != nullptr ? args.factor[row * args.factor_stride] : 1.0f;
}

// One row along the lanes: a register holds kLanes consecutive ids.
struct Along {
  static constexpr int kRows = 1;
  static constexpr int64_t kCapacity = kBuffer;  // ids

  template <class T>
  static void read(const T* data, int64_t stride, const int64_t (&offsets)[kRows], int64_t begin, int64_t n,
                   float* to) {
    read_run(data + offsets[0] + begin * stride, stride, n, to);
  }
  template <class T>
  static void write(const float* from, int64_t stride, const int64_t (&offsets)[kRows], int, int64_t begin, int64_t n,
                    T* data) {
    write_run(from, stride, n, data + offsets[0] + begin * stride);
  }
  // Registers that hold n ids: those that are full, and all of them; the last one is padded.
  static int64_t full(int64_t n) { return n / kLanes; }
  static int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes; }

  static Vec max_over_row(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return VecMath::splat(lanes[0]);
  }
  static Vec sum_over_row(Vec x) {
    float lanes[kLanes];
    store(lanes, x);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return VecMath::splat(lanes[0]);
  }
};

// kLanes rows across the lanes: a register holds one id of each row.
struct Across {
  static constexpr int kRows = kLanes;
  static constexpr int64_t kCapacity = kBuffer / kLanes;

  static bool consecutive(const int64_t (&offsets)[kRows]) {
    for (int r = 1; r < kRows; ++r)
      if (offsets[r] != offsets[0] + r) return false;
    return true;
  }
  template <class T>
  static void read(const T* data, int64_t stride, const int64_t (&offsets)[kRows], int64_t begin, int64_t n,
                   float* to) {
    if (consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(to + i * kLanes, load(data + offsets[0] + (begin + i) * stride));
      return;
    }
    for (int r = 0; r < kRows; ++r) {
      const T* row = data + offsets[r] + begin * stride;
      for (int64_t i = 0; i < n; ++i) to[i * kLanes + r] = load_one(row + i * stride);
    }
  }
  template <class T>
  static void write(const float* from, int64_t stride, const int64_t (&offsets)[kRows], int rows, int64_t begin,
                    int64_t n, T* data) {
    if (rows == kRows && consecutive(offsets)) {
      for (int64_t i = 0; i < n; ++i) store(data + offsets[0] + (begin + i) * stride, load(from + i * kLanes));
      return;
    }
    for (int r = 0; r < rows; ++r) {
      T* row = data + offsets[r] + begin * stride;
      for (int64_t i = 0; i < n; ++i) store_one(row + i * stride, from[i * kLanes + r]);
    }
  }
  static int64_t full(int64_t n) { return n; }
  static int64_t padded(int64_t n) { return n; }
  static Vec max_over_row(Vec x) { return x; }
  static Vec sum_over_row(Vec x) { return x; }
};

// --- the sweeps -----------------------------------------------------------------------------------------------------

constexpr float kLog2e = 1.44269504f;

// softmax and log softmax of one side: exp2((z - top) * rate) / sum and (z - top) * inverse_temperature - log_sum.
struct Softmax {
  Vec top = minus_infinity(), sum = Vec{}, inverse_sum = Vec{}, log_sum = Vec{};
  float inverse_temperature, rate;

  explicit Softmax(float temperature) : inverse_temperature(1.0f / temperature), rate(kLog2e * inverse_temperature) {}

  DIMO_INLINE Vec weight(Vec z) const { return VecMath::exp2((z - top) * rate); }
  DIMO_INLINE Vec log_prob(Vec z) const { return (z - top) * inverse_temperature - log_sum; }

  // Raises the top; where every logit is -inf it becomes 0, so that no difference of infinities arises.
  DIMO_INLINE void raise(Vec higher) {
    const Vec usable = higher == -kInfinity ? Vec{} : higher;
    sum = top == -kInfinity ? sum : sum * VecMath::exp2((top - usable) * rate);
    top = usable;
  }

  DIMO_INLINE void finish(Vec row_sum) {
    sum = row_sum;
    inverse_sum = 1.0f / sum;
    log_sum = sum == 0.0f ? Vec{} : VecMath::log(sum);
  }
};

// kWhole: a row fits the buffers, so that it is read once and every weight is computed once.
template <class Layout, class Divergence, bool kWhole>
class Tile {
 public:
  Tile(const TokenDivergenceArgs& args, Buffers& buffers)
      : args_(args),
        divergence_(args.parameter),
        buffers_(buffers),
        teacher_softmax_(args.teacher_temperature),
        auxiliary_softmax_(args.auxiliary_temperature) {}

  // Rows that count: at most Layout::kRows of them.
  void run(const int64_t* rows, int count) {
    locate(rows, count);
    gather_statistics();
    if (args_.gradient.data != nullptr) sum_pull();
    write(rows, count);
  }

 private:
  using Offsets = int64_t[Layout::kRows];

  void locate(const int64_t* rows, int count) {
    for (int r = 0; r < Layout::kRows; ++r) {
      const int64_t row = rows[r < count ? r : 0];  // idle lanes repeat the first row
      teacher_[r] = row_offset(args_.shape, args_.teacher, row);
      if (args_.uncond.data != nullptr) uncond_[r] = row_offset(args_.shape, args_.uncond, row);
      auxiliary_[r] = row_offset(args_.shape, args_.auxiliary, row);
      if (args_.gradient.data != nullptr) gradient_[r] = row_offset(args_.shape, args_.gradient, row);
      set(scale_, r, scale_of(args_, row));
      set(factor_, r, factor_of(args_, row));
    }
  }

  static void set(Vec& v, int row, float x) {
    if constexpr (Layout::kRows == 1)
      v = VecMath::splat(x);
    else
      v[row] = x;
  }

  void read(const LogitRows& logits, const Offsets& offsets, int64_t begin, int64_t n, float* to) const {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Layout::read(static_cast<const T*>(logits.data), logits.vocab_stride, offsets, begin, n, to);
    });
    if constexpr (Layout::kRows == 1)
      for (int64_t i = n; i < Layout::padded(n) * kLanes; ++i) to[i] = -kInfinity;
  }

  // Fills the buffers with ids [begin, begin + n).
  void prepare(int64_t begin, int64_t n) const {
    read(args_.teacher, teacher_, begin, n, buffers_.p);
    read(args_.auxiliary, auxiliary_, begin, n, buffers_.q);
    if (args_.uncond.data == nullptr || (Layout::kRows == 1 && scale_[0] == 1.0f)) return;
    read(args_.uncond, uncond_, begin, n, buffers_.other);
    const Int unguided = scale_ == 1.0f;
    for (int64_t i = 0; i < Layout::padded(n) * kLanes; i += kLanes) {
      const Vec cond = load(buffers_.p + i), uncond = load(buffers_.other + i);
      const Int filtered = VecMath::min(cond, uncond) == -kInfinity;
      const Vec mixed = filtered ? minus_infinity() : uncond + scale_ * (cond - uncond);
      store(buffers_.p + i, unguided ? cond : mixed);
    }
  }

  // Calls visit(begin, n) for the chunks of the vocabulary, prepared.
  template <class Visit>
  void each_chunk(bool first_sweep, const Visit& visit) {
    for (int64_t begin = 0; begin < args_.shape.vocab; begin += Layout::kCapacity) {
      const int64_t rest = args_.shape.vocab - begin, n = rest < Layout::kCapacity ? rest : Layout::kCapacity;
      if (first_sweep || !kWhole) prepare(begin, n);
      visit(begin, n);
    }
  }

  void gather_statistics() {
    teacher_softmax_ = Softmax(args_.teacher_temperature);
    auxiliary_softmax_ = Softmax(args_.auxiliary_temperature);
    Vec least = VecMath::splat(kInfinity);
    each_chunk(true, [&](int64_t, int64_t n) {
      raise_tops(n, least);
      Vec sum_p = Vec{}, sum_q = Vec{};
      for (int64_t i = 0; i < Layout::padded(n) * kLanes; i += kLanes) {
        const Vec p = teacher_softmax_.weight(load(buffers_.p + i)),
                  q = auxiliary_softmax_.weight(load(buffers_.q + i));
        sum_p += p;
        sum_q += q;
        if constexpr (kWhole) {
          store(buffers_.weight_p + i, p);
          store(buffers_.weight_q + i, q);
        }
      }
      teacher_softmax_.sum += sum_p;
      auxiliary_softmax_.sum += sum_q;
    });
    filtered_ = any(least == -kInfinity) || args_.teacher_log_floor > -kInfinity;
    teacher_softmax_.finish(Layout::sum_over_row(teacher_softmax_.sum));
    auxiliary_softmax_.finish(Layout::sum_over_row(auxiliary_softmax_.sum));
    rate_difference_ = teacher_softmax_.inverse_temperature - auxiliary_softmax_.inverse_temperature;
    // log p - log q comes from the logits' difference, which is exact where they nearly agree; where the tops lie far
    // apart, from what is left above them.
    const Vec gap = (teacher_softmax_.top - auxiliary_softmax_.top) * auxiliary_softmax_.inverse_temperature;
    const Int near = VecMath::abs(gap) < kNearTops;
    base_p_ = near ? Vec{} : teacher_softmax_.top;
    base_q_ = near ? Vec{} : auxiliary_softmax_.top;
    shift_ = (near ? gap : Vec{}) + (teacher_softmax_.log_sum - auxiliary_softmax_.log_sum);
    dead_ = (teacher_softmax_.sum == 0.0f) | (auxiliary_softmax_.sum == 0.0f);
  }

  // Raises the tops to those of a chunk, `least` falls to the chunk's least logit.
  void raise_tops(int64_t n, Vec& least) {
    Vec top_p = minus_infinity(), top_q = minus_infinity();
    const int64_t full = Layout::full(n) * kLanes;
    for (int64_t i = 0; i < full; i += kLanes) {
      const Vec p = load(buffers_.p + i), q = load(buffers_.q + i);
      top_p = VecMath::max(p, top_p);
      top_q = VecMath::max(q, top_q);
      least = VecMath::min(VecMath::min(p, q), least);
    }
    if (full < Layout::padded(n) * kLanes) {
      top_p = VecMath::max(load(buffers_.p + full), top_p);
      top_q = VecMath::max(load(buffers_.q + full), top_q);
    }
    teacher_softmax_.raise(Layout::max_over_row(VecMath::max(top_p, teacher_softmax_.top)));
    auxiliary_softmax_.raise(Layout::max_over_row(VecMath::max(top_q, auxiliary_softmax_.top)));
  }

  // The terms of the register at i; only a filtered one may hold -inf.
  template <bool kFiltered>
  DIMO_INLINE Terms<Vec> terms(int64_t i, Vec& q) const {
    const Vec z_p = load(buffers_.p + i), z_q = load(buffers_.q + i);
    const Vec p = (kWhole ? load(buffers_.weight_p + i) : teacher_softmax_.weight(z_p)) * teacher_softmax_.inverse_sum;
    q = (kWhole ? load(buffers_.weight_q + i) : auxiliary_softmax_.weight(z_q)) * auxiliary_softmax_.inverse_sum;
    const Vec x = ((z_p - base_p_) - (z_q - base_q_)) * auxiliary_softmax_.inverse_temperature +
                  ((z_p - teacher_softmax_.top) * rate_difference_ - shift_);
    const Entry<Vec> entry = {p, q, teacher_softmax_.log_prob(z_p), auxiliary_softmax_.log_prob(z_q), x};
    if constexpr (kFiltered)
      return terms_at<VecMath>(divergence_, with_floor<VecMath>(entry, args_.teacher_log_floor));
    else
      return divergence_.terms(entry);
  }

  // Calls visit(filtered, i) for the registers of a chunk; `filtered` is a constant of its type.
  template <class Visit>
  DIMO_INLINE void each_register(int64_t n, const Visit& visit) const {
    const int64_t full = filtered_ ? 0 : Layout::full(n) * kLanes;
    for (int64_t i = 0; i < full; i += kLanes) visit(std::false_type{}, i);
    for (int64_t i = full; i < Layout::padded(n) * kLanes; i += kLanes) visit(std::true_type{}, i);
  }

  void sum_pull() {
    pull_ = Vec{};
    each_chunk(false, [&](int64_t, int64_t n) {
      Vec part = Vec{}, q;
      each_register(n, [&](auto filtered, int64_t i) { part += terms<decltype(filtered)::value>(i, q).pull; });
      pull_ += part;
    });
    pull_ = Layout::sum_over_row(pull_);
  }

  void write(const int64_t* rows, int count) {
    const bool wanted = args_.gradient.data != nullptr;
    const Vec scale = (args_.factor_in_gradient ? factor_ : VecMath::splat(1.0f)) / args_.auxiliary_temperature;
    const Vec bound = VecMath::splat(wanted ? overflow_bound(args_.gradient.dtype) : kInfinity);
    Vec value = Vec{}, second = Vec{};
    Int usable = ~Int{};
    each_chunk(false, [&](int64_t begin, int64_t n) {
      Vec part = Vec{}, second_part = Vec{};
      each_register(n, [&](auto filtered, int64_t i) {
        Vec q;
        const Terms<Vec> t = terms<decltype(filtered)::value>(i, q);
        part += t.value;
        if constexpr (Divergence::kTwoValues) second_part += t.second;
        if (wanted) {
          const Vec g = (t.pull - q * pull_) * scale;
          usable &= VecMath::abs(g) < bound;
          store(buffers_.other + i, g);
        }
      });
      value += part;
      second += second_part;
      if (wanted) store_gradient(begin, n, count);
    });
    finish(rows, count, Layout::sum_over_row(value), Layout::sum_over_row(second), usable);
  }

  void store_gradient(int64_t begin, int64_t n, int count) const {
    with_type(args_.gradient.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Layout::write(buffers_.other, args_.gradient.vocab_stride, gradient_, count, begin, n,
                    static_cast<T*>(args_.gradient.data));
    });
  }

  void finish(const int64_t* rows, int count, Vec value, Vec second, Int usable) const {
    for (int r = 0; r < count; ++r) {
      const bool dead = dead_[r] != 0;
      const float divergence = dead ? 0.0f : divergence_.combine(value[r], second[r]);
      args_.value[rows[r]] = divergence * factor_[r];
      if (args_.gradient.data == nullptr) continue;
      const bool lost = (Layout::kRows == 1 ? any(~usable) : usable[r] == 0) || divergence != divergence;
      if (dead || lost) zero_row(args_, rows[r]);
      if (lost && !dead) __atomic_fetch_add(args_.zeroed, int64_t{1}, __ATOMIC_RELAXED);
    }
  }

  static bool any(Int mask) {
    int32_t found = 0;
    for (int i = 0; i < kLanes; ++i) found |= mask[i];
    return found != 0;
  }

  const TokenDivergenceArgs& args_;
  const Divergence divergence_;
  Buffers& buffers_;
  Offsets teacher_ = {}, uncond_ = {}, auxiliary_ = {}, gradient_ = {};
  Vec scale_ = Vec{}, factor_ = Vec{}, pull_ = Vec{};
  Softmax teacher_softmax_, auxiliary_softmax_;
  float rate_difference_ = 0.0f;
  Vec base_p_ = Vec{}, base_q_ = Vec{}, shift_ = Vec{};
  Int dead_ = Int{};
  bool filtered_ = false;
};

// --- rows -----------------------------------------------------------------------------------------------------------

template <class Layout, class Divergence, bool kWhole>
void run_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  Buffers buffers;
  Tile<Layout, Divergence, kWhole> tile(args, buffers);
  int64_t counted[Layout::kRows];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if ((args.mask != nullptr && !args.mask[row]) || factor_of(args, row) == 0.0f) {
      args.value[row] = 0.0f;
      if (args.gradient.data != nullptr) zero_row(args, row);
      continue;
    }
    counted[count++] = row;
    if (count == Layout::kRows) {
      tile.run(counted, count);
      count = 0;
    }
  }
  if (count > 0) tile.run(counted, count);
}

template <class Layout, class Divergence>
void run_width(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  const bool whole = args.shape.vocab <= Layout::kCapacity;
  return whole ? run_rows<Layout, Divergence, true>(args, begin, end)
               : run_rows<Layout, Divergence, false>(args, begin, end);
}

template <class Divergence>
void run_layout(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  const bool strided = args.teacher.vocab_stride != 1 && args.auxiliary.vocab_stride != 1;
  const bool across = strided || args.shape.vocab <= kShortVocab;
  return across ? run_width<Across, Divergence>(args, begin, end) : run_width<Along, Divergence>(args, begin, end);
}

}  // namespace

void DIMO_ISA::token_divergence_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end) {
  with_divergence<VecMath>(args.kind,
                           [&](auto divergence) { run_layout<typename decltype(divergence)::type>(args, begin, end); });
}

}  // namespace dimo::cpu
