// Masked cross-entropy of logits whose vocabulary is strided and whose rows are neighbours, as in [B, V, H, W]: rows
// lie across the lanes, many at a time, and the vocabulary is the outer loop, so that memory is walked as it lies. It
// reads every logit twice and writes every gradient once. Rows that do not count share cache lines with those that do;
// they come along, and leave nothing.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/cross_entropy.h"
#include "common/rows.h"
#include "cpu/layouts.h"
#include "cpu/logits.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

// Whether rows follow one another where the vocabulary does not; fewer than a register of them are not worth it.
bool are_columns(const CrossEntropyArgs& args) {
  const int32_t last = args.shape.dims - 1;
  const bool alike = args.gradient.data == nullptr || args.gradient.strides[std::max(last, 0)] == 1;
  return last >= 0 && args.logits.vocab_stride != 1 && args.logits.strides[last] == 1 && alike &&
         args.shape.sizes[last] >= kLanes;
}

template <class T, bool kSmooth>
class Columns {
 public:
  static constexpr int kMostRows = 256;  // their sums stay in the first-level cache

  explicit Columns(const CrossEntropyArgs& args)
      : args_(args),
        smoothing_(args.label_smoothing / static_cast<float>(args.valid_vocab)),
        confidence_(1.0f - args.label_smoothing) {}

  // Neighbouring rows from `row` on, a multiple of kLanes of them.
  void run(int64_t row, int rows) {
    row_ = row;
    registers_ = rows / kLanes;
    logits_ = static_cast<const T*>(args_.logits.data) + row_offset(args_.shape, args_.logits, row);
    find_targets();
    gather_statistics();
    finish();
    if (args_.gradient.data != nullptr) write_gradient();
  }

 private:
  static constexpr float kLog2e = 1.44269504f;
  static constexpr int kRegisters = kMostRows / kLanes;
  static constexpr int64_t kIdsAtOnce = 8;  // in registers
  static constexpr int64_t kIdsASum = 256;  // long sums of floats are sums of sums

  // Relative to `base`, the top, or 0 where every logit so far is -inf.
  struct Sum {
    Vec top, base, weights, distance;

    static DIMO_INLINE Sum empty() { return {minus_infinity(), Vec{}, Vec{}, Vec{}}; }

    // Of `seen` ids so far.
    DIMO_INLINE void raise(Vec higher, int64_t seen) {
      const Vec usable = higher == -INFINITY ? Vec{} : higher;
      weights = top == -INFINITY ? weights : weights * VecMath::exp2((base - usable) * kLog2e);
      if constexpr (kSmooth) distance += (base - usable) * static_cast<float>(seen);
      top = higher;
      base = usable;
    }
  };

  void find_targets() {
    for (int r = 0; r < registers_ * kLanes; ++r) {
      const bool counted = counts(args_.targets, args_.mask, args_.valid_vocab, row_ + r);
      targets_[r] = counted ? args_.targets[row_ + r] : -1;
      target_logits_[r] = counted ? load_one(logits_ + targets_[r] * args_.logits.vocab_stride + r) : 0.0f;
    }
  }

  DIMO_INLINE Vec logit(int64_t id, int r) const { return load(logits_ + id * args_.logits.vocab_stride + r * kLanes); }

  void gather_statistics() {
    std::fill_n(sums_, registers_, Sum::empty());
    for (int64_t begin = 0; begin < args_.valid_vocab; begin += kIdsASum) {
      const int64_t end = std::min(begin + kIdsASum, args_.valid_vocab);
      Sum parts[kRegisters];
      std::fill_n(parts, registers_, Sum::empty());
      int64_t id = begin;
      for (; id + kIdsAtOnce <= end; id += kIdsAtOnce)
        for (int r = 0; r < registers_; ++r) add<kIdsAtOnce>(parts[r], id, id - begin, r);
      for (; id < end; ++id)
        for (int r = 0; r < registers_; ++r) add<1>(parts[r], id, id - begin, r);
      for (int r = 0; r < registers_; ++r) merge(sums_[r], begin, parts[r], end - begin);
    }
  }

  template <int64_t kIds>
  DIMO_INLINE void add(Sum& sum, int64_t id, int64_t seen, int r) const {
    Vec z[kIds], top = sum.top;
#pragma GCC unroll 8
    for (int64_t i = 0; i < kIds; ++i) {
      z[i] = logit(id + i, r);
      top = VecMath::max(z[i], top);
    }
    sum.raise(top, seen);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kIds; ++i) {
      sum.weights += VecMath::exp2((z[i] - sum.base) * kLog2e);
      if constexpr (kSmooth) sum.distance += z[i] - sum.base;
    }
  }

  static DIMO_INLINE void merge(Sum& sum, int64_t seen, Sum part, int64_t part_seen) {
    const Vec top = VecMath::max(part.top, sum.top);
    sum.raise(top, seen);
    part.raise(top, part_seen);
    sum.weights += part.weights;
    sum.distance += part.distance;
  }

  // Values, and what the gradient of a row is made of.
  void finish() {
    const float scale = args_.factor_in_gradient ? *args_.factor : 1.0f;
    for (int r = 0; r < registers_; ++r) {
      const Sum& sum = sums_[r];
      const Vec target = load(target_logits_ + r * kLanes);
      const Int dead = (sum.top == -INFINITY) & (sum.weights == 0.0f);
      Vec value = VecMath::log(dead ? VecMath::splat(1.0f) : sum.weights) - confidence_ * (target - sum.base);
      if constexpr (kSmooth) value -= smoothing_ * sum.distance;
      value = (dead ? Vec{} : value) * *args_.factor;
      const Vec weight = VecMath::exp2((target - sum.base) * kLog2e);
      store(of_target_ + r * kLanes, (weight / sum.weights - smoothing_ - confidence_) * scale);
      shares_[r] = scale / sum.weights;
      Int counted = {};
      for (int i = 0; i < kLanes; ++i) {
        counted[i] = targets_[r * kLanes + i] >= 0 ? -1 : 0;
        args_.value[row_ + r * kLanes + i] = counted[i] != 0 ? value[i] : 0.0f;
      }
      live_[r] = counted & ~dead & (sum.weights == sum.weights);  // NaN: a diverged row
    }
    subtracted_ = kSmooth ? VecMath::splat(smoothing_ * scale) : Vec{};
  }

  void write_gradient() const {
    T* to = static_cast<T*>(args_.gradient.data) + row_offset(args_.shape, args_.gradient, row_);
    const int64_t stride = args_.gradient.vocab_stride;
    const int64_t bytes = stride * static_cast<int64_t>(sizeof(T));
    if (std::is_same_v<T, float> && bytes % sizeof(Vec) == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0)
      write_all<true>(to, stride);
    else
      write_all<false>(to, stride);
    for (int r = 0; r < registers_ * kLanes; ++r)
      if (live_[r / kLanes][r % kLanes] != 0) store_one(to + targets_[r] * stride + r, of_target_[r]);
  }

  template <bool kStreams>
  void write_all(T* to, int64_t stride) const {
    for (int64_t id = 0; id < args_.valid_vocab; ++id)
      for (int r = 0; r < registers_; ++r) {
        const Vec w = VecMath::exp2((logit(id, r) - sums_[r].base) * kLog2e);
        put<kStreams>(to + id * stride + r * kLanes, live_[r] ? w * shares_[r] - subtracted_ : Vec{});
      }
    for (int64_t id = args_.valid_vocab; id < args_.shape.vocab; ++id)
      for (int r = 0; r < registers_; ++r) put<kStreams>(to + id * stride + r * kLanes, Vec{});
    if (kStreams) finish_streams();
  }

  template <bool kStreams>
  static DIMO_INLINE void put(T* to, Vec g) {
    if constexpr (kStreams && std::is_same_v<T, float>)
      stream(to, g);
    else
      store(to, g);
  }

  const CrossEntropyArgs& args_;
  const float smoothing_, confidence_;
  int64_t row_ = 0;
  int registers_ = 0;
  const T* logits_ = nullptr;
  int64_t targets_[kMostRows];  // -1: the row does not count
  alignas(64) float target_logits_[kMostRows];
  alignas(64) float of_target_[kMostRows];  // gradient there
  Sum sums_[kRegisters];
  Vec shares_[kRegisters];
  Int live_[kRegisters];  // rows with a gradient
  Vec subtracted_ = Vec{};
};

}  // namespace
}  // namespace dimo::cpu
