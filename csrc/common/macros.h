// One spelling for functions that both the host and the CUDA compiler see.
#pragma once

#if defined(__CUDACC__)
#define DIMO_HOST_DEVICE __host__ __device__
#else
#define DIMO_HOST_DEVICE
#endif
