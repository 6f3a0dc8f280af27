// The divergence of any row, whatever its logits and layout: every sweep reads them from memory.
#pragma once

#include <cstdint>

#include "common/divergences.h"
#include "common/scalar_math.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

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
  __device__ GeneralRow(const TokenDivergenceArgs& args, const Divergence& divergence, const Token& token,
                        Team<kLanes>& team, void* span)
      : args_(args), divergence_(divergence), token_(token), team_(team) {
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

  // Calls visit(index, z_p, z_q) for the entries of this thread, a few of which are loaded before the first is used.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    constexpr int kAhead = kLanes == kColumns ? 4 : 1;
    const int step = team_.size();
    const bool guided = is_guided(args_, token_);
    for (int begin = team_.rank(); begin < token_.size; begin += kAhead * step) {
      unsigned bits[kAhead][3] = {};
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = begin + k * step;
        if (i >= token_.size) break;
        bits[k][0] = load_bits(args_.teacher, first_[0] + i * args_.teacher.vocab_stride);
        if (guided) bits[k][1] = load_bits(args_.uncond, first_[1] + i * args_.uncond.vocab_stride);
        bits[k][2] = load_bits(args_.auxiliary, first_[2] + i * args_.auxiliary.vocab_stride);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = begin + k * step;
        if (i >= token_.size) break;
        float z_p = from_bits(args_.teacher.dtype, bits[k][0]);
        if (guided) {  // uncond + s (cond - uncond); -inf on either side gives -inf
          const float uncond = from_bits(args_.uncond.dtype, bits[k][1]);
          const bool filtered = z_p == -kInfinity || uncond == -kInfinity;
          z_p = filtered ? -kInfinity : uncond + token_.scale * (z_p - uncond);
        }
        visit(i, z_p, from_bits(args_.auxiliary.dtype, bits[k][2]));
      }
    }
  }

  __device__ void store(int i, float x) const {
    store_element(args_.gradient.dtype, gradient_, first_[3] + i * gradient_stride_, x);
  }

  const TokenDivergenceArgs& args_;
  const Divergence& divergence_;
  const Token& token_;
  Team<kLanes>& team_;
  int64_t first_[4], gradient_stride_;
  void* gradient_;
};

template <class Divergence, int kLanes>
__device__ Team<kLanes> general_row(const TokenDivergenceArgs& args, const Divergence& divergence, Token token,
                                    Team<kLanes> team, void* span = nullptr) {
  // By value: what is passed by reference must lie in memory.
  GeneralRow<Divergence, kLanes>(args, divergence, token, team, span).run();
  return team;
}

constexpr int kColumnThreads = 512;

// Rows whose ids lie apart, such as logits [B, V, H, W] seen as [B, H, W, V]: 32 rows a block.
template <class Divergence>
__global__ __launch_bounds__(kColumnThreads) void columns_kernel(const __grid_constant__ TokenDivergenceArgs args,
                                                                 const __grid_constant__ Divergence divergence) {
  Team<kColumns> team(shared_memory<float>());
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  const bool inside = row < args.shape.rows, counts = mask_bits(args, row) != 0;
  const float factor = counts ? factor_of(args, row) : 0.0f;
  const int vocab = static_cast<int>(args.shape.vocab);
  // Lanes without a row, and rows that do not count, come along with no entries; begin keeps the former from writing.
  const Token token = {inside ? row : 0, inside ? 0 : 1, factor != 0.0f ? vocab : 0,
                       counts ? scale_of(args, row) : 1.0f, factor};
  GeneralRow<Divergence, kColumns>(args, divergence, token, team, nullptr).run();
  if (!inside || factor != 0.0f || args.gradient.data == nullptr) return;
  const int64_t first = first_gradient(args, row, 0);
  for (int i = team.rank(); i < vocab; i += team.size())
    store_element(args.gradient, first + i * args.gradient.vocab_stride, 0.0f);
}

}  // namespace
}  // namespace dimo::cuda
