// Embedding noise: one launch. Reads and writes every element once, 2 or 4 bytes; a thread owns four neighbours, the
// words of one Philox call.
#include <cstdint>
#include <type_traits>

#include "common/sampling.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1 << 16;

// Two standard normal numbers from two words, by Box-Muller.
__device__ inline void normal_pair(uint32_t word0, uint32_t word1, float& first, float& second) {
  const float radius = sqrtf(2.0f * negative_log(word0));
  // The angle in quarter turns: the nearest integer, and exactly what is left.
  const uint32_t quarter = (word1 + 0x20000000u) >> 30;
  const float rest = static_cast<float>(static_cast<int32_t>(word1 << 2)) * 0x1p-32f + 0x1p-31f;
  float sine, cosine;
  sincospif(0.5f * rest, &sine, &cosine);
  const float x = (quarter & 1u) != 0 ? sine : cosine, y = (quarter & 1u) != 0 ? cosine : sine;
  first = ((quarter + 1) & 2u) != 0 ? -radius * x : radius * x;
  second = (quarter & 2u) != 0 ? -radius * y : radius * y;
}

__global__ __launch_bounds__(kThreads) void perturb_embeddings_kernel(const PerturbEmbeddingsArgs args, float keep) {
  const int64_t width = args.shape.vocab, blocks = (width + 3) / 4, total = args.shape.rows * blocks;
  const float scale = static_cast<float>(args.sigma) * *args.scale;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / blocks, first = (i - row * blocks) * 4;
    const RowStream stream(args.key, args.key_stride, OperatorTag::perturb_embeddings, row, args.rows_per_sample);
    const Words4 words = stream.words(static_cast<uint32_t>(first / 4));
    float noise[4];
    normal_pair(words.word[0], words.word[1], noise[0], noise[1]);
    normal_pair(words.word[2], words.word[3], noise[2], noise[3]);
    const int64_t from = args.ids == nullptr ? row_offset(args.shape, args.embeddings, row)
                                             : table_offset(args.embeddings, args.table_rows, args.ids[row]);
    const int64_t to = row_offset(args.shape, args.out, row);
    with_type(args.out.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* const in = static_cast<const T*>(args.embeddings.data) + from;
      T* const out = static_cast<T*>(args.out.data) + to;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + j < width)
          out[first + j] =
              from_float<T>(noise[j] * scale + keep * to_float(in[(first + j) * args.embeddings.vocab_stride]));
    });
  }
}

}  // namespace

int perturb_embeddings(const PerturbEmbeddingsArgs& args, void* stream) {
  const int64_t threads = args.shape.rows * ((args.shape.vocab + 3) / 4);
  if (threads == 0) return cudaSuccess;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks));
  const auto keep = static_cast<float>(sqrt(1.0 - args.sigma * args.sigma));
  return launch(perturb_embeddings_kernel, grid, dim3(kThreads), 0, stream, args, keep);
}

}  // namespace dimo::cuda
