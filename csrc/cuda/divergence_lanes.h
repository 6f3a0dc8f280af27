// Short vocabularies: a few lanes of a warp, or one, have a row.
#pragma once

#include "cuda/divergence_fast.h"
#include "cuda/launch.h"

namespace dimo::cuda {
namespace {

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
      : args_(args),
        rates_(rates),
        divergence_(args.parameter),
        dense_(dense),
        shared_(shared),
        size_(static_cast<int>(args.shape.vocab)) {}

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
      const auto later = [](int) {};
      if (ordinary) ordinary = fast_.finish(args_, rates_, divergence_, team_, all, token.factor, later, value);
    }
    if (!ordinary) {
      const int row_bytes = size_ << log2_bytes_of(args_.gradient.dtype);
      general_row<Divergence, kLanes>(args_, divergence_, token, team_,
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
  const Divergence divergence_;
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

}  // namespace
}  // namespace dimo::cuda
