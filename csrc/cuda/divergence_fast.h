// The divergence of an ordinary row, which its threads hold in registers; results tell whether the row was ordinary.
#pragma once

#include "cuda/divergence_general.h"

namespace dimo::cuda {
namespace {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

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

  // Puts the gradient into z_q, slot by slot, and calls take(slot); whether the row was ordinary and its value.
  template <class Each, class Take>
  __device__ bool finish(const TokenDivergenceArgs& args, const Rates& rates, const Divergence& divergence,
                         Team<kLanes>& team, const Each& each, float factor, const Take& take, float& value) {
    const bool wanted = args.gradient.data != nullptr;
    forget_sweep();
    const bool mean_is_known = Divergence::kPullFromMean && rates.difference == 0.0f;
    float pull = 0.0f;
    if (wanted) {
      if constexpr (Divergence::kPullFromMean) pull = divergence.pull_from_mean(a_.mean_x);
      if (!mean_is_known) {
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
      z_q[s] = gradient;
      take(s);
    };
    bool far = false;
    if constexpr (Divergence::kPullFromMean) far = mean_is_known && -a_.mean_x > kFarApart;
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

}  // namespace
}  // namespace dimo::cuda
