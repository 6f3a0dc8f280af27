// Every launcher of the library. Raw pointers and sizes only: no framework, no Python.
//
// CPU launchers take the number of threads they may use. CUDA launchers take a stream (a cudaStream_t), run on the
// current device, neither allocate nor synchronise, and return a cudaError_t as int: 0 is success.
#pragma once

#include <cstdint>

#include "common/masking.h"
#include "common/rows.h"

namespace dimo {

// Masks the k tokens of each row that carry the smallest random words (ties: lower index first); common/masking.h
// defines k. All arrays are contiguous, [batch, length] unless said otherwise; out_tokens must not overlap tokens.
struct MaskTokensArgs {
  const int64_t* tokens;
  int64_t* out_tokens;
  bool* out_mask;
  int64_t batch;
  int64_t length;
  float ratio;          // of every row, unless `ratios` is given
  const float* ratios;  // [batch] or null
  const int64_t* key;   // (seed, offset), one for all rows or one a row
  int64_t key_stride;   // 0 or 2
  int64_t mask_id;
  int64_t min_masked;
  bool bernoulli;
  MaskSchedule schedule;  // the ratios are r of the numbers given
};

// The student's input: uniform random ids below vocab_size, of which exactly rint(ratio * length) a row become mask_id.
struct InitTokensArgs {
  int64_t* out_tokens;  // [batch, length], contiguous
  int64_t batch;
  int64_t length;
  float ratio;
  const int64_t* key;  // as in MaskTokensArgs
  int64_t key_stride;
  int64_t mask_id;
  uint32_t vocab_size;
};

// Derives keys: row n of the stream of each key becomes a new (seed, offset).
struct FoldInArgs {
  const int64_t* key;  // as in MaskTokensArgs
  int64_t key_stride;
  int64_t n;               // for every key, unless `numbers` is given
  const int64_t* numbers;  // [count] or null
  int64_t* out;            // [count, 2]
  int64_t count;
};

// The words that uniform numbers are made of: row 0 of the key's stream.
struct UniformWordsArgs {
  const int64_t* key;  // (seed, offset)
  int64_t* out;        // [count], in [0, 2^32)
  int64_t count;
};

enum class DivergenceKind : int32_t {
  forward_kl,
  reverse_kl,
  jeffreys,
  jensen_shannon,
  squared_hellinger,
  total_variation,
  pearson_chi2,
  neyman_chi2,
  alpha,
  le_cam,
};

// D(p | q) of each token, p = softmax(teacher / t_p), q = softmax(auxiliary / t_q), times the token's factor, and its
// gradient with respect to the auxiliary logits. Tokens that the mask leaves out are not read; where they
// are left out, or their factor is 0, value and gradient are 0. So are those of a row without a finite logit.
struct TokenDivergenceArgs {
  DivergenceKind kind;
  double parameter;  // beta, pi or alpha
  RowShape shape;
  LogitRows teacher;
  LogitRows uncond;  // data null: no guidance
  LogitRows auxiliary;
  LogitRows gradient;    // written; data null: only the values are wanted
  float guidance_scale;  // of every sample, unless `guidance` is given: uncond + s (teacher - uncond); 1 ignores uncond
  const float* guidance;  // [samples] or null
  int64_t rows_per_sample;
  float teacher_temperature;
  float auxiliary_temperature;
  float teacher_log_floor;  // lower bound of log p; -inf = none
  const bool* mask;         // [rows] or null
  const float* factor;      // [rows] (factor_stride 1), one for all (0), or null = 1
  int64_t factor_stride;
  bool factor_in_gradient;  // else the values alone are multiplied
  float* value;             // [rows]
  int64_t* zeroed;          // is increased by the number of rows whose gradient the dtype cannot hold: it is 0 there
  int32_t* ticket;  // a counter that is 0, with which CUDA blocks share rows out where some do not count; or null
};

// to = from * upstream * factor, computed in float; zeros stay zeros whatever they meet. `to` may be `from`.
struct ScaleGradientArgs {
  RowShape shape;
  LogitRows from, to;
  const float* upstream;  // [rows] (upstream_stride 1) or one for all (0)
  int64_t upstream_stride;
  const float* factor;  // the same, or null = 1
  int64_t factor_stride;
};

inline bool is_one_multiplier(const ScaleGradientArgs& args) {
  return args.upstream_stride == 0 && (args.factor == nullptr || args.factor_stride == 0);
}

// -(1 - e) log q_y - e/n sum_v log q_v of each token, q = softmax over the first n = valid_vocab logits, e the label
// smoothing, y its target; and the gradient, 0 beyond n. Tokens that the mask leaves out, or whose target lies outside
// [0, n), do not count: they are not read, value and gradient are 0. So are those of a row without a finite logit,
// which counts.
struct CrossEntropyArgs {
  RowShape shape;
  LogitRows logits;
  LogitRows gradient;      // written; data null: only the values are wanted
  const int64_t* targets;  // [rows]
  const bool* mask;        // [rows] or null
  int64_t valid_vocab;
  float label_smoothing;
  float scale;              // what multiplies value and gradient,
  bool mean;                // divided by the number of tokens that count
  bool factor_in_gradient;  // else the values alone are multiplied
  float* value;             // [rows]; where a total is wanted, its parts
  float* total;             // sum of the values, or null
  float* factor;            // written: scale over count
  uint32_t* workspace;      // [kCrossEntropyWorkspace], where a total is wanted; CUDA alone
};

constexpr int64_t kCrossEntropyWorkspace = 257;

// Which rows of a draw are wanted: those of positions that hold mask_id, each by a chance. The logits of others are not
// read.
struct WantedRows {
  const int64_t* state;  // [rows], or null: every row is wanted
  int64_t mask_id;
  double chance;         // of every position, unless `chances` is given
  const float* chances;  // [samples] or null
};

// Draws one id a row from softmax(logits / temperature): guidance, temperature, top-k, top-p, min-p, then the draw
// (common/sampling.h). A row without a finite logit, or with NaN or +inf, gives id -1 and log-probability -inf.
struct SampleCategoricalArgs {
  RowShape shape;
  LogitRows logits;
  LogitRows uncond;       // data null: no guidance
  float guidance_scale;   // as in TokenDivergenceArgs
  const float* guidance;  // [samples] or null
  int64_t rows_per_sample;
  const int64_t* key;  // (seed, offset), one for all samples or one a sample
  int64_t key_stride;  // 0 or 2
  double temperature;  // 0: the lowest of the ids with the largest logit
  int64_t top_k;       // 0 = all
  double top_p;        // 1 = all
  double min_p;        // 0 = all
  int64_t* tokens;     // [rows]; what the state holds where a row is not wanted
  float* log_prob;     // [rows], not written where a row is not wanted; or null
  WantedRows wanted;
};

// Draws an id for each masked position and reveals, in each sample, the `count` of them with the largest
// log-probability + noise_scale * Gumbel noise (ties: lower index first), all where there are fewer.
struct RevealConfidentArgs {
  SampleCategoricalArgs draw;  // its state is what the samples hold; tokens and log_prob serve as workspace
  int64_t* out_tokens;         // [rows]; must not overlap the others
  int64_t count;               // of every sample, unless `counts` is given
  const int64_t* counts;       // [samples] or null
  double noise_scale;
};

// sigma * scale * standard normal + sqrt(1 - sigma^2) * embeddings, rounded once. With ids the embeddings are a table,
// and each row is that of its id (ids outside the table: the first or the last).
struct PerturbEmbeddingsArgs {
  RowShape shape;  // the width is its vocab
  LogitRows embeddings;
  LogitRows out;
  int64_t rows_per_sample;
  const int64_t* key;  // as in SampleCategoricalArgs
  int64_t key_stride;
  double sigma;
  const float* scale;  // one number
  const int64_t* ids;  // [rows] or null
  int64_t table_rows;
};

namespace cpu {

void fold_in(const FoldInArgs& args, int num_threads);
void uniform_words(const UniformWordsArgs& args, int num_threads);
void mask_tokens(const MaskTokensArgs& args, int num_threads);
void init_tokens(const InitTokensArgs& args, int num_threads);
void token_divergence(const TokenDivergenceArgs& args, int num_threads);
void scale_gradient(const ScaleGradientArgs& args, int num_threads);
void masked_cross_entropy(const CrossEntropyArgs& args, int num_threads);
void sample_categorical(const SampleCategoricalArgs& args, int num_threads);
void reveal_confident(const RevealConfidentArgs& args, int num_threads);
void perturb_embeddings(const PerturbEmbeddingsArgs& args, int num_threads);

}  // namespace cpu

namespace cuda {

int fold_in(const FoldInArgs& args, void* stream);
int uniform_words(const UniformWordsArgs& args, void* stream);
int mask_tokens(const MaskTokensArgs& args, void* stream);
int init_tokens(const InitTokensArgs& args, void* stream);
int token_divergence(const TokenDivergenceArgs& args, void* stream);
int scale_gradient(const ScaleGradientArgs& args, void* stream);
int masked_cross_entropy(const CrossEntropyArgs& args, void* stream);
int sample_categorical(const SampleCategoricalArgs& args, void* stream);
int reveal_confident(const RevealConfidentArgs& args, void* stream);
int perturb_embeddings(const PerturbEmbeddingsArgs& args, void* stream);

struct Versions {
  int driver;   // newest CUDA version the installed driver supports, 0 without a driver
  int runtime;  // CUDA version of the runtime inside this module
};

// 0 if the driver can run this module and there is a device; touches no device.
int driver_status(Versions* versions);

// 0 if this module holds code that runs on the device; creates the device's context.
int device_status(int device);

const char* error_text(int error);

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  int error() const { return error_; }

 private:
  int previous_ = 0;
  bool switched_ = false;
  int error_ = 0;
};

}  // namespace cuda
}  // namespace dimo
