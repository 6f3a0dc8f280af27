// Token-level f-divergence and its gradient in one launch. From memory it reads every logit once and writes every
// gradient once: a row lives in the registers of the threads that share it, lanes of a warp, a block or a cluster of
// blocks, as the vocabulary asks. Rows that do not count are not read: zeros are written.
//
// Ordinary rows take the fast path (FastRow). Those with -inf, a floor, tops far apart or a gradient that the dtype
// cannot hold are done once more by GeneralRow, as are rows that 16-byte loads or registers cannot serve.
//
// With DIMO_DIVERGENCE, a functor's name, its kernels alone are compiled, with DIMO_DISPATCH all but kernels: so that
// several cores share the work.
#include <cstdint>
#include <initializer_list>

#include "common/divergences.h"
#include "common/scalar_math.h"
#include "cuda/divergence_block.h"
#include "cuda/divergence_lanes.h"
#include "cuda/launch.h"
#include "ops.h"

namespace dimo::cuda {

template <class D>
int launch_divergence(const TokenDivergenceArgs& args, void* stream);

#if !defined(DIMO_DISPATCH)

namespace {

template <class Divergence, int kLanes, int kHeld>
int launch_lanes(const TokenDivergenceArgs& args, void* stream) {
  constexpr int kRows = Lanes<Divergence, kLanes, kHeld>::kRows;
  const int64_t blocks = (args.shape.rows + kRows - 1) / kRows;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  bool dense = true;
  int bytes = 0;
  for (const LogitRows* logits : {&args.teacher, &args.auxiliary, &args.uncond, &args.gradient}) {
    if (logits->data == nullptr) continue;
    dense &= is_dense(args.shape, *logits) && reinterpret_cast<uintptr_t>(logits->data) % 16 == 0;
    bytes += span_bytes(*logits, kRows, args.shape.vocab);
  }
  return launch(lanes_kernel<Divergence, kLanes, kHeld>, dim3(static_cast<unsigned>(blocks)), dim3(kLanesBlock),
                dense ? static_cast<size_t>(bytes) : 0, stream, args, Rates(args), dense);
}

template <class Divergence, int kPacks>
int launch_blocks(const TokenDivergenceArgs& args, void* stream) {
  constexpr int64_t kHeld = kPacks * kPack + 1, kMost = kMostThreads * kHeld;
  if (args.shape.rows > kMostRows) return cudaErrorInvalidConfiguration;
  const int64_t vocab = args.shape.vocab;
  int64_t cluster = (vocab + kMost - 1) / kMost;
  if (cluster > kMostBlocks || !has_clusters()) cluster = 1;  // GeneralRow takes what does not fit
  TokenDivergenceArgs call = args;
  if (cluster > 1) call.ticket = nullptr;
  const int64_t slice = ((vocab + cluster - 1) / cluster + kPack - 1) / kPack * kPack;
  int64_t threads = ((slice + kHeld - 1) / kHeld + kWarp - 1) / kWarp * kWarp;
  if (threads > kMostThreads) threads = kMostThreads;
  int64_t cells = cells_of(args.teacher.dtype) + cells_of(args.auxiliary.dtype);
  if (args.uncond.data != nullptr) cells += cells_of(args.uncond.dtype);
  const int64_t scratch =
      Team<0>::scratch_bytes(static_cast<int>(threads / kWarp * cluster)) + 2 * sizeof(Mailbox) + sizeof(Notes);
  return launch_resident(block_kernel<Divergence, kPacks>, static_cast<unsigned>(cluster), args.shape.rows,
                         static_cast<unsigned>(threads), static_cast<size_t>(scratch + cells * kPacks * threads * 16),
                         stream, call, Rates(args), Divergence(args.parameter), static_cast<int>(slice));
}

template <class Divergence>
int launch_columns(const TokenDivergenceArgs& args, void* stream) {
  const int64_t blocks = (args.shape.rows + kWarp - 1) / kWarp;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  return launch(columns_kernel<Divergence>, dim3(static_cast<unsigned>(blocks)), dim3(kColumnThreads),
                static_cast<size_t>(Team<kColumns>::scratch_bytes(kColumnThreads / kWarp)), stream, args,
                Divergence(args.parameter));
}

}  // namespace

template <class D>
int launch_divergence(const TokenDivergenceArgs& args, void* stream) {
  if (args.shape.vocab <= 33) return launch_lanes<D, 1, 33>(args, stream);
  if (args.auxiliary.vocab_stride != 1) return launch_columns<D>(args, stream);
  if (args.shape.vocab <= 4 * 17) return launch_lanes<D, 4, 17>(args, stream);
  if (args.shape.vocab <= 16 * 17) return launch_lanes<D, 16, 17>(args, stream);
  if (args.shape.vocab <= kWarp * 17) return launch_blocks<D, 2>(args, stream);
  return launch_blocks<D, 4>(args, stream);
}

#endif

#if defined(DIMO_DIVERGENCE)

template int launch_divergence<DIMO_DIVERGENCE<ScalarMath>>(const TokenDivergenceArgs& args, void* stream);

#else

int token_divergence(const TokenDivergenceArgs& given, void* stream) {
  if (given.shape.rows == 0) return cudaSuccess;
  TokenDivergenceArgs args = given;
  merge_dims(args.shape, {&args.teacher, &args.uncond, &args.auxiliary, &args.gradient});
  return with_divergence<ScalarMath>(
      args.kind, [&](auto divergence) { return launch_divergence<typename decltype(divergence)::type>(args, stream); });
}

#endif

}  // namespace dimo::cuda
