// Masked cross-entropy and its gradient on the CPU: the rows of one task, in SIMD. Compiled once an instruction set
// (DIMO_ISA); cpu/cross_entropy.cpp chooses. From memory it reads every logit once (rows that fit the first caches) and
// writes every gradient once.
//
// A row is read in chunks of a buffer. The first sweep keeps a running maximum and sum, the second one writes the
// gradient; a row of one chunk keeps its exponentials between them.
#include <algorithm>
#include <type_traits>

#include "common/cross_entropy.h"
#include "common/rows.h"
#include "cpu/cross_entropy_columns.h"
#include "cpu/isa.h"
#include "cpu/layouts.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int kChains = 4;

struct Buffers {
  alignas(64) float logits[kBuffer];  // then the gradient
  alignas(64) float weights[kBuffer];
};

// Value and gradient are 0.
void skip_row(const CrossEntropyArgs& args, int64_t row) {
  args.value[row] = 0.0f;
  if (args.gradient.data != nullptr) zero_row(args.shape, args.gradient, row);
}

// kWhole: a row is one chunk.
template <class Layout, bool kSmooth, bool kWhole>
class Tile {
 public:
  Tile(const CrossEntropyArgs& args, Buffers& buffers)
      : args_(args),
        buffers_(buffers),
        smoothing_(args.label_smoothing / static_cast<float>(args.valid_vocab)),
        confidence_(1.0f - args.label_smoothing),
        gradient_scale_(args.factor_in_gradient ? *args.factor : 1.0f) {}

  // Rows that count: at most Layout::kRows of them.
  void run(const int64_t* rows, int count) {
    locate(rows, count);
    gather_statistics();
    if (args_.gradient.data != nullptr) write_gradient(count);
    finish(rows, count);
  }

 private:
  using Offsets = int64_t[Layout::kRows];

  void locate(const int64_t* rows, int count) {
    for (int r = 0; r < Layout::kRows; ++r) {
      const int64_t row = rows[r < count ? r : 0];  // idle lanes repeat the first row
      offsets_[r] = row_offset(args_.shape, args_.logits, row);
      if (args_.gradient.data != nullptr) gradient_offsets_[r] = row_offset(args_.shape, args_.gradient, row);
      targets_[r] = args_.targets[row];
    }
    with_type(args_.logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* data = static_cast<const T*>(args_.logits.data);
      for (int r = 0; r < Layout::kRows; ++r)
        set(target_logit_, r, load_one(data + offsets_[r] + targets_[r] * args_.logits.vocab_stride));
    });
  }

  static void set(Vec& v, int row, float x) {
    if constexpr (Layout::kRows == 1)
      v = VecMath::splat(x);
    else
      v[row] = x;
  }

  // Fills the buffer with ids [begin, begin + n).
  void read(int64_t begin, int64_t n) const {
    with_type(args_.logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* data = static_cast<const T*>(args_.logits.data);
      Layout::read(data, args_.logits.vocab_stride, offsets_, begin, n, buffers_.logits);
    });
    if constexpr (Layout::kRows == 1)
      for (int64_t i = n; i < Layout::padded(n) * kLanes; ++i) buffers_.logits[i] = -INFINITY;
  }

  // Calls visit(begin, n) for the chunks of the valid vocabulary, read.
  template <class Visit>
  void each_chunk(bool first_sweep, const Visit& visit) {
    for (int64_t begin = 0; begin < args_.valid_vocab; begin += Layout::kCapacity) {
      const int64_t rest = args_.valid_vocab - begin, n = rest < Layout::kCapacity ? rest : Layout::kCapacity;
      if (first_sweep || !kWhole) read(begin, n);
      visit(begin, n);
    }
  }

  // Calls visit(chain, i) for the floats at i of so many registers. Neighbours belong to different chains, whose sums
  // or maxima need not wait for one another.
  template <class Visit>
  DIMO_INLINE static void each_register(int64_t registers, const Visit& visit) {
    int64_t i = 0;
    for (; i + kChains <= registers; i += kChains)
#pragma GCC unroll 4
      for (int chain = 0; chain < kChains; ++chain) visit(chain, (i + chain) * kLanes);
    for (; i < registers; ++i) visit(0, i * kLanes);
  }

  DIMO_INLINE Vec weight(Vec z) const { return VecMath::exp2((z - base_) * kLog2e); }

  void gather_statistics() {
    top_ = minus_infinity();
    base_ = sum_ = distance_ = Vec{};
    each_chunk(true, [&](int64_t begin, int64_t n) {
      raise_top(begin, n);
      Vec sums[kChains] = {}, distances[kChains] = {};
      const int64_t full = Layout::full(n) * kLanes;
      each_register(Layout::padded(n), [&](int chain, int64_t i) {
        const Vec z = load(buffers_.logits + i), w = weight(z);
        sums[chain] += w;
        if constexpr (kSmooth) distances[chain] += i < full ? z - base_ : Vec{};
        if constexpr (kWhole) store(buffers_.weights + i, w);
      });
      if constexpr (kSmooth && Layout::kRows == 1)
        for (int64_t i = full; i < n; ++i) distances[0][i - full] += buffers_.logits[i] - base_[0];
      for (int chain = 0; chain < kChains; ++chain) {
        sum_ += sums[chain];
        distance_ += distances[chain];
      }
    });
    sum_ = Layout::sum_over_row(sum_);
    if constexpr (kSmooth) distance_ = Layout::sum_over_row(distance_);
  }

  // Raises the top to that of a chunk before which `seen` ids lie. Where every logit is -inf the base is 0, so that no
  // difference of infinities arises.
  void raise_top(int64_t seen, int64_t n) {
    Vec tops[kChains];
    for (Vec& top : tops) top = top_;
    each_register(Layout::padded(n),
                  [&](int chain, int64_t i) { tops[chain] = VecMath::max(load(buffers_.logits + i), tops[chain]); });
    for (int chain = 1; chain < kChains; ++chain) tops[0] = VecMath::max(tops[chain], tops[0]);
    const Vec top = Layout::max_over_row(tops[0]);
    const Vec base = top == -INFINITY ? Vec{} : top;
    if (seen > 0) {
      sum_ = top_ == -INFINITY ? sum_ : sum_ * VecMath::exp2((top_ - base) * kLog2e);
      if constexpr (kSmooth) distance_ += (base_ - base) * (static_cast<float>(seen) / kSharers);
    }
    top_ = top;
    base_ = base;
  }

  void write_gradient(int count) {
    const Vec scale = VecMath::splat(gradient_scale_), share = scale / sum_;
    const Vec of_target = (weight(target_logit_) / sum_ - smoothing_ - confidence_) * scale;
    each_chunk(false, [&](int64_t begin, int64_t n) {
      for (int64_t i = 0; i < Layout::padded(n) * kLanes; i += kLanes) {
        const Vec w = kWhole ? load(buffers_.weights + i) : weight(load(buffers_.logits + i));
        store(buffers_.logits + i, kSmooth ? w * share - smoothing_ * scale : w * share);
      }
      for (int r = 0; r < Layout::kRows; ++r) {
        const int64_t i = targets_[r] - begin;
        if (i >= 0 && i < n) buffers_.logits[i * Layout::kRows + r] = of_target[r];
      }
      with_type(args_.gradient.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        Layout::write(buffers_.logits, args_.gradient.vocab_stride, gradient_offsets_, count, begin, n,
                      static_cast<T*>(args_.gradient.data));
      });
    });
  }

  void finish(const int64_t* rows, int count) const {
    const Int dead = (top_ == -INFINITY) & (sum_ == 0.0f);
    const Vec log_sum = VecMath::log(dead ? VecMath::splat(1.0f) : sum_);
    Vec value = log_sum - confidence_ * (target_logit_ - base_);
    if constexpr (kSmooth) value -= smoothing_ * distance_;
    value = (dead ? Vec{} : value) * *args_.factor;
    for (int r = 0; r < count; ++r) {
      args_.value[rows[r]] = value[r];
      if (args_.gradient.data == nullptr) continue;
      if (dead[r] != 0 || sum_[r] != sum_[r])
        zero_row(args_.shape, args_.gradient, rows[r]);  // NaN: a diverged row
      else
        zero_padding(r);
    }
  }

  // Ids beyond the valid vocabulary.
  void zero_padding(int r) const {
    const int64_t stride = args_.gradient.vocab_stride, n = args_.shape.vocab - args_.valid_vocab;
    if (n == 0) return;
    with_type(args_.gradient.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      zero_run(stride, n, static_cast<T*>(args_.gradient.data) + gradient_offsets_[r] + args_.valid_vocab * stride);
    });
  }

  static constexpr float kSharers = Layout::kRows == 1 ? kLanes : 1;  // lanes over which a row's sum is spread

  const CrossEntropyArgs& args_;
  Buffers& buffers_;
  const float smoothing_, confidence_, gradient_scale_;
  Offsets offsets_ = {}, gradient_offsets_ = {}, targets_ = {};
  Vec target_logit_ = Vec{}, top_ = Vec{}, base_ = Vec{}, sum_ = Vec{};
  Vec distance_ = Vec{};  // sum of z - base over the valid vocabulary
};

template <class Layout, bool kSmooth, bool kWhole>
void run_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  Buffers buffers;
  Tile<Layout, kSmooth, kWhole> tile(args, buffers);
  int64_t counted[Layout::kRows];
  int count = 0;
  for (int64_t row = begin; row < end; ++row) {
    if (!counts(args.targets, args.mask, args.valid_vocab, row)) {
      skip_row(args, row);
      continue;
    }
    counted[count++] = row;
    if (count == Layout::kRows) {
      tile.run(counted, count);
      count = 0;
    }
  }
  if (count > 0) tile.run(counted, count);
  finish_streams();
}

template <class Layout, bool kSmooth>
void run_width(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  const bool whole = args.valid_vocab <= Layout::kCapacity;
  return whole ? run_rows<Layout, kSmooth, true>(args, begin, end) : run_rows<Layout, kSmooth, false>(args, begin, end);
}

// Neighbouring rows of one run of the innermost dimension together; those that fill no register one by one.
template <class T, bool kSmooth>
void run_columns(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  Columns<T, kSmooth> columns(args);
  const int64_t run = args.shape.sizes[args.shape.dims - 1];
  for (int64_t row = begin; row < end;) {
    const int64_t next = std::min(end, (row / run + 1) * run);
    const int64_t count = std::min<int64_t>(next - row, Columns<T, kSmooth>::kMostRows) / kLanes * kLanes;
    if (count > 0)
      columns.run(row, static_cast<int>(count));
    else
      run_width<Across, kSmooth>(args, row, next);
    row = count > 0 ? row + count : next;
  }
}

template <class Layout>
void run_smoothing(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  const bool smooth = args.label_smoothing > 0.0f;
  return smooth ? run_width<Layout, true>(args, begin, end) : run_width<Layout, false>(args, begin, end);
}

}  // namespace

void DIMO_ISA::cross_entropy_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end) {
  if (are_columns(args))
    return with_type(args.logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return args.label_smoothing > 0.0f ? run_columns<T, true>(args, begin, end)
                                         : run_columns<T, false>(args, begin, end);
    });
  const bool across = args.logits.vocab_stride != 1 || args.valid_vocab <= kShortVocab;
  return across ? run_smoothing<Across>(args, begin, end) : run_smoothing<Along>(args, begin, end);
}

}  // namespace dimo::cpu
