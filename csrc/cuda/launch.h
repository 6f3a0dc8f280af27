// The only place where a kernel is launched. Tests that execute kernels on the host put their own file of this name
// earlier on the include path.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace dimo::cuda {

// Returns the launch's cudaError_t. The arguments convert to the kernel's parameter types.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// The launch's dynamic shared memory, aligned for any vector.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

}  // namespace dimo::cuda
