// Which instruction set the SIMD kernels use.
#include "cpu/isa.h"

#include <atomic>

namespace dimo::cpu {
namespace {

std::atomic<Isa>& choice() {
  static std::atomic<Isa> isa{widest_isa()};
  return isa;
}

}  // namespace

Isa widest_isa() {
#if defined(DIMO_X86)
  // What the compiler was told to use, x86-64-v3 and -v4.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa current_isa() { return choice().load(std::memory_order_relaxed); }

void choose_isa(Isa isa) { choice().store(isa, std::memory_order_relaxed); }

}  // namespace dimo::cpu
