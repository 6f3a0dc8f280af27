// Token-level f-divergences as functors, the same on CPU and CUDA.
//
// D = sum_v q f(u), u = p/q; its gradient with respect to z_q is (pull - q * sum pull) / temperature, pull = q g(u),
// g = f - u f'. A constant added to g changes no gradient, c (u - 1) added to f changes no value: each f is taken in
// its form with f >= 0 and f'(1) = 0, so that no large terms cancel where p and q nearly agree.
//
// `Math` is the arithmetic: a type F (float, or a vector of them) and functions on it. It spares a functor from knowing
// where it runs.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "ops.h"

namespace dimo {

// One vocabulary entry: probabilities, their logarithms, x = log p - log q.
template <class F>
struct Entry {
  F p, q, log_p, log_q, x;
};

// q f(u) and q g(u). Jeffreys keeps its two KLs apart, so that infinities of opposite sign are seen: value is the
// forward one, second the reverse one.
template <class F>
struct Terms {
  F value, second, pull;
};

// The terms as multiples of q where p = 0, and of p where q = 0; infinite ones are infinite whatever they multiply.
struct Limits {
  float value_no_p, value_no_q, pull_no_p, pull_no_q;
  float second_no_p = 0.0f, second_no_q = 0.0f;
};

constexpr float kInfinity = INFINITY;

// Up to here, in nats, the largest logits of both sides count as near; as in reference/divergence.py.
constexpr float kNearTops = 16.0f;

// Where |log p/q| is below this, series stand for differences that would cancel; elsewhere they may overflow, unused.
constexpr float kNear = 0.5f;

// From this reverse KL on, in nats, nothing cancels in sums of p log(p/q).
constexpr float kFarApart = 0.05f;

// exp(y) - 1 - y for |y| <= kNear, relative error about 1e-7.
template <class Math>
DIMO_HOST_DEVICE inline typename Math::F expm1_minus_near(typename Math::F y) {
  typename Math::F series = Math::splat(1.0f / 40320);
  constexpr float kCoefficients[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2};
  DIMO_UNROLL
  for (int i = 0; i < 6; ++i) series = Math::fma(series, y, Math::splat(kCoefficients[i]));
  return series * y * y;
}

// exp(y) - 1 for |y| <= kNear.
template <class Math>
DIMO_HOST_DEVICE inline typename Math::F expm1_near(typename Math::F y) {
  return y + expm1_minus_near<Math>(y);
}

// exp(y) - 1 - y and exp(-y) - 1 + y for |y| <= kNear, from their even and odd parts.
template <class F>
struct BothSigns {
  F plus, minus;
};
template <class Math>
DIMO_HOST_DEVICE inline BothSigns<typename Math::F> expm1_minus_both(typename Math::F y) {
  using F = typename Math::F;
  const F square = y * y;
  F even = Math::splat(1.0f / 720), odd = Math::splat(1.0f / 5040);
  constexpr float kEven[] = {1.0f / 24, 1.0f / 2}, kOdd[] = {1.0f / 120, 1.0f / 6};
  DIMO_UNROLL
  for (int i = 0; i < 2; ++i) {
    even = Math::fma(even, square, Math::splat(kEven[i]));
    odd = Math::fma(odd, square, Math::splat(kOdd[i]));
  }
  odd = odd * y;
  return {square * (even + odd), square * (even - odd)};
}

// p x - p + q >= 0 with x = log(p/q): the integrand of KL(p|q).
template <class Math>
DIMO_HOST_DEVICE inline typename Math::F kl_term(typename Math::F p, typename Math::F q, typename Math::F x) {
  const auto near = p * expm1_minus_near<Math>(-x);
  return Math::select(Math::abs(x) < kNear, near, p * x - p + q);
}

// What all but Jeffreys make of a row's sums.
struct OneValue {
  static constexpr bool kTwoValues = false;
  static constexpr bool kPullFromMean = false;  // whether sum pull follows from sum q x; such have plain_terms too
  template <class F>
  DIMO_HOST_DEVICE F combine(F value, F) const {
    return value;
  }
};

template <class Math>
struct ForwardKL : OneValue {
  using F = typename Math::F;
  static constexpr bool kPullFromMean = true;
  DIMO_HOST_DEVICE explicit ForwardKL(double) {}
  DIMO_HOST_DEVICE F pull_from_mean(F) const { return Math::splat(-1.0f); }
  // Where p and q lie apart: sum (q - p) is 0.
  DIMO_HOST_DEVICE Terms<F> plain_terms(const Entry<F>& e) const { return {e.p * e.x, Math::splat(0.0f), -e.p}; }
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    return {kl_term<Math>(e.p, e.q, e.x), Math::splat(0.0f), -e.p};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {1.0f, kInfinity, 0.0f, -1.0f}; }
};

template <class Math>
struct ReverseKL : OneValue {
  using F = typename Math::F;
  static constexpr bool kPullFromMean = true;
  DIMO_HOST_DEVICE explicit ReverseKL(double) {}
  DIMO_HOST_DEVICE F pull_from_mean(F mean_x) const { return -mean_x; }
  DIMO_HOST_DEVICE Terms<F> plain_terms(const Entry<F>& e) const {
    const F pull = -e.q * e.x;
    return {pull, Math::splat(0.0f), pull};
  }
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    return {kl_term<Math>(e.q, e.p, -e.x), Math::splat(0.0f), -e.q * e.x};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {kInfinity, 1.0f, kInfinity, 0.0f}; }
};

// (1 - beta) KL(p|q) + beta KL(q|p); beta is neither 0 nor 1, which are the KLs.
template <class Math>
struct Jeffreys {
  using F = typename Math::F;
  static constexpr bool kTwoValues = true, kPullFromMean = true;
  float beta;
  DIMO_HOST_DEVICE explicit Jeffreys(double parameter) : beta(static_cast<float>(parameter)) {}
  DIMO_HOST_DEVICE F pull_from_mean(F mean_x) const { return beta - 1.0f - beta * mean_x; }
  DIMO_HOST_DEVICE Terms<F> plain_terms(const Entry<F>& e) const {
    const F reverse = -e.q * e.x;
    return {e.p * e.x, reverse, (beta - 1.0f) * e.p + beta * reverse};
  }
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const auto both = expm1_minus_both<Math>(e.x);
    const auto near = Math::abs(e.x) < kNear;
    const F difference = e.p - e.q;
    return {Math::select(near, e.p * both.minus, e.p * e.x - difference),
            Math::select(near, e.q * both.plus, difference - e.q * e.x), (beta - 1.0f) * e.p - beta * (e.q * e.x)};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {1.0f, kInfinity, beta * kInfinity, beta - 1.0f, kInfinity, 1.0f}; }
  // Infinities of opposite sign give +inf.
  DIMO_HOST_DEVICE F combine(F forward, F reverse) const {
    const F a = (1.0f - beta) * forward, b = beta * reverse, infinite = Math::splat(kInfinity);
    return Math::select((a == infinite) | (b == infinite), infinite, a + b);
  }
};

template <class Math>
struct JensenShannon : OneValue {
  using F = typename Math::F;
  float pi, rest;
  DIMO_HOST_DEVICE explicit JensenShannon(double parameter)
      : pi(static_cast<float>(parameter)), rest(static_cast<float>(1.0 - parameter)) {}
  // m = pi p + rest q. With the larger of p and q as the base, log m - log base = log1p(weight * (ratio - 1)) where
  // weight is the smaller one's share.
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const auto negative = e.x < 0.0f;
    const F a = -Math::abs(e.x);
    const F ratio_minus_1 = Math::select(a > -kNear, expm1_near<Math>(a), Math::exp(a) - 1.0f);
    const F shift = Math::log1p(Math::select(negative, Math::splat(pi), Math::splat(rest)) * ratio_minus_1);
    const F p_over_m = Math::select(negative, e.x, Math::splat(0.0f)) - shift;
    const F q_over_m = Math::select(negative, Math::splat(0.0f), -e.x) - shift;
    const F m = pi * e.p + rest * e.q;
    return {pi * kl_term<Math>(e.p, m, p_over_m) + rest * kl_term<Math>(e.q, m, q_over_m), Math::splat(0.0f),
            rest * e.q * q_over_m};
  }
  DIMO_HOST_DEVICE Limits limits() const {
    const float no_p = -rest * logf(rest);
    return {no_p, -pi * logf(pi), no_p, 0.0f};
  }
};

template <class Math>
struct SquaredHellinger : OneValue {
  using F = typename Math::F;
  DIMO_HOST_DEVICE explicit SquaredHellinger(double) {}
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F half = expm1_near<Math>(0.5f * e.x);
    const F root_p = Math::sqrt(e.p), root_q = Math::sqrt(e.q), difference = root_p - root_q;
    const auto near = Math::abs(e.x) < kNear;
    return {Math::select(near, e.q * half * half, difference * difference), Math::splat(0.0f),
            Math::select(near, -e.q * half, e.q - root_p * root_q)};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {1.0f, 1.0f, 1.0f, 0.0f}; }
};

template <class Math>
struct TotalVariation : OneValue {
  using F = typename Math::F;
  DIMO_HOST_DEVICE explicit TotalVariation(double) {}
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F near = e.q * expm1_near<Math>(e.x);
    const F difference = Math::select(Math::abs(e.x) < kNear, near, e.p - e.q);
    const F zero = Math::splat(0.0f), half_q = 0.5f * e.q;
    return {0.5f * Math::abs(difference), zero,
            Math::select(e.x > 0.0f, -half_q, Math::select(e.x < 0.0f, half_q, zero))};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {0.5f, 0.5f, 0.5f, 0.0f}; }
};

template <class Math>
struct PearsonChi2 : OneValue {
  using F = typename Math::F;
  DIMO_HOST_DEVICE explicit PearsonChi2(double) {}
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F minus_1 = expm1_near<Math>(e.x);
    const F ratio = Math::exp(e.log_p + e.x);  // p^2 / q
    const auto near = Math::abs(e.x) < kNear;
    return {Math::select(near, e.q * minus_1 * minus_1, ratio - 2.0f * e.p + e.q), Math::splat(0.0f),
            Math::select(near, -e.q * minus_1 * (minus_1 + 2.0f), e.q - ratio)};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {1.0f, kInfinity, 1.0f, -kInfinity}; }
};

template <class Math>
struct NeymanChi2 : OneValue {
  using F = typename Math::F;
  DIMO_HOST_DEVICE explicit NeymanChi2(double) {}
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F inverse_minus_1 = expm1_near<Math>(-e.x);
    const F ratio = Math::exp(e.log_q - e.x);  // q^2 / p
    const auto near = Math::abs(e.x) < kNear;
    return {Math::select(near, -e.q * expm1_near<Math>(e.x) * inverse_minus_1, ratio - 2.0f * e.q + e.p),
            Math::splat(0.0f), 2.0f * Math::select(near, e.q * inverse_minus_1, ratio - e.q)};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {kInfinity, 1.0f, kInfinity, 0.0f}; }
};

template <class Math>
struct Alpha : OneValue {
  using F = typename Math::F;
  float alpha, inverse, norm, reach;
  DIMO_HOST_DEVICE explicit Alpha(double parameter)
      : alpha(static_cast<float>(parameter)),
        inverse(static_cast<float>(1.0 / parameter)),
        norm(static_cast<float>(1.0 / (parameter * (parameter - 1.0)))),
        reach(80.0f < kNear * fabsf(alpha) ? 80.0f / fabsf(alpha) : kNear) {}  // exp(alpha x) stays finite
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F x = Math::clamp(e.x, reach), y = alpha * x, tiny = Math::clamp(y, kNear);
    const F exp_y = Math::exp(y), series = expm1_minus_near<Math>(tiny);
    const auto small = Math::abs(y) < kNear, near = Math::abs(e.x) < reach;
    const F minus_1 = Math::select(small, tiny + series, exp_y - 1.0f);
    const F rest = Math::select(small, series, exp_y - 1.0f - y);
    const F power = Math::exp(e.log_q + alpha * e.x);  // p^alpha q^(1 - alpha)
    const F far = power - alpha * e.p - (1.0f - alpha) * e.q;
    return {norm * Math::select(near, e.q * (rest - alpha * expm1_minus_near<Math>(x)), far), Math::splat(0.0f),
            inverse * Math::select(near, -e.q * minus_1, e.q - power)};
  }
  DIMO_HOST_DEVICE Limits limits() const {
    const float no_p = alpha > 0.0f ? inverse : kInfinity;
    return {no_p, alpha < 1.0f ? 1.0f / (1.0f - alpha) : kInfinity, no_p, alpha < 1.0f ? 0.0f : -kInfinity};
  }
};

template <class Math>
struct LeCam : OneValue {
  using F = typename Math::F;
  DIMO_HOST_DEVICE explicit LeCam(double) {}
  DIMO_HOST_DEVICE Terms<F> terms(const Entry<F>& e) const {
    const F minus_1 = expm1_near<Math>(e.x), sum = e.p + e.q;
    const auto near = Math::abs(e.x) < kNear;
    const F difference = Math::select(near, e.q * minus_1, e.p - e.q);
    // (p - q) / (p + q); where both have underflowed, its factors are 0.
    const F slope = Math::select(near, minus_1, difference) /
                    Math::select(near, minus_1 + 2.0f, Math::select(sum > 0.0f, sum, Math::splat(1.0f)));
    return {difference * slope, Math::splat(0.0f), -e.q * slope * (slope + 2.0f)};
  }
  DIMO_HOST_DEVICE Limits limits() const { return {1.0f, 1.0f, 1.0f, 0.0f}; }
};

// The terms where p or q is 0: multiples of the other, or infinite; nothing where both are.
template <class Math>
DIMO_HOST_DEVICE inline typename Math::F at_limit(typename Math::F x, typename Math::F p, typename Math::F q,
                                                  typename Math::Mask no_p, typename Math::Mask no_q, float at_no_p,
                                                  float at_no_q) {
  const auto zero = Math::splat(0.0f);
  const auto if_no_p = fabsf(at_no_p) == kInfinity ? Math::splat(at_no_p) : q * at_no_p;
  const auto if_no_q = fabsf(at_no_q) == kInfinity ? Math::splat(at_no_q) : p * at_no_q;
  return Math::select(no_p, Math::select(no_q, zero, if_no_p), Math::select(no_q, if_no_q, x));
}

// The entry with log p bounded from below; ids that neither side knows stay out.
template <class Math>
DIMO_HOST_DEVICE inline Entry<typename Math::F> with_floor(Entry<typename Math::F> e, float floor) {
  using Mask = typename Math::Mask;
  const auto none = Math::splat(-kInfinity), bound = Math::splat(floor);
  const Mask raised = (e.log_p < bound) & ((e.log_p > none) | (e.log_q > none));
  e.p = Math::select(raised, Math::splat(expf(floor)), e.p);
  e.log_p = Math::select(raised, bound, e.log_p);
  e.x = Math::select(raised, bound - e.log_q, e.x);
  return e;
}

// Terms of one entry whose logarithms may be -inf.
template <class Math, class Divergence>
DIMO_HOST_DEVICE inline Terms<typename Math::F> terms_at(const Divergence& divergence,
                                                         const Entry<typename Math::F>& e) {
  using Mask = typename Math::Mask;
  const auto zero = Math::splat(0.0f);
  const Mask no_p = e.log_p == Math::splat(-kInfinity), no_q = e.log_q == Math::splat(-kInfinity);
  const auto terms = divergence.terms({e.p, e.q, Math::select(no_p, zero, e.log_p), Math::select(no_q, zero, e.log_q),
                                       Math::select(no_p | no_q, zero, e.x)});
  const Limits limits = divergence.limits();
  Terms<typename Math::F> result = terms;
  result.value = at_limit<Math>(terms.value, e.p, e.q, no_p, no_q, limits.value_no_p, limits.value_no_q);
  if constexpr (Divergence::kTwoValues)
    result.second = at_limit<Math>(terms.second, e.p, e.q, no_p, no_q, limits.second_no_p, limits.second_no_q);
  result.pull = at_limit<Math>(terms.pull, e.p, e.q, no_p, no_q, limits.pull_no_p, limits.pull_no_q);
  return result;
}

template <class T>
struct Type {
  using type = T;
};

// Returns visit(Type<D>{}) for the functor D of a kind.
template <class Math, class Visit>
auto with_divergence(DivergenceKind kind, const Visit& visit) {
  switch (kind) {
    case DivergenceKind::forward_kl:
      return visit(Type<ForwardKL<Math>>{});
    case DivergenceKind::reverse_kl:
      return visit(Type<ReverseKL<Math>>{});
    case DivergenceKind::jeffreys:
      return visit(Type<Jeffreys<Math>>{});
    case DivergenceKind::jensen_shannon:
      return visit(Type<JensenShannon<Math>>{});
    case DivergenceKind::squared_hellinger:
      return visit(Type<SquaredHellinger<Math>>{});
    case DivergenceKind::total_variation:
      return visit(Type<TotalVariation<Math>>{});
    case DivergenceKind::pearson_chi2:
      return visit(Type<PearsonChi2<Math>>{});
    case DivergenceKind::neyman_chi2:
      return visit(Type<NeymanChi2<Math>>{});
    case DivergenceKind::alpha:
      return visit(Type<Alpha<Math>>{});
    case DivergenceKind::le_cam:
      break;
  }
  return visit(Type<LeCam<Math>>{});
}

}  // namespace dimo
