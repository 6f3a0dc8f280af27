// Rows of logits in chunks of ids on the device: the lanes that share a row, and how a warp's next chunks come through
// shared memory while it works on one. Chunks may begin anywhere; what is copied are aligned 16-byte cells.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/sampling.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

using Wide = unsigned long long;  // what shuffles and atomics call uint64_t

constexpr int kShare = 8;  // ids of a chunk that a lane holds
static_assert(kChunk == kWarp * kShare, "a warp holds a chunk");

// copy_async of what lies before `stop`, behind which there may be no memory: numbers of 2 or 4 bytes.
__device__ inline void copy_cell(void* to, const char* from, const char* stop) {
  if (stop - from >= 16) return copy_async(static_cast<uint4*>(to), from);
  for (int i = 0; i < stop - from; i += 2)
    static_cast<unsigned short*>(to)[i / 2] = *reinterpret_cast<const unsigned short*>(from + i);
}

// kLanes neighbours of a warp that work on one row.
template <int kLanes>
struct Lanes {
  int rank = static_cast<int>(threadIdx.x) % kLanes;
  unsigned mask =
      kLanes == kWarp ? 0xffffffffu : ((1u << kLanes % kWarp) - 1u) << (threadIdx.x % kWarp / kLanes * kLanes);

  template <class T, class Combine>
  __device__ T reduce(T x, const Combine& combine) const {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(mask, x, step));
    return x;
  }
  __device__ float sum(float x) const {
    return reduce(x, [](float a, float b) { return a + b; });
  }
  // NaN is ignored beside a number.
  __device__ float max(float x) const {
    return reduce(x, [](float a, float b) { return fmaxf(a, b); });
  }
  // Of this lane and those before it.
  __device__ Wide scan(Wide x) const {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const Wide before = __shfl_up_sync(mask, x, step, kLanes);
      if (rank >= step) x += before;
    }
    return x;
  }
  template <class T>
  __device__ T from(int lane, T x) const {
    return __shfl_sync(mask, x, lane, kLanes);
  }
  // The first lane that says yes; one does.
  __device__ int first(bool yes) const {
    return (__ffs(static_cast<int>(__ballot_sync(mask, yes) & mask)) - 1) % kLanes;
  }
};

// Where a chunk waits in shared memory: the aligned 16-byte cells that hold it, one more than an aligned chunk has.
constexpr int kCell = 16;
constexpr int kSlots = 4;
__host__ __device__ inline int slot_bytes(const LogitRows& logits) {
  return logits.data == nullptr ? 0 : kCell + kChunk * bytes_of(logits.dtype);
}

// One tensor's part in a row.
struct Line {
  const LogitRows& logits;
  const char *data, *stop;  // the first id; behind the last id of the last row, where rows are contiguous

  __device__ Line(const RowShape& shape, const LogitRows& rows, int64_t row)
      : logits(rows),
        data(address_of(rows, row_offset(shape, rows, row))),
        stop(address_of(rows, row_offset(shape, rows, shape.rows - 1) + shape.vocab)) {}

  // A lane's ids first, first + kStep, ... below `end`, -inf beyond.
  template <int kStep>
  __device__ void load(int first, int end, float (&z)[kShare]) const {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* const from = reinterpret_cast<const T*>(data);
      unsigned bits[kShare];  // all on their way before one is converted
      if (logits.vocab_stride == 1 && first + (kShare - 1) * kStep < end) {
#pragma unroll
        for (int i = 0; i < kShare; ++i) bits[i] = load_bits(from + first + i * kStep);
      } else {
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
          const int id = first + i * kStep;
          bits[i] = load_bits(from + (id < end ? id : end - 1) * logits.vocab_stride);
        }
      }
#pragma unroll
      for (int i = 0; i < kShare; ++i) z[i] = first + i * kStep < end ? from_bits<T>(bits[i]) : -INFINITY;
    });
  }

  // Starts copying a chunk of a contiguous row to a slot: this lane's cells.
  __device__ void fetch(int lane, int chunk, int vocab, unsigned char* slot) const {
    const int bytes = bytes_of(logits.dtype), misaligned = misalignment();
    const char* const aligned = data - misaligned;
    const int first = chunk * kChunk * bytes, end = misaligned + vocab * bytes - first;
    const int here = misaligned + kChunk * bytes < end ? misaligned + kChunk * bytes : end;
#pragma unroll 1
    for (int at = lane * kCell; at < here; at += kWarp * kCell) copy_cell(slot + at, aligned + first + at, stop);
  }

  // A lane's ids of the chunk in a slot, of which `count` exist.
  __device__ void take(int lane, int count, const unsigned char* slot, float (&z)[kShare]) const {
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* const from = reinterpret_cast<const T*>(slot + misalignment()) + lane;
#pragma unroll
      for (int i = 0; i < kShare; ++i) z[i] = to_float(from[i * kWarp]);
    });
    if (count >= kChunk) return;
#pragma unroll
    for (int i = 0; i < kShare; ++i) z[i] = lane + i * kWarp < count ? z[i] : -INFINITY;
  }

 private:
  __device__ int misalignment() const { return static_cast<int>(reinterpret_cast<uintptr_t>(data) % kCell); }
};

// Chunks of a row that a warp works on at a time. A lane has the ids lane, lane + 32, ... of each.
template <int kChunks>
using Segment = float[kChunks][kShare];

constexpr int kStridedChunks = 2;  // longer segments are of contiguous rows: the addresses of others take registers

template <class T>
__device__ constexpr unsigned minus_infinity_bits() {
  return sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, __half> ? 0xfc00u : 0xff80u;
}

// Loads a lane's ids of a segment that begins with id `first` and of which `left` exist, -inf beyond.
template <int kChunks>
__device__ void load_segment(const Line& line, int lane, int first, int left, Segment<kChunks>& z) {
  with_type(line.logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    unsigned bits[kChunks][kShare];  // all on their way before one is converted
    const int64_t stride = line.logits.vocab_stride;
    const T* const from = reinterpret_cast<const T*>(line.data) + (first + lane) * stride;
    const auto each = [&](auto step) {  // an int where it is a constant
      const T* at = from;
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int here = left - c * kChunk;
        if (here >= kChunk) {
#pragma unroll
          for (int i = 0; i < kShare; ++i) bits[c][i] = load_bits(at + i * step);
        } else {
#pragma unroll
          for (int i = 0; i < kShare; ++i) {
            bits[c][i] = minus_infinity_bits<T>();
            if (lane + i * kWarp < here) bits[c][i] = load_bits(at + i * step);
          }
        }
        at += kShare * step;
      }
    };
    if (kChunks > kStridedChunks || stride == 1)
      each(kWarp);
    else
      each(kWarp * stride);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kShare; ++i) z[c][i] = from_bits<T>(bits[c][i]);
  });
}

// One row as floats, guided (kGuided), in chunks that come through shared memory while others are worked on.
template <bool kGuided>
struct Row {
  const SampleCategoricalArgs& args;
  Line cond, uncond;
  float scale = 1.0f;

  __device__ Row(const SampleCategoricalArgs& a, int64_t row)
      : args(a), cond(a.shape, a.logits, row), uncond(a.shape, kGuided ? a.uncond : a.logits, row) {
    if (kGuided) scale = a.guidance != nullptr ? a.guidance[row / a.rows_per_sample] : a.guidance_scale;
  }

  __device__ int vocab() const { return static_cast<int>(args.shape.vocab); }
  __device__ bool guided() const { return kGuided && scale != 1.0f; }

  __device__ RowStream stream(int64_t row) const {
    return RowStream(args.key, args.key_stride, OperatorTag::sample_categorical, row, args.rows_per_sample);
  }

  // -inf on either side gives -inf.
  __device__ float mixed(float z, float other) const {
    return z == -INFINITY || other == -INFINITY ? -INFINITY : other + scale * (z - other);
  }

  // Ids first, first + 1, ... below `end`, -inf beyond.
  __device__ void load(int first, int end, float (&z)[kShare]) const {
    cond.template load<1>(first, end, z);
    if (!guided()) return;
    float other[kShare];
    uncond.template load<1>(first, end, other);
    mix(other, z);
  }

  // A lane's ids of a segment, as load_segment above says.
  template <int kChunks>
  __device__ void load(int lane, int first, int left, Segment<kChunks>& z) const {
    load_segment(cond, lane, first, left, z);
    if (!guided()) return;
    Segment<kChunks> other;
    load_segment(uncond, lane, first, left, other);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) mix(other[c], z[c]);
  }

  // Calls visit(chunk, z) for the chunks of this warp, z a lane's ids lane, lane + 32, ...
  template <int kWarps, class Visit>
  __device__ void each_chunk(int lane, int warp, unsigned char* slots, const Visit& visit) const {
    const int chunks = (vocab() + kChunk - 1) / kChunk;
    const bool streamed = args.logits.vocab_stride == 1 && (!kGuided || args.uncond.vocab_stride == 1);
    const int cond_bytes = slot_bytes(args.logits), both_bytes = cond_bytes + (kGuided ? slot_bytes(args.uncond) : 0);
    const auto fetch = [&](int chunk, int count) {
      unsigned char* const slot = slots + count % kSlots * both_bytes;
      if (streamed && chunk < chunks) {
        cond.fetch(lane, chunk, vocab(), slot);
        if (guided()) uncond.fetch(lane, chunk, vocab(), slot + cond_bytes);
      }
      end_group_of_copies();
    };
#pragma unroll 1
    for (int i = 0; i < kSlots - 1; ++i) fetch(warp + i * kWarps, i);
    int count = 0;
#pragma unroll 1
    for (int chunk = warp; chunk < chunks; chunk += kWarps, ++count) {
      __syncwarp();  // the slot that is filled now has been read by all
      fetch(chunk + (kSlots - 1) * kWarps, count + kSlots - 1);
      wait_for_groups<kSlots - 1>();
      __syncwarp();
      float z[kShare];
      const unsigned char* const slot = slots + count % kSlots * both_bytes;
      take(cond, streamed, lane, chunk, slot, z);
      if (guided()) {
        float other[kShare];
        take(uncond, streamed, lane, chunk, slot + cond_bytes, other);
        mix(other, z);
      }
      visit(chunk, z);
    }
    __syncwarp();  // the next sweep fills the slots again
  }

 private:
  __device__ void take(const Line& line, bool streamed, int lane, int chunk, const unsigned char* slot,
                       float (&z)[kShare]) const {
    if (streamed)
      line.take(lane, vocab() - chunk * kChunk, slot, z);
    else
      line.template load<kWarp>(chunk * kChunk + lane, vocab(), z);
  }

  __device__ void mix(const float (&other)[kShare], float (&z)[kShare]) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) z[i] = mixed(z[i], other[i]);
  }
};

}  // namespace
}  // namespace dimo::cuda
