// Launches a kernel on the CPU; stands in for csrc/cuda/launch.h.
#pragma once

#include <cuda_runtime_api.h>

namespace dimo::cuda {

// Less than a GPU has, so that rows need not be long to be too long for it.
inline size_t max_shared_bytes() { return 32 << 10; }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           const Arguments&... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  using Thread = decltype(thread);
  const auto body = [](const void* context) { (*static_cast<Thread*>(context))(); };
  return cuda_on_cpu::run(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, body, &thread);
}

inline bool has_clusters() { return false; }

// Few blocks, so that each has several rows to do.
template <class... Parameters, class... Arguments>
int launch_resident(void (*kernel)(Parameters...), unsigned, int64_t most, unsigned block, size_t shared_bytes, void*,
                    const Arguments&... arguments) {
  return launch(kernel, dim3(static_cast<unsigned>(most < 3 ? most : 3)), dim3(block), shared_bytes, nullptr,
                arguments...);
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(cuda_on_cpu::shared_memory());
}

}  // namespace dimo::cuda
