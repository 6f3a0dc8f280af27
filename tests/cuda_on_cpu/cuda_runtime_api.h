// CUDA C++ on the CPU, for tests: the host compiler compiles the kernels of csrc/cuda/*.cu as they stand.
//
// How it works. This folder precedes csrc/ and any CUDA toolkit on the include path, so that its cuda_runtime_api.h,
// cuda_fp16.h, cuda_bf16.h, cuda/launch.h and cuda/hopper.h replace theirs. A launch runs one block, or cluster of
// blocks, after the other in random order. Every thread of its blocks is a fiber, that runs until it waits at a
// barrier, a shuffle, a vote or for messages; which one goes on is drawn at random too (cuda_on_cpu_seed), mostly among
// those of one block, so that blocks of a cluster run ahead of each other. Shared memory is NaN when a block begins,
// and what asynchronous copies and messages bring arrives late.
//
// cuda_on_cpu_hopper chooses between GPUs with clusters and mailboxes and GPUs without. Each block of a cluster has
// shared memory of its own, to which the others can write by messages; these arrive at random moments, in any order.
//
// A kernel that cannot go on ends its launch with cudaErrorLaunchFailure, and cuda_on_cpu_error names the kernel,
// block, thread and line, and where the other threads are:
// * a barrier that not all threads of the block, or of the cluster, reach, on the same line;
// * a shuffle, vote or __syncwarp whose mask is not the set of lanes that arrive, or that reads a lane outside its
// mask;
// * a misaligned __ldg, __ldcs, __stcs or asynchronous copy;
// * a message to a block that is not there or has exited, to anything but dynamic shared memory, to a mailbox that is
// not open; a wait for more bytes than come;
// * a loop that waits without end (one that spins without waiting hangs).
// Under -fsanitize=address,undefined a kernel's overruns of shared and global memory and its misaligned vectors end the
// process; -fsanitize=thread reports races inside a block or cluster. Only kernels are instrumented, never runtime.cpp.
//
// What a kernel must keep to: dimo::cuda::launch starts it, dimo::cuda::shared_memory finds its dynamic shared memory;
// it computes in float (half types convert, nothing more) and does without cub, cooperative groups and PTX outside of
// cuda/hopper.h; messages go to dynamic shared memory.
//
// Not modelled: speed, registers and occupancy; the memory model (fences, races between clusters); the accuracy of
// __expf and its kin, which are expf here. Not executed: csrc/cuda/hopper.h, and whatever stands under #if on
// __CUDA_ARCH__.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

// --- the language -------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __constant__ static
// All thread_local variables lie in one segment, where the runtime finds them. Sanitizers do not look there: under them
// the blocks of a cluster have one static shared memory together, which keeps what was there before.
#if defined(CUDA_ON_CPU_SANITIZED)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

#define CUDA_ON_CPU_VECTORS(T, name)                                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(int, int)
CUDA_ON_CPU_VECTORS(unsigned, uint)
CUDA_ON_CPU_VECTORS(unsigned short, ushort)
CUDA_ON_CPU_VECTORS(long long, longlong)
CUDA_ON_CPU_VECTORS(float, float)
CUDA_ON_CPU_VECTORS(double, double)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;  // of the running thread
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

// --- what runtime.cpp does ----------------------------------------------------------------------------------------

extern "C" {
const char* cuda_on_cpu_error();       // why the last launch failed; empty if it did not
void cuda_on_cpu_seed(uint64_t seed);  // of the order of blocks and threads in the launches to come
void cuda_on_cpu_hopper(int64_t yes);  // whether they find clusters and mailboxes; at first not
}

namespace cuda_on_cpu {

// A line of the kernel's source. As a default argument it is the caller's.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Runs body(context) once a thread; `cluster` neighbours in x share a cluster; `kernel` is only named in errors.
// Returns a cudaError_t.
int run(const void* kernel, dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, void (*body)(const void*),
        const void* context);

bool is_hopper();

void* shared_memory();

// Ends the launch.
[[noreturn]] void fail(const char* operation, Site site, const char* why);

// Waits for all threads of the block.
void meet_block(const char* operation, Site site);

constexpr int kSum = -1;

// Waits for the lanes of the mask; what lane `source` gave, or the sum of what all gave.
uint64_t meet_lanes(const char* operation, unsigned mask, uint64_t value, int source, Site site);

inline unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize; }

template <class T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "CUDA shuffles 32 and 64-bit numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_lanes(operation, mask, bits, static_cast<int>(source), site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

template <class T>
void check_aligned(const char* operation, const T* address, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) fail(operation, site, "misaligned address");
}

// --- clusters and what arrives later, for cuda/hopper.h

unsigned cluster_size();
unsigned cluster_rank();

// Waits for all threads of the cluster.
void meet_cluster(const char* operation, Site site);

// Where block `rank` of the cluster has what lies at this address of the calling block's dynamic shared memory.
void* in_block(unsigned rank, void* address, size_t bytes, const char* operation, Site site);

// What is on its way.
struct Transfer {
  void* to;
  std::vector<unsigned> words;
};

// Reads and writes in the kernel's name, so that sanitizers see it; leaves NaN until the transfer arrives.
template <class T>
Transfer depart(T* to, const T* from, size_t count) {
  Transfer transfer = {to, std::vector<unsigned>(count * sizeof(T) / sizeof(unsigned))};
  T nothing;
  std::memset(&nothing, 0xff, sizeof(T));
  for (size_t i = 0; i < count; ++i) {
    const T value = from[i];
    std::memcpy(transfer.words.data() + i * sizeof(T) / sizeof(unsigned), &value, sizeof(T));
    to[i] = nothing;
  }
  return transfer;
}

// Copies of the running thread, in groups.
void copy_until_waited_for(Transfer transfer);
void end_group_of_copies();
void wait_for_groups(unsigned pending);  // all but the latest `pending`
void wait_for_copies();

// An mbarrier, each phase of which one arrival and the bytes that it announces complete.
struct alignas(8) Barrier {
  int32_t missing;  // bytes; below 0 where they come before they are announced
  uint8_t arrived, phase;
  uint16_t opened;
};

void open(Barrier& barrier);
void check_open(const char* operation, const Barrier& barrier, Site site);
void expect(const char* operation, Barrier& barrier, int bytes, Site site);
void post(const char* operation, Transfer transfer, Barrier& barrier, unsigned rank, Site site);
void wait(const char* operation, Barrier& barrier, int phase, Site site);

// ---

template <class T, class Update>
T update_atomically(T* address, const Update& update) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long> ||
                    std::is_same_v<T, float> || std::is_same_v<T, double>,
                "CUDA has atomics on int, unsigned, unsigned long long, float and double");
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do next = update(old);
  while (!__atomic_compare_exchange(address, &old, &next, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace cuda_on_cpu

// --- barriers, shuffles, votes ------------------------------------------------------------------------------------

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::meet_block("__syncthreads", site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::meet_lanes("__syncwarp", mask, 0, cuda_on_cpu::kSum, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  const uint64_t bit = static_cast<uint64_t>(predicate != 0) << cuda_on_cpu::lane();
  return static_cast<unsigned>(cuda_on_cpu::meet_lanes("__ballot_sync", mask, bit, cuda_on_cpu::kSum, site));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::meet_lanes("__any_sync", mask, predicate != 0, cuda_on_cpu::kSum, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::meet_lanes("__all_sync", mask, predicate == 0, cuda_on_cpu::kSum, site) == 0;
}

// Within segments of `width` lanes; a lane whose source lies outside its segment keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane(), inside = static_cast<unsigned>(source) % width;
  return cuda_on_cpu::shuffle("__shfl_sync", mask, value, lane / width * width + inside, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane();
  return cuda_on_cpu::shuffle("__shfl_up_sync", mask, value, lane % width < delta ? lane : lane - delta, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane(), end = lane / width * width + width;
  return cuda_on_cpu::shuffle("__shfl_down_sync", mask, value, lane + delta < end ? lane + delta : lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane(), other = lane ^ static_cast<unsigned>(bits);
  return cuda_on_cpu::shuffle("__shfl_xor_sync", mask, value, other / width <= lane / width ? other : lane, site);
}

// --- memory -------------------------------------------------------------------------------------------------------

#define CUDA_ON_CPU_LOAD(name)                        \
  template <class T>                                  \
  T name(const T* address, CUDA_ON_CPU_SITE) {        \
    cuda_on_cpu::check_aligned(#name, address, site); \
    return *address;                                  \
  }
#define CUDA_ON_CPU_STORE(name)                                          \
  template <class T>                                                     \
  void name(T* address, std::common_type_t<T> value, CUDA_ON_CPU_SITE) { \
    cuda_on_cpu::check_aligned(#name, address, site);                    \
    *address = value;                                                    \
  }
// The value's type is the pointer's.
#define CUDA_ON_CPU_ATOMIC(name, expression)                                                           \
  template <class T>                                                                                   \
  T name(T* address, std::common_type_t<T> value) {                                                    \
    return cuda_on_cpu::update_atomically(address, [&](T old) { return static_cast<T>(expression); }); \
  }

CUDA_ON_CPU_LOAD(__ldg)
CUDA_ON_CPU_LOAD(__ldcs)
CUDA_ON_CPU_STORE(__stcs)

CUDA_ON_CPU_ATOMIC(atomicAdd, old + value)
CUDA_ON_CPU_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicOr, old | value)

template <class T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return cuda_on_cpu::update_atomically(address, [&](T old) { return old == expected ? value : old; });
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// --- arithmetic ---------------------------------------------------------------------------------------------------

using std::max;
using std::min;
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline void sincospif(float x, float* sine, float* cosine) {
  *sine = static_cast<float>(sin(3.141592653589793 * x));
  *cosine = static_cast<float>(cos(3.141592653589793 * x));
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(static_cast<uint64_t>(x) * y >> 32); }

inline float __int_as_float(int x) { return cuda_on_cpu::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_as<unsigned>(x); }
