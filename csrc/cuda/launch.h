// The only place where a kernel is launched. Tests that execute kernels on the host put their own file of this name
// earlier on the include path.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

namespace dimo::cuda {

// A block gets 48 KB unasked; this leaves room for what the kernel declares itself.
constexpr size_t kSharedWithoutAsking = 16 << 10;

inline cudaError_t allow_shared_bytes(const void* kernel, size_t bytes) {
  if (bytes <= kSharedWithoutAsking) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
}

// Returns the launch's cudaError_t. The arguments convert to the kernel's parameter types.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           const Arguments&... arguments) {
  const cudaError_t error = allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes);
  if (error != cudaSuccess) return error;
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

// Stands for the kernels of a file, all of which are compiled for the same architectures.
template <int = 0>
__global__ void any_kernel() {}

// Whether blocks can form clusters: on the current device, in code that was not compiled for an older one.
inline bool has_clusters() {
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess || major < 9) return false;
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, any_kernel<>) == cudaSuccess && attributes.ptxVersion >= 90;
}

// Launches as many clusters of blocks as fit the device at once, at most `most`: the kernel's loop shares the work out.
template <class... Parameters, class... Arguments>
int launch_resident(void (*kernel)(Parameters...), unsigned cluster, int64_t most, unsigned block, size_t shared_bytes,
                    void* stream, const Arguments&... arguments) {
  const auto* address = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared_bytes(address, shared_bytes);
  if (error != cudaSuccess) return error;
  int device = 0, processors = 0, resident = 0;
  if ((error = cudaGetDevice(&device)) != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  if (cluster > 8) {
    error = cudaFuncSetAttribute(address, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (cluster > 1) {
    error = cudaOccupancyMaxActiveClusters(&resident, address, &config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, static_cast<int>(block), shared_bytes);
    resident *= processors;
  }
  if (error != cudaSuccess) return error;
  if (resident == 0) return cudaErrorLaunchOutOfResources;
  config.gridDim.x = cluster * static_cast<unsigned>(most < resident ? most : resident);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// The launch's dynamic shared memory, aligned for any vector.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

}  // namespace dimo::cuda
