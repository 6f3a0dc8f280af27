// SIMD kernels are compiled once an instruction set; this says which one runs.
#pragma once

#include <cstdint>

#include "ops.h"

namespace dimo::cpu {

// Wider sets last. Only x86 has more than the baseline.
enum class Isa { baseline, avx2, avx512 };

#if defined(DIMO_X86)
#define DIMO_EACH_ISA(declare) declare(baseline) declare(avx2) declare(avx512)
#else
#define DIMO_EACH_ISA(declare) declare(baseline)
#endif

#define DIMO_DECLARE(isa)                                                                      \
  namespace isa {                                                                              \
  void token_divergence_rows(const TokenDivergenceArgs& args, int64_t begin, int64_t end);     \
  void scale_gradient_rows(const ScaleGradientArgs& args, int64_t begin, int64_t end);         \
  void cross_entropy_rows(const CrossEntropyArgs& args, int64_t begin, int64_t end);           \
  void sample_categorical_rows(const SampleCategoricalArgs& args, int64_t begin, int64_t end); \
  void perturb_embeddings_rows(const PerturbEmbeddingsArgs& args, int64_t begin, int64_t end); \
  }
DIMO_EACH_ISA(DIMO_DECLARE)
#undef DIMO_DECLARE

// The widest set that this machine runs and this module was compiled for.
Isa widest_isa();

// The set in use: the widest one, unless another was chosen.
Isa current_isa();
void choose_isa(Isa isa);

// The kernel of the set in use, as a function pointer.
#if defined(DIMO_X86)
#define DIMO_PICK(kernel) \
  (current_isa() == Isa::avx512 ? &avx512::kernel : current_isa() == Isa::avx2 ? &avx2::kernel : &baseline::kernel)
#else
#define DIMO_PICK(kernel) (&baseline::kernel)
#endif

}  // namespace dimo::cpu
