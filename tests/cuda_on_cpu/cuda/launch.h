// Launches a kernel on the CPU; stands in for csrc/cuda/launch.h.
#pragma once

#include <cuda_runtime_api.h>

namespace dimo::cuda {

inline bool has_clusters() { return cuda_on_cpu::is_hopper(); }

template <class... Parameters, class... Arguments>
int launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block, size_t shared_bytes,
                    const Arguments&... arguments) {
  const auto thread = [&] { kernel(arguments...); };
  using Thread = decltype(thread);
  const auto body = [](const void* context) { (*static_cast<Thread*>(context))(); };
  return cuda_on_cpu::run(reinterpret_cast<const void*>(kernel), grid, block, cluster, shared_bytes, body, &thread);
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void*,
           const Arguments&... arguments) {
  return launch_clusters(kernel, 1, grid, block, shared_bytes, arguments...);
}

// Fewer clusters than there is work, so that each does several pieces.
template <class... Parameters, class... Arguments>
int launch_resident(void (*kernel)(Parameters...), unsigned cluster, int64_t most, unsigned block, size_t shared_bytes,
                    void*, const Arguments&... arguments) {
  const unsigned clusters = static_cast<unsigned>(most < 3 ? most : 3);
  return launch_clusters(kernel, cluster, dim3(cluster * clusters), dim3(block), shared_bytes, arguments...);
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(cuda_on_cpu::shared_memory());
}

}  // namespace dimo::cuda
