// The launchers with C linkage, for Python: arguments as those of the compiled module, every number 64 bits wide.
#include "ops.h"

extern "C" {

int fold_in(const int64_t* key, int64_t key_stride, int64_t n, const int64_t* numbers, int64_t* out, int64_t count) {
  return dimo::cuda::fold_in({key, key_stride, n, numbers, out, count}, nullptr);
}

int mask_tokens(const int64_t* tokens, int64_t* out_tokens, bool* out_mask, int64_t batch, int64_t length, double ratio,
                const float* ratios, const int64_t* key, int64_t key_stride, int64_t mask_id, int64_t bernoulli,
                int64_t min_masked) {
  return dimo::cuda::mask_tokens({tokens, out_tokens, out_mask, batch, length, static_cast<float>(ratio), ratios, key,
                                  key_stride, mask_id, min_masked, bernoulli != 0},
                                 nullptr);
}

int init_tokens(int64_t* out_tokens, int64_t batch, int64_t length, double ratio, const int64_t* key,
                int64_t key_stride, int64_t mask_id, int64_t vocab_size) {
  return dimo::cuda::init_tokens({out_tokens, batch, length, static_cast<float>(ratio), key, key_stride, mask_id,
                                  static_cast<uint32_t>(vocab_size)},
                                 nullptr);
}

}  // extern "C"
