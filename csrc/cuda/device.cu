// What the driver and the devices can run.
#include <cuda_runtime_api.h>

#include "ops.h"

namespace dimo::cuda {
namespace {

__global__ void probe() {}

}  // namespace

int driver_status(Versions* versions) {
  *versions = {0, 0};
  cudaRuntimeGetVersion(&versions->runtime);
  cudaDriverGetVersion(&versions->driver);
  if (versions->driver == 0) return cudaErrorInsufficientDriver;
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  cudaGetLastError();  // a failure must not surface at the next launch
  return error == cudaSuccess && devices == 0 ? cudaErrorNoDevice : error;
}

int device_status(int device) {
  DeviceGuard guard(device);
  if (guard.error() != 0) return guard.error();
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);  // fails where no code fits the device
  cudaGetLastError();
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

DeviceGuard::DeviceGuard(int device) {
  error_ = cudaGetDevice(&previous_);
  if (error_ != 0 || previous_ == device) return;
  error_ = cudaSetDevice(device);
  switched_ = error_ == 0;
  if (!switched_) cudaGetLastError();  // a failure must not surface at the next launch
}

DeviceGuard::~DeviceGuard() {
  if (switched_) cudaSetDevice(previous_);
}

}  // namespace dimo::cuda
