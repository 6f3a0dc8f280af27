// Rows of logits in the registers of the threads that share them: which elements fall to whom, 16-byte loads and
// stores, numbers agreed upon by all threads of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/rows.h"
#include "cuda/hopper.h"

namespace dimo::cuda {

constexpr int kWarp = 32;
constexpr int kPack = 8;  // elements that a thread holds side by side: 16 bytes of a half type, 32 of float

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Calls body with a typed null pointer that stands for the storage type.
template <class Body>
__device__ inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(static_cast<float*>(nullptr));
    case DType::float16:
      return body(static_cast<__half*>(nullptr));
    default:  // a fourth way out, on which the results are not set, would keep their registers occupied everywhere
      return body(static_cast<__nv_bfloat16*>(nullptr));
  }
}

__device__ inline int log2_bytes_of(DType dtype) { return dtype == DType::float32 ? 2 : 1; }

// The largest magnitude that does not round to infinity lies below this.
__device__ inline float overflow_bound(DType dtype) {
  if (dtype == DType::float16) return 65520.0f;
  return dtype == DType::bfloat16 ? 0x1.ffp127f : INFINITY;
}

// --- one element --------------------------------------------------------------------------------------------------

__device__ inline const char* address_of(const LogitRows& logits, int64_t element) {
  return static_cast<const char*>(logits.data) + (element << log2_bytes_of(logits.dtype));
}

__device__ inline float load_element(const LogitRows& logits, int64_t element) {
  float x = 0.0f;
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    x = to_float(static_cast<const T*>(logits.data)[element]);
  });
  return x;
}

// The bits of an element, so that nothing waits for them until they are converted.
__device__ inline unsigned load_bits(const LogitRows& logits, int64_t element) {
  const char* const from = address_of(logits, element);
  return logits.dtype == DType::float32 ? load_32_bits(from) : load_16_bits(from);
}

template <class T>
__device__ inline unsigned load_bits(const T* from) {
  return sizeof(T) == 4 ? load_32_bits(from) : load_16_bits(from);
}

template <class T>
__device__ inline float from_bits(unsigned bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return to_float(value);
}

__device__ inline float from_bits(DType dtype, unsigned bits) {
  float x = 0.0f;
  with_type(dtype, [&](auto* type) { x = from_bits<std::remove_pointer_t<decltype(type)>>(bits); });
  return x;
}

__device__ inline void store_element(DType dtype, void* data, int64_t element, float x) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static_cast<T*>(data)[element] = from_float<T>(x);
  });
}

__device__ inline void store_element(const LogitRows& logits, int64_t element, float x) {
  store_element(logits.dtype, logits.data, element, x);
}

// --- packs --------------------------------------------------------------------------------------------------------

__host__ __device__ inline int cells_of(DType dtype) {
  return dtype == DType::float32 ? 2 : 1;
}  // 16-byte cells a pack

// The numbers of the pack in these cells.
template <class T>
__device__ inline void unpack(const uint4* cells, float (&to)[kPack]) {
  constexpr int kCell = 16 / sizeof(T);
#pragma unroll
  for (int c = 0; c < kPack / kCell; ++c) {
    const uint4 bits = cells[c];
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float
      const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
      }
      continue;
    }
    T values[kCell];
    memcpy(values, &bits, sizeof bits);
#pragma unroll
    for (int i = 0; i < kCell; ++i) to[c * kCell + i] = to_float(values[i]);
  }
}

// Stores a pack whose first element lies on a 16-byte boundary.
__device__ inline void store_pack(const LogitRows& logits, int64_t element, const float* from) {
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kCell = 16 / sizeof(T);
    auto* to = reinterpret_cast<uint4*>(static_cast<T*>(logits.data) + element);
#pragma unroll
    for (int c = 0; c < kPack / kCell; ++c) {
      T values[kCell];
#pragma unroll
      for (int i = 0; i < kCell; ++i) values[i] = from_float<T>(from[c * kCell + i]);
      uint4 bits;
      memcpy(&bits, values, sizeof bits);
      to[c] = bits;
    }
  });
}

// How `size` elements fall to T threads: packs, pack i to thread i % T, and single elements before and behind them, at
// most one a thread. T (8 most + 1) elements fit, where most is the number of packs a thread holds and T >= 14.
struct Split {
  int size, head, packs;

  __device__ Split(int size, int misaligned, int threads, int most)
      : size(size), head((kPack - misaligned) % kPack), packs(0) {
    if (head < size) packs = min((size - head) / kPack, threads * most);
  }

  __device__ int pack(int i) const { return head + kPack * i; }
  // The single element of a thread; none where it is not below size.
  __device__ int single(int thread) const { return thread < head ? thread : thread + kPack * packs; }
};

// --- all threads of a row -----------------------------------------------------------------------------------------

enum class Fold { sum, max, min };

__device__ inline float fold(Fold kind, float a, float b) {
  return kind == Fold::sum ? a + b : kind == Fold::max ? fmaxf(a, b) : fminf(a, b);  // NaN is ignored beside a number
}
__device__ inline float identity_of(Fold kind) {
  return kind == Fold::sum ? 0.0f : kind == Fold::max ? -INFINITY : INFINITY;
}

// Folds x over kLanes neighbours of a warp. The order is fixed: every lane gets the same bits.
template <int kLanes>
__device__ inline float fold_lanes(Fold kind, float x) {
  unsigned mask = 0xffffffffu;
  if constexpr (kLanes < kWarp) mask = ((1u << kLanes) - 1u) << (threadIdx.x % kWarp / kLanes * kLanes);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fold(kind, x, __shfl_xor_sync(mask, x, step));
  return x;
}

// The threads that share a row: kLanes neighbours of a warp, or (kLanes = 0) a block, or the blocks of a cluster.
template <int kLanes>
struct Team {
  static constexpr int kFirst = kLanes == 0 ? kWarp : kLanes;  // who folds first, without a barrier

  __device__ explicit Team(void*) {}
  __device__ int rank() const { return threadIdx.x % kLanes; }
  __device__ static constexpr int size() { return kLanes; }

  // Folds the numbers of all threads; every thread gets the results.
  template <Fold... kFolds>
  __device__ void fold_all(float (&x)[sizeof...(kFolds)]) {
    constexpr Fold kinds[] = {kFolds...};
#pragma unroll
    for (int n = 0; n < static_cast<int>(sizeof...(kFolds)); ++n) x[n] = fold_lanes<kLanes>(kinds[n], x[n]);
  }
};

template <>
struct Team<0> {
  static constexpr int kFirst = kWarp;
  static constexpr int kMostNumbers = 5;

  // Shared memory that the exchange needs, a multiple of 16 bytes.
  __host__ __device__ static int scratch_bytes(int entries) {
    return static_cast<int>(2 * sizeof(Mailbox)) + (2 * kMostNumbers * entries * 4 + 15) / 16 * 16;
  }

  __device__ explicit Team(void* scratch)
      : mailboxes_(static_cast<Mailbox*>(scratch)), entries_(warps() * cluster_size()) {
    if (cluster_size() == 1) return;
    if (threadIdx.x == 0) {
      mailboxes_[0].open();
      mailboxes_[1].open();
    }
    cluster_sync();
  }
  __device__ static void sync() {
    if (warps() == 1)
      __syncwarp();
    else
      __syncthreads();
  }
  __device__ static int rank() { return threadIdx.x; }
  __device__ static int size() { return blockDim.x; }
  __device__ static int warps() { return blockDim.x / kWarp; }
  __device__ int entries() const { return entries_; }

  // Makes the numbers of every warp known to all: number n of warp i is at [n * entries() + i]. Good until the next but
  // one call: whoever calls again has read what came before.
  template <int kNumbers>
  __device__ const float* share(const float (&x)[kNumbers]) {
    const int odd = turn_ & 1, lane = threadIdx.x % kWarp;
    const int entry = static_cast<int>(cluster_rank()) * warps() + static_cast<int>(threadIdx.x) / kWarp;
    float* const board = reinterpret_cast<float*>(mailboxes_ + 2) + odd * kMostNumbers * entries_;
    if (entries_ == warps()) {
      if (lane == 0) {
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) board[n * entries_ + entry] = x[n];
      }
      __syncthreads();
    } else {
      if (threadIdx.x == 0) mailboxes_[odd].expect(kNumbers * entries_ * static_cast<int>(sizeof(float)));
      if (lane < static_cast<int>(cluster_size())) {
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) mailboxes_[odd].send(board + n * entries_ + entry, lane, x[n]);
      }
      mailboxes_[odd].wait(turn_ >> 1 & 1);
    }
    ++turn_;
    return board;
  }

  template <Fold... kFolds>
  __device__ void fold_all(float (&x)[sizeof...(kFolds)]) {
    constexpr int kNumbers = sizeof...(kFolds);
    constexpr Fold kinds[] = {kFolds...};
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) x[n] = fold_lanes<kWarp>(kinds[n], x[n]);
    if (entries_ == 1) return;
    const float* board = share(x);
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) x[n] = identity_of(kinds[n]);
#pragma unroll 1
    for (int i = threadIdx.x % kWarp; i < entries_; i += kWarp) {
#pragma unroll
      for (int n = 0; n < kNumbers; ++n) x[n] = fold(kinds[n], x[n], board[n * entries_ + i]);
    }
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) x[n] = fold_lanes<kWarp>(kinds[n], x[n]);
  }

 private:
  Mailbox* mailboxes_;  // two, and behind them two boards
  int entries_, turn_ = 0;
};

// A lane of every warp of the block: 32 neighbouring rows side by side, for logits whose rows are neighbours in memory
// and whose ids are not. All threads of the block call fold_all alike.
constexpr int kColumns = -1;

template <>
struct Team<kColumns> {
  static constexpr int kMostNumbers = 3;

  __device__ explicit Team(float* board) : board_(board) {}
  __device__ static int rank() { return threadIdx.x / kWarp; }
  __device__ static int size() { return blockDim.x / kWarp; }
  __host__ __device__ static int scratch_bytes(int warps) { return kMostNumbers * warps * kWarp * 4; }

  template <Fold... kFolds>
  __device__ void fold_all(float (&x)[sizeof...(kFolds)]) {
    constexpr int kNumbers = sizeof...(kFolds);
    constexpr Fold kinds[] = {kFolds...};
    static_assert(kNumbers <= kMostNumbers, "the board is too small");
    float* const column = board_ + threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) column[(n * size() + rank()) * kWarp] = x[n];
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kNumbers; ++n) {
      x[n] = identity_of(kinds[n]);
      for (int warp = 0; warp < size(); ++warp) x[n] = fold(kinds[n], x[n], column[(n * size() + warp) * kWarp]);
    }
    __syncthreads();  // the board is free
  }

 private:
  float* board_;
};

}  // namespace dimo::cuda
