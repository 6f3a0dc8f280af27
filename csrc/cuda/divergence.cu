// Token-level f-divergence and its gradient in one launch. From memory it reads every logit once and writes every
// gradient once: a row lives in the registers of the threads that share it, lanes of a warp, a block or a cluster of
// blocks, as the vocabulary asks. Rows that do not count are not read: zeros are written.
//
// Ordinary rows take the fast path, whose results tell whether the row was ordinary. Those with -inf, a floor, tops far
// apart or a gradient that the dtype cannot hold are done once more by GeneralRow, which reads memory once a sweep, as
// do rows that 16-byte loads or registers cannot serve.
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "common/divergences.h"
#include "common/scalar_math.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {

template <class D>
int launch_divergence(const TokenDivergenceArgs& args, void* stream);

#if !defined(DIMO_DISPATCH)

namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

// One row, or a block's slice of it, and what its token has of its own.
struct Token {
  int64_t row;
  int begin, size;
  float scale;   // of guidance
  float factor;  // 0 where the token does not count
};

__device__ bool is_guided(const TokenDivergenceArgs& args, const Token& token) {
  return args.uncond.data != nullptr && token.scale != 1.0f;
}

__device__ float factor_of(const TokenDivergenceArgs& args, int64_t row) {
  return args.factor != nullptr ? args.factor[row * args.factor_stride] : 1.0f;
}

// 0 for rows that the mask leaves out, and behind the last.
__device__ unsigned mask_bits(const TokenDivergenceArgs& args, int64_t row) {
  if (row >= args.shape.rows) return 0;
  return args.mask != nullptr ? load_8_bits(args.mask + row) : 1;
}

__device__ float scale_of(const TokenDivergenceArgs& args, int64_t row) {
  return args.guidance != nullptr ? args.guidance[quotient(row, args.rows_per_sample)] : args.guidance_scale;
}

// Where the token's slice begins in each of the tensors; those that are not given have strides too.
template <int kTensors>
__device__ void first_elements(const TokenDivergenceArgs& args, int64_t row, int begin,
                               const LogitRows* const (&tensors)[kTensors], int64_t (&first)[kTensors]) {
  row_offsets(args.shape, row, tensors, first);
#pragma unroll
  for (int t = 0; t < kTensors; ++t) first[t] += begin * tensors[t]->vocab_stride;
}

__device__ int64_t first_gradient(const TokenDivergenceArgs& args, int64_t row, int begin) {
  int64_t first[1];
  first_elements(args, row, begin, {&args.gradient}, first);
  return first[0];
}

__device__ int misalignment(const LogitRows& logits, int64_t element) {
  const auto address = static_cast<unsigned>(reinterpret_cast<uintptr_t>(address_of(logits, element)));
  return static_cast<int>((address >> log2_bytes_of(logits.dtype)) % kPack);
}

__device__ bool starts_cell(const LogitRows& logits, int64_t element) {
  return logits.vocab_stride == 1 && reinterpret_cast<uintptr_t>(address_of(logits, element)) % 16 == 0;
}

template <int kLanes>
__device__ void write_zeros(const LogitRows& to, int64_t first, const Token& token, const Team<kLanes>& team) {
  if (kLanes == 0 && to.vocab_stride == 1) {
    const Split split(token.size, misalignment(to, first), 1 << 20, kPack);
    const float zeros[kPack] = {};
    for (int i = team.rank(); i < split.packs; i += team.size()) store_pack(to, first + split.pack(i), zeros);
    for (int i = split.single(team.rank()); i < token.size; i = token.size) store_element(to, first + i, 0.0f);
  } else {
    for (int i = team.rank(); i < token.size; i += team.size()) store_element(to, first + i * to.vocab_stride, 0.0f);
  }
}

// --- any row ------------------------------------------------------------------------------------------------------

// softmax and log softmax of one side.
struct Softmax {
  float top, inverse_temperature, inverse_sum, log_sum;
  bool dead;  // without a finite logit

  // Where every logit is -inf the top becomes 0, so that no difference of infinities arises.
  __device__ Softmax(float top, float temperature)
      : top(top == -kInfinity ? 0.0f : top), inverse_temperature(1.0f / temperature) {}
  __device__ void normalise(float sum) {
    dead = sum == 0.0f;
    inverse_sum = 1.0f / sum;
    log_sum = dead ? 0.0f : logf(sum);
  }
  __device__ float weight(float z) const { return expf((z - top) * inverse_temperature); }
  __device__ float log_prob(float z) const { return (z - top) * inverse_temperature - log_sum; }
};

// Every sweep reads the row from global memory. The gradient goes to `span`, without gaps, where that is given.
template <class Divergence, int kLanes>
class GeneralRow {
 public:
  __device__ GeneralRow(const TokenDivergenceArgs& args, const Token& token, Team<kLanes>& team, void* span)
      : args_(args), token_(token), team_(team), divergence_(args.parameter) {
    first_elements(args, token.row, token.begin, {&args.teacher, &args.uncond, &args.auxiliary, &args.gradient},
                   first_);
    if (span != nullptr) first_[3] = 0;
    gradient_ = span != nullptr ? span : args.gradient.data;
    gradient_stride_ = span != nullptr ? 1 : args.gradient.vocab_stride;
  }

  __device__ void run() {
    const bool wanted = args_.gradient.data != nullptr;
    float tops[] = {-kInfinity, -kInfinity, kInfinity};
    each([&](int, float z_p, float z_q) {
      tops[0] = fmaxf(tops[0], z_p);
      tops[1] = fmaxf(tops[1], z_q);
      tops[2] = fminf(tops[2], fminf(z_p, z_q));
    });
    team_.template fold_all<Fold::max, Fold::max, Fold::min>(tops);
    Softmax teacher(tops[0], args_.teacher_temperature), auxiliary(tops[1], args_.auxiliary_temperature);
    const bool filtered = tops[2] == -kInfinity || args_.teacher_log_floor > -kInfinity;
    float sums[] = {0.0f, 0.0f};
    each([&](int, float z_p, float z_q) {
      sums[0] += teacher.weight(z_p);
      sums[1] += auxiliary.weight(z_q);
    });
    team_.template fold_all<Fold::sum, Fold::sum>(sums);
    teacher.normalise(sums[0]);
    auxiliary.normalise(sums[1]);
    // log p - log q comes from the logits' difference, which is exact where they nearly agree; where the tops lie far
    // apart, from what is left above them.
    const float gap = (teacher.top - auxiliary.top) * auxiliary.inverse_temperature;
    const bool near = fabsf(gap) < kNearTops;
    const float base_p = near ? 0.0f : teacher.top, base_q = near ? 0.0f : auxiliary.top;
    const float shift = (near ? gap : 0.0f) + (teacher.log_sum - auxiliary.log_sum);
    const float rate = teacher.inverse_temperature - auxiliary.inverse_temperature;
    float q = 0.0f;
    const auto terms = [&](float z_p, float z_q) {
      q = auxiliary.weight(z_q) * auxiliary.inverse_sum;
      const float x =
          ((z_p - base_p) - (z_q - base_q)) * auxiliary.inverse_temperature + ((z_p - teacher.top) * rate - shift);
      const Entry<float> entry = {teacher.weight(z_p) * teacher.inverse_sum, q, teacher.log_prob(z_p),
                                  auxiliary.log_prob(z_q), x};
      if (filtered) return terms_at<ScalarMath>(divergence_, with_floor<ScalarMath>(entry, args_.teacher_log_floor));
      return divergence_.terms(entry);
    };

    float pull[] = {0.0f};
    if (wanted) {
      each([&](int, float z_p, float z_q) { pull[0] += terms(z_p, z_q).pull; });
      team_.template fold_all<Fold::sum>(pull);
    }
    const float scale = (args_.factor_in_gradient ? token_.factor : 1.0f) * auxiliary.inverse_temperature;
    const float bound = overflow_bound(args_.gradient.dtype);
    float sums_of_terms[] = {0.0f, 0.0f, 1.0f};
    each([&](int i, float z_p, float z_q) {
      const Terms<float> t = terms(z_p, z_q);
      sums_of_terms[0] += t.value;
      sums_of_terms[1] += t.second;
      const float gradient = (t.pull - q * pull[0]) * scale;
      if (!(fabsf(gradient) < bound)) sums_of_terms[2] = 0.0f;
      if (wanted) store(i, gradient);
    });
    team_.template fold_all<Fold::sum, Fold::sum, Fold::min>(sums_of_terms);
    const bool dead = teacher.dead || auxiliary.dead;
    const float value = dead ? 0.0f : divergence_.combine(sums_of_terms[0], sums_of_terms[1]);
    const bool lost = !dead && (sums_of_terms[2] == 0.0f || value != value);
    if (token_.begin == 0 && team_.rank() == 0) {
      args_.value[token_.row] = value * token_.factor;
      if (wanted && lost) atomicAdd(reinterpret_cast<unsigned long long*>(args_.zeroed), 1ull);
    }
    if (!wanted || !(dead || lost)) return;
    each_index([&](int i) { store(i, 0.0f); });
  }

 private:
  template <class Visit>
  __device__ void each_index(const Visit& visit) const {
    for (int i = team_.rank(); i < token_.size; i += team_.size()) visit(i);
  }

  // Calls visit(index, z_p, z_q) for the entries of this thread.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    each_index([&](int i) {
      float z_p = load_element(args_.teacher, first_[0] + i * args_.teacher.vocab_stride);
      if (is_guided(args_, token_)) {  // uncond + s (cond - uncond); -inf on either side gives -inf
        const float uncond = load_element(args_.uncond, first_[1] + i * args_.uncond.vocab_stride);
        const bool filtered = z_p == -kInfinity || uncond == -kInfinity;
        z_p = filtered ? -kInfinity : uncond + token_.scale * (z_p - uncond);
      }
      visit(i, z_p, load_element(args_.auxiliary, first_[2] + i * args_.auxiliary.vocab_stride));
    });
  }

  __device__ void store(int i, float x) const {
    store_element(args_.gradient.dtype, gradient_, first_[3] + i * gradient_stride_, x);
  }

  const TokenDivergenceArgs& args_;
  const Token& token_;
  Team<kLanes>& team_;
  const Divergence divergence_;
  int64_t first_[4], gradient_stride_;
  void* gradient_;
};

template <class Divergence, int kLanes>
__device__ Team<kLanes> general_row(const TokenDivergenceArgs& args, Token token, Team<kLanes> team,
                                    void* span = nullptr) {
  // By value: what is passed by reference must lie in memory.
  GeneralRow<Divergence, kLanes>(args, token, team, span).run();
  return team;
}

// --- ordinary rows ------------------------------------------------------------------------------------------------

// What the temperatures make of logits: z / temperature, and that in base 2.
struct Rates {
  float p, q, difference, base_2_p, base_2_q;

  explicit Rates(const TokenDivergenceArgs& args)
      : p(1.0f / args.teacher_temperature),
        q(1.0f / args.auxiliary_temperature),
        difference(p - q),
        base_2_p(p * kLog2E),
        base_2_q(q * kLog2E) {}
};

// From this reverse KL on, in nats, nothing cancels in sums of p log(p/q).
constexpr float kFarApart = 0.05f;

// What the threads of a row agree upon before the terms are summed.
struct Agreed {
  float top_p, top_q, log2_sum_p, log2_sum_q;
  float shift;   // log p - log q = (z_p - z_q) q + (z_p - top_p) difference - shift, with the rates' names
  float mean_x;  // sum q (log p - log q)
};

// kHeld numbers of either side; each(visit) calls visit(slot) for those slots that hold an entry of the row.
template <class Divergence, int kLanes, int kHeld>
class FastRow {
 public:
  float z_p[kHeld], z_q[kHeld];

  // Whether the row is ordinary so far. One exchange between warps: each brings its tops, and sums relative to them.
  template <class Each>
  __device__ bool agree(const Rates& rates, Team<kLanes>& team, const Each& each) {
    constexpr int kFirst = Team<kLanes>::kFirst;
    float top_p = -kInfinity, top_q = -kInfinity, sum_p = 0.0f, sum_q = 0.0f, moment = 0.0f;
    each([&](int s) {
      top_p = fmaxf(top_p, z_p[s]);
      top_q = fmaxf(top_q, z_q[s]);
    });
    top_p = finite_top(fold_lanes<kFirst>(Fold::max, top_p));
    top_q = finite_top(fold_lanes<kFirst>(Fold::max, top_q));
    each([&](int s) {
      const float weight_q = exp2_fast((z_q[s] - top_q) * rates.base_2_q);
      sum_p += exp2_fast((z_p[s] - top_p) * rates.base_2_p);
      sum_q += weight_q;
      moment += weight_q * (z_p[s] - z_q[s]);  // not finite where a logit is not
    });
    sum_p = fold_lanes<kFirst>(Fold::sum, sum_p);
    sum_q = fold_lanes<kFirst>(Fold::sum, sum_q);
    moment = fold_lanes<kFirst>(Fold::sum, moment);
    if constexpr (kLanes == 0) {
      if (team.entries() > 1) {
        const float* board = team.share({top_p, top_q, sum_p, sum_q, moment});
        const int entries = team.entries(), lane = threadIdx.x % kWarp;
        top_p = top_q = -kInfinity;
#pragma unroll 1
        for (int i = lane; i < entries; i += kWarp) {
          top_p = fmaxf(top_p, board[i]);
          top_q = fmaxf(top_q, board[entries + i]);
        }
        top_p = fold_lanes<kWarp>(Fold::max, top_p);
        top_q = fold_lanes<kWarp>(Fold::max, top_q);
        sum_p = sum_q = moment = 0.0f;
#pragma unroll 1
        for (int i = lane; i < entries; i += kWarp) {
          const float scale_q = exp2_fast((board[entries + i] - top_q) * rates.base_2_q);
          sum_p += board[2 * entries + i] * exp2_fast((board[i] - top_p) * rates.base_2_p);
          sum_q += board[3 * entries + i] * scale_q;
          moment += board[4 * entries + i] * scale_q;
        }
        sum_p = fold_lanes<kWarp>(Fold::sum, sum_p);
        sum_q = fold_lanes<kWarp>(Fold::sum, sum_q);
        moment = fold_lanes<kWarp>(Fold::sum, moment);
      }
    }
    a_.top_p = top_p;
    a_.top_q = top_q;
    a_.log2_sum_p = log2f(sum_p);
    a_.log2_sum_q = log2f(sum_q);
    const float gap = (top_p - top_q) * rates.q;
    a_.shift = gap + (a_.log2_sum_p - a_.log2_sum_q) * kLn2;
    a_.mean_x = __fdividef(moment, sum_q) * rates.q - a_.shift;
    return fabsf(gap) < kNearTops && fabsf(moment) < kInfinity;
  }

  // Calls take(slot, gradient); whether the row was ordinary and its value.
  template <class Each, class Take>
  __device__ bool finish(const TokenDivergenceArgs& args, const Rates& rates, Team<kLanes>& team, const Each& each,
                         float factor, const Take& take, float& value) {
    const Divergence divergence(args.parameter);
    const bool wanted = args.gradient.data != nullptr;
    forget_sweep();
    float pull = 0.0f;
    if (wanted) {
      if constexpr (Divergence::kPullFromMean) {
        if (rates.difference != 0.0f) return false;
        pull = divergence.pull_from_mean(a_.mean_x);
      } else {
        float sum[] = {0.0f};
        each([&](int s) { sum[0] += divergence.terms(entry(rates, s)).pull; });
        team.template fold_all<Fold::sum>(sum);
        pull = sum[0];
        forget_sweep();
      }
      if (!(fabsf(pull) < kInfinity)) return false;
    }
    const float scale = (args.factor_in_gradient ? factor : 1.0f) * rates.q;
    float sums[] = {0.0f, 0.0f, 0.0f};  // of the terms; the largest gradient
    const auto add = [&](int s, const Entry<float>& e, const Terms<float>& t) {
      sums[0] += t.value;
      sums[1] += t.second;
      const float gradient = (t.pull - e.q * pull) * scale;
      sums[2] = fmaxf(sums[2], fabsf(gradient));
      take(s, gradient);
    };
    bool far = false;
    if constexpr (Divergence::kPullFromMean) far = -a_.mean_x > kFarApart;
    if (far) {
      if constexpr (Divergence::kPullFromMean) {
        each([&](int s) {
          const Entry<float> e = entry(rates, s);
          add(s, e, divergence.plain_terms(e));
        });
      }
    } else {
      each([&](int s) {
        const Entry<float> e = entry(rates, s);
        add(s, e, divergence.terms(e));
      });
    }
    float results[] = {divergence.combine(sums[0], sums[1]), sums[2]};
    team.template fold_all<Fold::sum, Fold::max>(results);
    value = results[0];
    return fabsf(value) < kInfinity && (!wanted || results[1] < overflow_bound(args.gradient.dtype));
  }

 private:
  __device__ void forget_sweep() {
#pragma unroll
    for (int s = 0; s < kHeld; ++s) forget(z_q[s]);
  }

  __device__ static float finite_top(float top) { return top == -kInfinity ? 0.0f : top; }

  __device__ Entry<float> entry(const Rates& rates, int s) const {
    const float above_p = z_p[s] - a_.top_p, above_q = z_q[s] - a_.top_q;
    const float log2_p = above_p * rates.base_2_p - a_.log2_sum_p;
    const float log2_q = above_q * rates.base_2_q - a_.log2_sum_q;
    const float x = (z_p[s] - z_q[s]) * rates.q + (above_p * rates.difference - a_.shift);
    return {exp2_fast(log2_p), exp2_fast(log2_q), log2_p * kLn2, log2_q * kLn2, x};
  }

  Agreed a_;
};

// Whether any token of this call can take the fast path.
__device__ bool may_be_fast(const TokenDivergenceArgs& args) { return !(args.teacher_log_floor > -kInfinity); }

__device__ void write_value(const TokenDivergenceArgs& args, const Token& token, float value) {
  args.value[token.row] = value * token.factor;
}

// --- lanes a row --------------------------------------------------------------------------------------------------

constexpr int kLanesBlock = 128;

// Bytes of shared memory that a block needs for its rows of one tensor.
__host__ __device__ inline int span_bytes(const LogitRows& logits, int rows, int64_t vocab) {
  return logits.data == nullptr ? 0 : (rows * static_cast<int>(vocab) * 2 * cells_of(logits.dtype) + 15) / 16 * 16;
}

// kLanes neighbours share a row and take its elements in turn. Where rows follow one another without gaps, the block
// moves all of its rows through shared memory at once, those too that do not count.
template <class Divergence, int kLanes, int kHeld>
class Lanes {
 public:
  static constexpr int kRows = kLanesBlock / kLanes;

  __device__ Lanes(const TokenDivergenceArgs& args, const Rates& rates, bool dense, char* shared)
      : args_(args), rates_(rates), dense_(dense), shared_(shared), size_(static_cast<int>(args.shape.vocab)) {}

  __device__ void run() {
    const int64_t block_row = static_cast<int64_t>(blockIdx.x) * kRows, row = block_row + threadIdx.x / kLanes;
    const int rows = static_cast<int>(min(static_cast<int64_t>(kRows), args_.shape.rows - block_row));
    if (dense_) {
      char* to = shared_;
      for (const LogitRows* logits : {&args_.teacher, &args_.auxiliary, &args_.uncond}) {
        if (logits->data == nullptr) continue;
        const int bytes = (rows * size_) << log2_bytes_of(logits->dtype);
        const char* const from = address_of(*logits, block_row * size_);
        for (int i = threadIdx.x * 16; i + 16 <= bytes; i += kLanesBlock * 16)
          copy_async(reinterpret_cast<uint4*>(to + i), from + i);
        for (int i = bytes / 16 * 16 + threadIdx.x * 2; i < bytes; i += kLanesBlock * 2)
          *reinterpret_cast<unsigned short*>(to + i) = *reinterpret_cast<const unsigned short*>(from + i);
        to += span_bytes(*logits, kRows, size_);
      }
      wait_for_copies();
      __syncthreads();
    }
    if (row < args_.shape.rows)
      work({row, 0, size_, scale_of(args_, row), mask_bits(args_, row) != 0 ? factor_of(args_, row) : 0.0f});
    if (!dense_ || args_.gradient.data == nullptr) return;
    __syncthreads();
    char* const to =
        static_cast<char*>(args_.gradient.data) + (block_row * size_ << log2_bytes_of(args_.gradient.dtype));
    const char* const from = gradient_span();
    const int bytes = (rows * size_) << log2_bytes_of(args_.gradient.dtype);
    for (int i = threadIdx.x * 16; i + 16 <= bytes; i += kLanesBlock * 16)
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(from + i);
    for (int i = bytes / 16 * 16 + threadIdx.x * 2; i < bytes; i += kLanesBlock * 2)
      *reinterpret_cast<unsigned short*>(to + i) = *reinterpret_cast<const unsigned short*>(from + i);
  }

 private:
  __device__ void work(const Token& token) {
    first_elements(args_, token.row, 0, {&args_.teacher, &args_.auxiliary, &args_.uncond, &args_.gradient}, first_);
    float value = 0.0f;
    bool ordinary = true;
    if (token.factor == 0.0f) {
      each([&](int s) { fast_.z_q[s] = 0.0f; });
    } else {
      const char* span = shared_;
      read(args_.teacher, first_[0], span, [&](int s, float z) { fast_.z_p[s] = z; });
      read(args_.auxiliary, first_[1], span, [&](int s, float z) { fast_.z_q[s] = z; });
      if (is_guided(args_, token))
        read(args_.uncond, first_[2], span,
             [&](int s, float z) { fast_.z_p[s] = z + token.scale * (fast_.z_p[s] - z); });
      const auto all = [&](const auto& visit) { each(visit); };
      ordinary = may_be_fast(args_) && fast_.agree(rates_, team_, all);
      const auto take = [&](int s, float gradient) { fast_.z_q[s] = gradient; };
      if (ordinary) ordinary = fast_.finish(args_, rates_, team_, all, token.factor, take, value);
    }
    if (!ordinary) {
      const int row_bytes = size_ << log2_bytes_of(args_.gradient.dtype);
      general_row<Divergence, kLanes>(args_, token, team_,
                                      dense_ ? gradient_span() + threadIdx.x / kLanes * row_bytes : nullptr);
      return;
    }
    if (team_.rank() == 0) write_value(args_, token, value);
    if (args_.gradient.data != nullptr) write();
  }

  // Calls visit(slot) for the slots that hold an entry.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
#pragma unroll
    for (int s = 0; s < kHeld; ++s) {
      if (s * kLanes >= size_) break;
      if (s * kLanes + team_.rank() < size_) visit(s);
    }
  }

  template <class Take>
  __device__ void read(const LogitRows& logits, int64_t first, const char*& span, const Take& take) const {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (dense_) {
        const T* const from = reinterpret_cast<const T*>(span) + in_span();
        each([&](int s) { take(s, to_float(from[s * kLanes])); });
      } else {
        const T* const from = static_cast<const T*>(logits.data) + first + team_.rank() * logits.vocab_stride;
        each([&](int s) { take(s, to_float(from[s * kLanes * logits.vocab_stride])); });
      }
    });
    span += span_bytes(logits, kRows, size_);
  }

  __device__ void write() const {
    with_type(args_.gradient.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (dense_) {
        T* const to = reinterpret_cast<T*>(gradient_span()) + in_span();
        each([&](int s) { to[s * kLanes] = from_float<T>(fast_.z_q[s]); });
      } else {
        const int64_t stride = args_.gradient.vocab_stride;
        T* const to = static_cast<T*>(args_.gradient.data) + first_[3] + team_.rank() * stride;
        each([&](int s) { to[s * kLanes * stride] = from_float<T>(fast_.z_q[s]); });
      }
    });
  }

  __device__ int in_span() const { return threadIdx.x / kLanes * size_ + team_.rank(); }

  // Behind the inputs' spans.
  __device__ char* gradient_span() const {
    char* span = shared_;
    for (const LogitRows* logits : {&args_.teacher, &args_.auxiliary, &args_.uncond})
      span += span_bytes(*logits, kRows, size_);
    return span;
  }

  const TokenDivergenceArgs& args_;
  const Rates& rates_;
  const bool dense_;
  char* const shared_;
  const int size_;
  Team<kLanes> team_{nullptr};
  FastRow<Divergence, kLanes, kHeld> fast_;
  int64_t first_[4];
};

template <class Divergence, int kLanes, int kHeld>
__global__ __launch_bounds__(kLanesBlock) void lanes_kernel(const __grid_constant__ TokenDivergenceArgs args,
                                                            const __grid_constant__ Rates rates, bool dense) {
  Lanes<Divergence, kLanes, kHeld>(args, rates, dense, shared_memory<char>()).run();
}

// --- a block or a cluster a row -----------------------------------------------------------------------------------

constexpr int kMostThreads = 512, kMostBlocks = 16;  // a block, a cluster
constexpr int64_t kMostRows = 1 << 30;               // of a long vocabulary: no GPU holds more

// Blocks go from row to row. While one is worked on, the packs of the next are on their way to shared memory.
template <class Divergence, int kPacks>
class Block {
 public:
  __device__ Block(const TokenDivergenceArgs& args, const Rates& rates, int slice, char* shared)
      : args_(args), rates_(rates), team_(shared), rank_(team_.rank()), threads_(team_.size()) {
    mailbox_ = reinterpret_cast<Mailbox*>(shared + Team<0>::scratch_bytes(team_.entries()));
    ticket_ = reinterpret_cast<int*>(mailbox_ + 1);
    cells_ = reinterpret_cast<uint4*>(mailbox_ + 2);
    if (kHasMailbox) {
      if (rank_ == 0) mailbox_->open();
      __syncthreads();
    }
    begin_ = min(static_cast<int64_t>(cluster_rank()) * slice, args.shape.vocab);
    size_ = min(static_cast<int64_t>(slice), args.shape.vocab - begin_);
  }

  __device__ void run() {
    // Begins with a turn that only fetches.
    const int rows = static_cast<int>(args_.shape.rows), step = gridDim.x / cluster_size();
    int row = -1, next = blockIdx.x / cluster_size(), later = next + step;
    bool counts = false, next_counts = mask_bits(args_, next) != 0;
    while (row < rows) {
      // What is derived from these does not stay in registers from row to row.
      forget(rank_);
      forget(threads_);
      const unsigned later_mask = mask_bits(args_, later);
      const int last = request(later, step);
      const Split split = split_;
      const bool sent = sent_;
      const Token token = {row, begin_, size_, counts ? scale_of(args_, row) : 1.0f,
                           counts ? factor_of(args_, row) : 0.0f};
      if (counts && sent) {
        take_cells(token, split);
        team_.sync();  // all cells are free
      }
      if (next_counts) fetch(next);
      if (row >= 0) {
        const int64_t first = args_.gradient.data != nullptr ? first_gradient(args_, row, begin_) : 0;
        if (token.factor == 0.0f)
          skip(token, first);
        else if (!(sent && work(token, split, first)))
          team_ = general_row<Divergence, 0>(args_, token, team_);
      }
      row = next;
      next = later;
      later = receive(last);
      counts = next_counts;
      next_counts = later_mask != 0;
    }
    if (cluster_size() > 1) cluster_sync();  // no block leaves while others write to its shared memory
  }

 private:
  __device__ void skip(const Token& token, int64_t first) {
    if (begin_ == 0 && rank_ == 0) args_.value[token.row] = 0.0f;
    if (args_.gradient.data != nullptr) write_zeros(args_.gradient, first, token, team_);
  }

  // Whether the row was an ordinary one.
  __device__ bool work(const Token& token, const Split& split, int64_t first) {
    const auto each = [&](const auto& visit) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (rank_ + k * threads_ < split.packs) {
#pragma unroll
          for (int i = 0; i < kPack; ++i) visit(k * kPack + i);
        }
      }
      if (split.single(rank_) < size_) visit(kPacks * kPack);
    };
    if (!fast_.agree(rates_, team_, each)) return false;
    const LogitRows& to = args_.gradient;
    const bool whole = to.data != nullptr && starts_cell(to, first + split.head);
    float pack[kPack], value = 0.0f;
    const auto take = [&](int s, float gradient) {
      if (s == kPacks * kPack) {
        if (to.data != nullptr) store_element(to, first + split.single(rank_) * to.vocab_stride, gradient);
        return;
      }
      pack[s % kPack] = gradient;
      if (s % kPack != kPack - 1 || to.data == nullptr) return;
      const int begin = split.pack(rank_ + s / kPack * threads_);
      if (whole) return store_pack(to, first + begin, pack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) store_element(to, first + (begin + i) * to.vocab_stride, pack[i]);
    };
    if (!fast_.finish(args_, rates_, team_, each, token.factor, take, value)) return false;
    if (begin_ == 0 && rank_ == 0) write_value(args_, token, value);
    return true;
  }

  // Rows that do not count make blocks unequally fast: then a counter in memory hands out rows. The first thread asks
  // for one early, and all get it late.
  __device__ int request(int row, int step) const {
    if (args_.ticket == nullptr) return row + step;
    return rank_ == 0 ? 2 * step + atomicAdd(args_.ticket, 1) : 0;
  }

  __device__ int receive(int row) {
    if (args_.ticket == nullptr) return row;
    if (threads_ == kWarp) return __shfl_sync(0xffffffffu, row, 0);
    if (rank_ == 0) *ticket_ = row;
    __syncthreads();
    row = *ticket_;
    __syncthreads();
    return row;
  }

  // Sends for a row that counts.
  __device__ void fetch(int row) {
    int64_t first[3];
    first_elements(args_, row, begin_, {&args_.teacher, &args_.auxiliary, &args_.uncond}, first);
    const bool guided = args_.uncond.data != nullptr;
    split_ = Split(size_, misalignment(args_.auxiliary, first[1]), threads_, kPacks);
    sent_ = may_be_fast(args_) && starts_cell(args_.auxiliary, first[1] + split_.head) &&
            starts_cell(args_.teacher, first[0] + split_.head) &&
            (!guided || starts_cell(args_.uncond, first[2] + split_.head)) && size_ - kPack * split_.packs <= threads_;
    if (!sent_) return;
    if (kHasMailbox && rank_ == 0) {
      const int cells = cells_of(args_.teacher.dtype) + cells_of(args_.auxiliary.dtype);
      mailbox_->expect((cells + (guided ? cells_of(args_.uncond.dtype) : 0)) * 16 * split_.packs);
    }
    uint4* cells = cells_;
    send(cells, args_.teacher, first[0]);
    send(cells, args_.auxiliary, first[1]);
    if (guided) send(cells, args_.uncond, first[2]);
  }

  __device__ void send(uint4*& cells, const LogitRows& logits, int64_t first) const {
    const int per_pack = cells_of(logits.dtype);
    if (kHasMailbox) {
      if (rank_ == 0 && split_.packs > 0)
        mailbox_->copy(cells, address_of(logits, first + split_.head), per_pack * 16 * split_.packs);
    } else {
      const char* const from = address_of(logits, first + split_.head);
      for (int pack = rank_; pack < split_.packs; pack += threads_)
        for (int c = pack * per_pack; c < (pack + 1) * per_pack; ++c) copy_async(cells + c, from + c * 16);
    }
    cells += kPacks * per_pack * threads_;
  }

  // Calls take(pack, numbers) for the packs of this thread, also those that the row does not have.
  template <class Take>
  __device__ void take_packs(const uint4*& cells, DType dtype, const Take& take) const {
    with_type(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      constexpr int kCells = sizeof(T) / 2;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        float numbers[kPack];
        unpack<T>(cells + (rank_ + k * threads_) * kCells, numbers);
        take(k, numbers);
      }
      cells += kPacks * kCells * threads_;
    });
  }

  __device__ void take_cells(const Token& token, const Split& split) {
    unsigned single[3] = {};
    if (split.single(rank_) < size_) {  // in the cache, beside the packs
      int64_t first[3];
      first_elements(args_, token.row, begin_, {&args_.teacher, &args_.auxiliary, &args_.uncond}, first);
      single[0] = load_bits(args_.teacher, first[0] + split.single(rank_));
      single[1] = load_bits(args_.auxiliary, first[1] + split.single(rank_));
      if (args_.uncond.data != nullptr) single[2] = load_bits(args_.uncond, first[2] + split.single(rank_));
    }
    if (kHasMailbox) {
      mailbox_->wait(phase_);
      phase_ ^= 1;
    } else {
      wait_for_copies();
    }
    const uint4* cells = cells_;
    take_packs(cells, args_.teacher.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) fast_.z_p[k * kPack + i] = numbers[i];
    });
    take_packs(cells, args_.auxiliary.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) fast_.z_q[k * kPack + i] = numbers[i];
    });
    fast_.z_p[kPacks * kPack] = from_bits(args_.teacher.dtype, single[0]);
    fast_.z_q[kPacks * kPack] = from_bits(args_.auxiliary.dtype, single[1]);
    if (!is_guided(args_, token)) return;
    const auto mix = [&](float& z, float uncond) { z = uncond + token.scale * (z - uncond); };
    take_packs(cells, args_.uncond.dtype, [&](int k, const float (&numbers)[kPack]) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) mix(fast_.z_p[k * kPack + i], numbers[i]);
    });
    mix(fast_.z_p[kPacks * kPack], from_bits(args_.uncond.dtype, single[2]));
  }

  const TokenDivergenceArgs& args_;
  const Rates& rates_;
  Team<0> team_;
  int rank_, threads_;
  Mailbox* mailbox_;
  int* ticket_;
  uint4* cells_;
  int begin_, size_, phase_ = 0;
  FastRow<Divergence, 0, kPacks * kPack + 1> fast_;
  // Of the row that was sent for:
  Split split_{0, 0, 0, 0};
  bool sent_ = false;
};

template <class Divergence, int kPacks>
__global__ __launch_bounds__(kMostThreads, 1) void block_kernel(const __grid_constant__ TokenDivergenceArgs args,
                                                                const __grid_constant__ Rates rates, int slice) {
  Block<Divergence, kPacks>(args, rates, slice, shared_memory<char>()).run();
}

template <class Divergence, int kLanes, int kHeld>
int launch_lanes(const TokenDivergenceArgs& args, void* stream) {
  constexpr int kRows = Lanes<Divergence, kLanes, kHeld>::kRows;
  const int64_t blocks = (args.shape.rows + kRows - 1) / kRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  bool dense = true;
  int bytes = 0;
  for (const LogitRows* logits : {&args.teacher, &args.auxiliary, &args.uncond, &args.gradient}) {
    if (logits->data == nullptr) continue;
    dense &= is_dense(args.shape, *logits) && reinterpret_cast<uintptr_t>(logits->data) % 16 == 0;
    bytes += span_bytes(*logits, kRows, args.shape.vocab);
  }
  return launch(lanes_kernel<Divergence, kLanes, kHeld>, dim3(static_cast<unsigned>(blocks)), dim3(kLanesBlock),
                dense ? static_cast<size_t>(bytes) : 0, stream, args, Rates(args), dense);
}

template <class Divergence, int kPacks>
int launch_blocks(const TokenDivergenceArgs& args, void* stream) {
  constexpr int64_t kHeld = kPacks * kPack + 1, kMost = kMostThreads * kHeld;
  if (args.shape.rows > kMostRows) return cudaErrorInvalidConfiguration;
  const int64_t vocab = args.shape.vocab;
  int64_t cluster = (vocab + kMost - 1) / kMost;
  if (cluster > kMostBlocks || !has_clusters()) cluster = 1;  // GeneralRow takes what does not fit
  TokenDivergenceArgs call = args;
  if (cluster > 1) call.ticket = nullptr;
  const int64_t slice = ((vocab + cluster - 1) / cluster + kPack - 1) / kPack * kPack;
  int64_t threads = ((slice + kHeld - 1) / kHeld + kWarp - 1) / kWarp * kWarp;
  if (threads > kMostThreads) threads = kMostThreads;
  int64_t cells = cells_of(args.teacher.dtype) + cells_of(args.auxiliary.dtype);
  if (args.uncond.data != nullptr) cells += cells_of(args.uncond.dtype);
  const int64_t scratch = Team<0>::scratch_bytes(static_cast<int>(threads / kWarp * cluster)) + 2 * sizeof(Mailbox);
  return launch_resident(block_kernel<Divergence, kPacks>, static_cast<unsigned>(cluster), args.shape.rows,
                         static_cast<unsigned>(threads), static_cast<size_t>(scratch + cells * kPacks * threads * 16),
                         stream, call, Rates(args), static_cast<int>(slice));
}

}  // namespace

template <class D>
int launch_divergence(const TokenDivergenceArgs& args, void* stream) {
  if (args.shape.vocab <= 33) return launch_lanes<D, 1, 33>(args, stream);
  if (args.shape.vocab <= 4 * 17) return launch_lanes<D, 4, 17>(args, stream);
  if (args.shape.vocab <= 16 * 17) return launch_lanes<D, 16, 17>(args, stream);
  if (args.shape.vocab <= kWarp * 17) return launch_blocks<D, 2>(args, stream);
  return launch_blocks<D, 4>(args, stream);
}

#endif

#if defined(DIMO_DIVERGENCE)

template int launch_divergence<DIMO_DIVERGENCE<ScalarMath>>(const TokenDivergenceArgs& args, void* stream);

#else

int token_divergence(const TokenDivergenceArgs& given, void* stream) {
  if (given.shape.rows == 0) return cudaSuccess;
  TokenDivergenceArgs args = given;
  merge_dims(args.shape, {&args.teacher, &args.uncond, &args.auxiliary, &args.gradient});
  return with_divergence<ScalarMath>(
      args.kind, [&](auto divergence) { return launch_divergence<typename decltype(divergence)::type>(args, stream); });
}

#endif

}  // namespace dimo::cuda
