// One spelling for functions that both the host and the CUDA compiler see.
#pragma once

#if defined(__CUDACC__)
#define DIMO_HOST_DEVICE __host__ __device__
#define DIMO_NOINLINE __noinline__
#else
#define DIMO_HOST_DEVICE
#define DIMO_NOINLINE __attribute__((noinline))
#endif

#if defined(__CUDA_ARCH__) || defined(__clang__)
#define DIMO_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)
#define DIMO_UNROLL  // nvcc's host pass knows neither spelling
#else
#define DIMO_UNROLL _Pragma("GCC unroll 16")
#endif

// Before a loop that would only grow.
#if defined(__CUDA_ARCH__)
#define DIMO_LOOP _Pragma("unroll 1")
#else
#define DIMO_LOOP
#endif
