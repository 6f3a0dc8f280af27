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
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

struct RowWords {
  RowStream stream;
  uint32_t length;
  Words4 first;

  template <class Args>
  __device__ RowWords(const Args& args, OperatorTag tag, int64_t row)
      : stream(args.key, args.key_stride, tag, row),
        length(static_cast<uint32_t>(args.length)),
        first(stream.words(threadIdx.x)) {}

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

// Sum over the block; total is shared memory.
__device__ uint32_t block_sum(uint32_t value, uint32_t* total) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  if (threadIdx.x == 0) *total = 0;
  __syncthreads();
  if (threadIdx.x % kWarp == 0) atomicAdd(total, value);
  __syncthreads();
  return *total;
}

__device__ int64_t masked_count(const MaskTokensArgs& args, int64_t row, const RowWords& words) {
  __shared__ uint32_t total;
  const float ratio = args.ratios != nullptr ? args.ratios[row] : args.ratio;
  if (!args.bernoulli) return bounded_count(exact_count(ratio, args.length), args.min_masked, args.length);
  const uint64_t threshold = bernoulli_threshold(ratio);
  uint32_t below = 0;
  words.each([&](uint32_t word, uint32_t) { below += word < threshold; });
  return bounded_count(block_sum(below, &total), args.min_masked, args.length);
}

// The first warp finds the digit under which the key of this rank lies: a prefix sum over lanes shows the one lane that
// holds it, and that lane searches its share.
__device__ void choose_digit(const uint32_t* histogram, uint32_t rank, DigitChoice* choice) {
  constexpr uint32_t kShare = kDigits / kWarp;
  const uint32_t lane = threadIdx.x;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kShare; ++i) sum += histogram[lane * kShare + i];
  uint32_t through = sum;
  for (uint32_t step = 1; step < kWarp; step *= 2) {
    const uint32_t lower = __shfl_up_sync(kAllLanes, through, step);
    if (lane >= step) through += lower;
  }
  uint32_t before = through - sum;
  if (rank <= before || rank > through) return;
  uint32_t digit = lane * kShare;
  for (; before + histogram[digit] < rank; ++digit) before += histogram[digit];
  *choice = {digit, before, histogram[digit]};
}

// Radix select over the row's sort keys; the same walk as on the CPU.
__device__ uint64_t bound_of_smallest(uint32_t k, const RowWords& words) {
  __shared__ uint32_t histogram[kDigits];
  __shared__ DigitChoice choice;
  KeySearch search(k);
  while (!search.done) {
    for (uint32_t i = threadIdx.x; i < kDigits; i += blockDim.x) histogram[i] = 0;
    __syncthreads();
    words.each([&](uint32_t word, uint32_t index) {
      const uint64_t key = sort_key(word, index);
      if (search.candidate(key)) atomicAdd(&histogram[search.digit(key)], 1u);
    });
    __syncthreads();
    if (threadIdx.x < kWarp) choose_digit(histogram, search.rank, &choice);
    __syncthreads();
    search.descend(choice);
  }
  return search.bound();
}

__global__ __launch_bounds__(kMaxThreads) void mask_tokens_kernel(MaskTokensArgs args) {
  const int64_t row = blockIdx.x;
  const RowWords words(args, OperatorTag::mask_tokens, row);
  const int64_t k = masked_count(args, row, words);
  const uint64_t bound = k > 0 ? bound_of_smallest(static_cast<uint32_t>(k), words) : 0;

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
  const uint64_t bound = k > 0 ? bound_of_smallest(static_cast<uint32_t>(k), words) : 0;

  int64_t* out = args.out_tokens + row * args.length;
  const RowWords ids(args, OperatorTag::init_ids, row);
  ids.each([&](uint32_t word, uint32_t index) { out[index] = scaled_word(word, args.vocab_size); });
  if (k == 0) return;
  words.each([&](uint32_t word, uint32_t index) {
    if (sort_key(word, index) <= bound) out[index] = args.mask_id;  // the same thread wrote the id
  });
}

unsigned threads_for(int64_t length) {
  const int64_t warps = (length + 4 * kWarp - 1) / (4 * kWarp);
  return static_cast<unsigned>(warps * kWarp < kMaxThreads ? warps * kWarp : kMaxThreads);
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
