// The launchers with C linkage, for Python: arguments as those of the compiled module, every number 64 bits wide.
#include <algorithm>

#include "ops.h"

namespace {

dimo::RowShape row_shape(int64_t dims, const int64_t* sizes) {
  dimo::RowShape shape = {1, sizes[dims], static_cast<int32_t>(dims), {}};
  std::copy(sizes, sizes + dims, shape.sizes);
  for (int64_t d = 0; d < dims; ++d) shape.rows *= sizes[d];
  return shape;
}

// Strides of every dimension, the vocabulary's last; null for logits that are not given.
dimo::LogitRows logit_rows(void* data, int64_t dtype, const int64_t* strides, int64_t dims) {
  dimo::LogitRows rows = {data, static_cast<dimo::DType>(dtype), 0, {}};
  if (data == nullptr) return rows;
  std::copy(strides, strides + dims, rows.strides);
  rows.vocab_stride = strides[dims];
  return rows;
}

}  // namespace

extern "C" {

int fold_in(const int64_t* key, int64_t key_stride, int64_t n, const int64_t* numbers, int64_t* out, int64_t count) {
  return dimo::cuda::fold_in({key, key_stride, n, numbers, out, count}, nullptr);
}

int uniform_words(const int64_t* key, int64_t* out, int64_t count) {
  return dimo::cuda::uniform_words({key, out, count}, nullptr);
}

int mask_tokens(const int64_t* tokens, int64_t* out_tokens, bool* out_mask, int64_t batch, int64_t length, double ratio,
                const float* ratios, const int64_t* key, int64_t key_stride, int64_t mask_id, int64_t bernoulli,
                int64_t min_masked, int64_t schedule) {
  return dimo::cuda::mask_tokens(
      {tokens, out_tokens, out_mask, batch, length, static_cast<float>(ratio), ratios, key, key_stride, mask_id,
       min_masked, bernoulli != 0, static_cast<dimo::MaskSchedule>(schedule)},
      nullptr);
}

int init_tokens(int64_t* out_tokens, int64_t batch, int64_t length, double ratio, const int64_t* key,
                int64_t key_stride, int64_t mask_id, int64_t vocab_size) {
  return dimo::cuda::init_tokens({out_tokens, batch, length, static_cast<float>(ratio), key, key_stride, mask_id,
                                  static_cast<uint32_t>(vocab_size)},
                                 nullptr);
}

int masked_cross_entropy(int64_t dims, const int64_t* sizes, void* logits, int64_t dtype, const int64_t* strides,
                         void* gradient, int64_t gradient_dtype, const int64_t* gradient_strides,
                         const int64_t* targets, const bool* mask, int64_t valid_vocab, double label_smoothing,
                         double scale, int64_t mean, int64_t factor_in_gradient, float* value, float* total,
                         float* factor, uint32_t* workspace) {
  return dimo::cuda::masked_cross_entropy({row_shape(dims, sizes), logit_rows(logits, dtype, strides, dims),
                                           logit_rows(gradient, gradient_dtype, gradient_strides, dims), targets, mask,
                                           valid_vocab, static_cast<float>(label_smoothing), static_cast<float>(scale),
                                           mean != 0, factor_in_gradient != 0, value, total, factor, workspace},
                                          nullptr);
}

int token_divergence(int64_t kind, double parameter, int64_t dims, const int64_t* sizes, void* teacher,
                     int64_t teacher_dtype, const int64_t* teacher_strides, void* uncond, int64_t uncond_dtype,
                     const int64_t* uncond_strides, void* auxiliary, int64_t auxiliary_dtype,
                     const int64_t* auxiliary_strides, void* gradient, int64_t gradient_dtype,
                     const int64_t* gradient_strides, double guidance_scale, const float* guidance,
                     int64_t rows_per_sample, double teacher_temperature, double auxiliary_temperature,
                     double teacher_log_floor, const bool* mask, const float* factor, int64_t factor_stride,
                     int64_t factor_in_gradient, float* value, int64_t* zeroed, int32_t* ticket) {
  return dimo::cuda::token_divergence({static_cast<dimo::DivergenceKind>(kind),
                                       parameter,
                                       row_shape(dims, sizes),
                                       logit_rows(teacher, teacher_dtype, teacher_strides, dims),
                                       logit_rows(uncond, uncond_dtype, uncond_strides, dims),
                                       logit_rows(auxiliary, auxiliary_dtype, auxiliary_strides, dims),
                                       logit_rows(gradient, gradient_dtype, gradient_strides, dims),
                                       static_cast<float>(guidance_scale),
                                       guidance,
                                       rows_per_sample,
                                       static_cast<float>(teacher_temperature),
                                       static_cast<float>(auxiliary_temperature),
                                       static_cast<float>(teacher_log_floor),
                                       mask,
                                       factor,
                                       factor_stride,
                                       factor_in_gradient != 0,
                                       value,
                                       zeroed,
                                       ticket},
                                      nullptr);
}

int sample_categorical(int64_t dims, const int64_t* sizes, void* logits, int64_t logits_dtype,
                       const int64_t* logits_strides, void* uncond, int64_t uncond_dtype, const int64_t* uncond_strides,
                       double guidance_scale, const float* guidance, int64_t rows_per_sample, const int64_t* key,
                       int64_t key_stride, double temperature, int64_t top_k, double top_p, double min_p,
                       int64_t* tokens, float* log_prob) {
  return dimo::cuda::sample_categorical({row_shape(dims, sizes),
                                         logit_rows(logits, logits_dtype, logits_strides, dims),
                                         logit_rows(uncond, uncond_dtype, uncond_strides, dims),
                                         static_cast<float>(guidance_scale),
                                         guidance,
                                         rows_per_sample,
                                         key,
                                         key_stride,
                                         temperature,
                                         top_k,
                                         top_p,
                                         min_p,
                                         tokens,
                                         log_prob,
                                         {}},
                                        nullptr);
}

int reveal_ancestral(int64_t dims, const int64_t* sizes, void* logits, int64_t logits_dtype,
                     const int64_t* logits_strides, void* uncond, int64_t uncond_dtype, const int64_t* uncond_strides,
                     double guidance_scale, const float* guidance, int64_t rows_per_sample, const int64_t* key,
                     int64_t key_stride, double temperature, int64_t top_k, double top_p, double min_p,
                     const int64_t* state, int64_t mask_id, double chance, const float* chances, int64_t* tokens) {
  return dimo::cuda::sample_categorical({row_shape(dims, sizes),
                                         logit_rows(logits, logits_dtype, logits_strides, dims),
                                         logit_rows(uncond, uncond_dtype, uncond_strides, dims),
                                         static_cast<float>(guidance_scale),
                                         guidance,
                                         rows_per_sample,
                                         key,
                                         key_stride,
                                         temperature,
                                         top_k,
                                         top_p,
                                         min_p,
                                         tokens,
                                         nullptr,
                                         {state, mask_id, chance, chances}},
                                        nullptr);
}

int reveal_confident(int64_t dims, const int64_t* sizes, void* logits, int64_t logits_dtype,
                     const int64_t* logits_strides, void* uncond, int64_t uncond_dtype, const int64_t* uncond_strides,
                     double guidance_scale, const float* guidance, int64_t rows_per_sample, const int64_t* key,
                     int64_t key_stride, double temperature, int64_t top_k, double top_p, double min_p,
                     const int64_t* state, int64_t mask_id, int64_t count, const int64_t* counts, double noise_scale,
                     int64_t* drawn, float* log_prob, int64_t* tokens) {
  return dimo::cuda::reveal_confident({{row_shape(dims, sizes),
                                        logit_rows(logits, logits_dtype, logits_strides, dims),
                                        logit_rows(uncond, uncond_dtype, uncond_strides, dims),
                                        static_cast<float>(guidance_scale),
                                        guidance,
                                        rows_per_sample,
                                        key,
                                        key_stride,
                                        temperature,
                                        top_k,
                                        top_p,
                                        min_p,
                                        drawn,
                                        log_prob,
                                        {state, mask_id, 1.0, nullptr}},
                                       tokens,
                                       count,
                                       counts,
                                       noise_scale},
                                      nullptr);
}

int perturb_embeddings(int64_t dims, const int64_t* sizes, void* embeddings, int64_t embeddings_dtype,
                       const int64_t* embeddings_strides, void* out, int64_t out_dtype, const int64_t* out_strides,
                       int64_t rows_per_sample, const int64_t* key, int64_t key_stride, double sigma,
                       const float* scale, const int64_t* ids, int64_t table_rows) {
  return dimo::cuda::perturb_embeddings(
      {row_shape(dims, sizes), logit_rows(embeddings, embeddings_dtype, embeddings_strides, dims),
       logit_rows(out, out_dtype, out_strides, dims), rows_per_sample, key, key_stride, sigma, scale, ids, table_rows},
      nullptr);
}

}  // extern "C"
