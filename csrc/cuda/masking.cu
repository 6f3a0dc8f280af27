// Forward masking and initial tokens: one block a sample, one launch, no workspace. Reads at most 8 and writes at most
// 9 bytes a token.
//
// Every thread owns blocks of four tokens, the words of one Philox call. It keeps its first four words (all there are
// up to length 4 * kMaxThreads) and draws the others anew in each pass, so that any length works without storing words.
#include <cstdint>
#include <limits>

#include "common/masking.h"
#include "common/philox.h"
#include "cuda/launch.h"
#include "cuda/select.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

struct RowWords {
  RowStream stream;
  uint32_t length;
  Words4 first;

  template <class Args>
  __device__ RowWords(const Args& args, OperatorTag tag, int64_t row)
      : stream(args.key, args.key_stride, tag, row),
        length(static_cast<uint32_t>(args.length)),
        first(stream.words(threadIdx.x)) {}

  // Finds the k smallest sort keys and returns the largest of them; k > 0.
  __device__ uint64_t bound_of_smallest(int64_t k) const {
    const auto each_key = [&](const auto& visit) {
      each([&](uint32_t word, uint32_t index) { visit(sort_key(word, index)); });
    };
    return find_smallest(static_cast<uint32_t>(k), each_key).bound();
  }

  // Calls visit(word, index) for the tokens of this thread.
  template <class Visit>
  __device__ void each(const Visit& visit) const {
    for (uint32_t block = threadIdx.x; 4 * block < length; block += blockDim.x) {
      const Words4 words = block == threadIdx.x ? first : stream.words(block);
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        if (4 * block + i < length) visit(words.word[i], 4 * block + i);
    }
  }
};

__device__ int64_t masked_count(const MaskTokensArgs& args, int64_t row, const RowWords& words) {
  const float ratio = scheduled_ratio(args.schedule, args.ratios != nullptr ? args.ratios[row] : args.ratio);
  if (!args.bernoulli) return bounded_count(exact_count(ratio, args.length), args.min_masked, args.length);
  const uint64_t threshold = bernoulli_threshold(ratio);
  uint32_t below = 0;
  words.each([&](uint32_t word, uint32_t) { below += word < threshold; });
  return bounded_count(block_sum(below), args.min_masked, args.length);
}

__global__ __launch_bounds__(kMaxThreads) void mask_tokens_kernel(MaskTokensArgs args) {
  const int64_t row = blockIdx.x;
  const RowWords words(args, OperatorTag::mask_tokens, row);
  const int64_t k = masked_count(args, row, words);
  const uint64_t bound = k > 0 ? words.bound_of_smallest(k) : 0;

  const int64_t start = row * args.length;
  words.each([&](uint32_t word, uint32_t index) {
    const bool masked = k > 0 && sort_key(word, index) <= bound;
    args.out_mask[start + index] = masked;
    args.out_tokens[start + index] = masked ? args.mask_id : args.tokens[start + index];
  });
}

__global__ __launch_bounds__(kMaxThreads) void init_tokens_kernel(InitTokensArgs args) {
  const int64_t row = blockIdx.x;
  const RowWords words(args, OperatorTag::init_mask, row);
  const int64_t k = exact_count(args.ratio, args.length);
  const uint64_t bound = k > 0 ? words.bound_of_smallest(k) : 0;

  int64_t* out = args.out_tokens + row * args.length;
  const RowWords ids(args, OperatorTag::init_ids, row);
  ids.each([&](uint32_t word, uint32_t index) { out[index] = scaled_word(word, args.vocab_size); });
  if (k == 0) return;
  words.each([&](uint32_t word, uint32_t index) {
    if (sort_key(word, index) <= bound) out[index] = args.mask_id;  // the same thread wrote the id
  });
}

// A block a row.
template <class Args>
int launch_rows(void (*kernel)(Args), const Args& args, void* stream) {
  if (args.batch == 0 || args.length == 0) return cudaSuccess;
  if (args.batch > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(args.batch));
  return launch(kernel, grid, dim3(threads_for(args.length)), 0, stream, args);
}

}  // namespace

int mask_tokens(const MaskTokensArgs& args, void* stream) { return launch_rows(mask_tokens_kernel, args, stream); }

int init_tokens(const InitTokensArgs& args, void* stream) { return launch_rows(init_tokens_kernel, args, stream); }

}  // namespace dimo::cuda
