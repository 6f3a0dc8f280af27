// Confident reveals: two launches, the draw of the masked positions and a choice among them, one block a sample. The
// choice reads 20 bytes a token and writes 8; a sample's keys wait in its part of the output, which each thread alone
// reads again.
#include "common/reveal.h"

#include <cstdint>
#include <limits>

#include "cuda/launch.h"
#include "cuda/select.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

// The tokens of a sample, of which each thread owns blocks of four.
struct Sample {
  const RevealConfidentArgs& args;
  int64_t index, first;
  uint32_t length;

  __device__ Sample(const RevealConfidentArgs& a)
      : args(a),
        index(blockIdx.x),
        first(index * a.draw.rows_per_sample),
        length(static_cast<uint32_t>(a.draw.rows_per_sample)) {}

  __device__ int64_t state(uint32_t i) const { return args.draw.wanted.state[first + i]; }
  __device__ uint64_t key(uint32_t i) const { return static_cast<uint64_t>(args.out_tokens[first + i]); }

  // Calls visit(block) for the blocks of this thread.
  template <class Visit>
  __device__ void each_block(const Visit& visit) const {
    for (uint32_t block = threadIdx.x; 4 * block < length; block += blockDim.x) visit(block);
  }

  // Calls visit(i) for the tokens of this thread.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    each_block([&](uint32_t block) {
      for (uint32_t i = 4 * block; i < 4 * block + 4 && i < length; ++i) visit(i);
    });
  }

  // Writes the keys and returns how many positions of the sample are masked.
  __device__ uint32_t write_keys() const {
    const SampleCategoricalArgs& draw = args.draw;
    const RowStream stream(draw.key, draw.key_stride, OperatorTag::reveal, index);
    uint32_t masked = 0;
    each_block([&](uint32_t block) {
      const Words4 words = stream.words(block);
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t i = 4 * block + j;
        if (i >= length) break;
        const bool here = state(i) == draw.wanted.mask_id;
        const uint64_t key =
            here ? confidence_key(draw.log_prob[first + i], args.noise_scale, words.word[j]) : kNoCandidate;
        args.out_tokens[first + i] = static_cast<int64_t>(key);
        masked += here;
      }
    });
    return block_sum(masked);
  }

  // Calls visit(key) for the keys of this thread.
  template <class Visit>
  __device__ void each_key(const Visit& visit) const {
    each([&](uint32_t i) { visit(key(i)); });
  }
};

__global__ __launch_bounds__(kMaxThreads) void reveal_confident_kernel(const RevealConfidentArgs args) {
  const Sample sample(args);
  const int64_t masked = sample.write_keys(), wanted = args.counts != nullptr ? args.counts[sample.index] : args.count;
  const int64_t k = wanted < masked ? wanted : masked;
  uint64_t bound = 0, last_tie = kNoCandidate;
  if (k > 0) {
    const KeySearch search =
        find_smallest(static_cast<uint32_t>(k), [&](const auto& visit) { sample.each_key(visit); });
    bound = search.bound();
    if (search.tied) {  // the first ones by index
      const KeySearch first = find_smallest(search.rank, [&](const auto& visit) {
        sample.each([&](uint32_t i) { visit(sample.key(i) == bound ? sort_key(i, 0) : kNoCandidate); });
      });
      last_tie = first.bound();
    }
  }
  sample.each([&](uint32_t i) {
    const uint64_t key = sample.key(i);
    const bool revealed = k > 0 && (key < bound || (key == bound && sort_key(i, 0) <= last_tie));
    args.out_tokens[sample.first + i] = revealed ? args.draw.tokens[sample.first + i] : sample.state(i);
  });
}

}  // namespace

int reveal_confident(const RevealConfidentArgs& args, void* stream) {
  if (args.draw.shape.rows == 0) return cudaSuccess;
  const int64_t length = args.draw.rows_per_sample, samples = args.draw.shape.rows / length;
  if (samples > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const int error = sample_categorical(args.draw, stream);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(samples)), block(threads_for(length));
  return launch(reveal_confident_kernel, grid, block, 0, stream, args);
}

}  // namespace dimo::cuda
