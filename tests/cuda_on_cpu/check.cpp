// Runs every kernel at small sizes beside its CPU twin; given a name, that fault of selftest.cu. A program of its own,
// since a sanitizer wants the whole process.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda_runtime_api.h"
#include "ops.h"

extern "C" int fault(const char* name, const float* in, float* out);

namespace dimo {
namespace {

using Ints = std::vector<int64_t>;

const Ints kKeys = {-3, (int64_t{1} << 40) + 5, 11, 0, 12, -1};
const std::vector<float> kRatios = {0.0f, 0.37f, 1.0f};
constexpr int64_t kBatch = 3;
constexpr int kThreads = 1;

int failures = 0;

void report(const char* kernel, int64_t size, int status, bool equal) {
  if (status == 0 && equal) return;
  ++failures;
  std::printf("%s, size %ld: %s\n", kernel, static_cast<long>(size), status == 0 ? "wrong" : cuda_on_cpu_error());
}

void check_fold_in(int64_t count) {
  const Ints numbers(static_cast<size_t>(count), 7);
  Ints expected(static_cast<size_t>(2 * count)), out = expected;
  FoldInArgs args = {kKeys.data(), 0, 0, numbers.data(), expected.data(), count};
  cpu::fold_in(args, kThreads);
  args.out = out.data();
  const int status = cuda::fold_in(args, nullptr);
  report("fold_in", count, status, out == expected);
}

void check_uniform_words(int64_t count) {
  Ints expected(static_cast<size_t>(count)), out = expected;
  cpu::uniform_words({kKeys.data(), expected.data(), count}, kThreads);
  const int status = cuda::uniform_words({kKeys.data(), out.data(), count}, nullptr);
  report("uniform_words", count, status, out == expected);
}

void check_mask_tokens(int64_t length, bool bernoulli) {
  const Ints tokens(static_cast<size_t>(kBatch * length), 5);
  Ints expected = tokens, out = tokens;
  std::vector<char> expected_mask(tokens.size()), mask = expected_mask;
  MaskTokensArgs args = {tokens.data(),
                         expected.data(),
                         reinterpret_cast<bool*>(expected_mask.data()),
                         kBatch,
                         length,
                         0.0f,
                         kRatios.data(),
                         kKeys.data(),
                         2,
                         -7,
                         1,
                         bernoulli,
                         MaskSchedule::linear};
  cpu::mask_tokens(args, kThreads);
  args.out_tokens = out.data();
  args.out_mask = reinterpret_cast<bool*>(mask.data());
  const int status = cuda::mask_tokens(args, nullptr);
  report("mask_tokens", length, status, out == expected && mask == expected_mask);
}

void check_init_tokens(int64_t length) {
  Ints expected(static_cast<size_t>(kBatch * length)), out = expected;
  InitTokensArgs args = {expected.data(), kBatch, length, 0.6f, kKeys.data(), 0, -7, 1000};
  cpu::init_tokens(args, kThreads);
  args.out_tokens = out.data();
  const int status = cuda::init_tokens(args, nullptr);
  report("init_tokens", length, status, out == expected);
}

LogitRows rows_of(std::vector<float>& logits, int64_t begin, int64_t stride) {
  return {logits.data() + begin, DType::float32, 1, {stride}};
}

// Rows that are aligned alike or differently, one of which does not count; blocks share them out.
void check_token_divergence(int64_t vocab, bool alike) {
  const bool mask[kBatch] = {true, false, true};
  const int64_t stride = vocab + 1, begin = alike ? 0 : 1;
  std::vector<float> teacher(static_cast<size_t>(kBatch * stride + 1)), auxiliary = teacher, uncond = teacher;
  for (size_t i = 0; i < teacher.size(); ++i) {
    teacher[i] = std::sin(3.0f * static_cast<float>(i));
    auxiliary[i] = std::cos(5.0f * static_cast<float>(i));
  }
  std::vector<float> gradients[2] = {teacher, teacher}, values[2] = {kRatios, kRatios};
  int64_t zeroed = 0;
  int32_t ticket = 0;
  int status = 0;
  for (const bool on_gpu : {false, true}) {
    const TokenDivergenceArgs args = {DivergenceKind::jeffreys,
                                      0.3,
                                      {kBatch, vocab, 1, {kBatch}},
                                      rows_of(teacher, 0, stride),
                                      rows_of(uncond, begin, stride),
                                      rows_of(auxiliary, begin, stride),
                                      rows_of(gradients[on_gpu], begin, stride),
                                      1.5f,
                                      nullptr,
                                      1,
                                      0.9f,
                                      1.0f,
                                      -INFINITY,
                                      mask,
                                      nullptr,
                                      0,
                                      true,
                                      values[on_gpu].data(),
                                      &zeroed,
                                      &ticket};
    if (on_gpu)
      status = cuda::token_divergence(args, nullptr);
    else
      cpu::token_divergence(args, kThreads);
  }
  const auto near = [](float a, float b) { return std::abs(a - b) <= 1e-5f; };
  const bool equal = std::equal(values[0].begin(), values[0].end(), values[1].begin(), near) &&
                     std::equal(gradients[0].begin(), gradients[0].end(), gradients[1].begin(), near);
  report("token_divergence", vocab, status, equal && zeroed == 0);
}

// The same rows; two ids of padding.
void check_masked_cross_entropy(int64_t vocab) {
  const bool mask[kBatch] = {true, false, true};
  const Ints targets = {0, 0, vocab / 2};
  const int64_t stride = vocab + 3;
  std::vector<float> logits(static_cast<size_t>(kBatch * stride + 1));
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(3.0f * static_cast<float>(i));
  std::vector<float> gradients[2] = {logits, logits}, values[2] = {kRatios, kRatios};
  std::vector<uint32_t> workspace(kCrossEntropyWorkspace);
  float totals[2], factor;
  int status = 0;
  for (const bool on_gpu : {false, true}) {
    const CrossEntropyArgs args = {{kBatch, vocab + 2, 1, {kBatch}},
                                   rows_of(logits, 1, stride),
                                   rows_of(gradients[on_gpu], 1, stride),
                                   targets.data(),
                                   mask,
                                   vocab,
                                   0.1f,
                                   1.0f,
                                   true,
                                   true,
                                   values[on_gpu].data(),
                                   &totals[on_gpu],
                                   &factor,
                                   workspace.data()};
    if (on_gpu)
      status = cuda::masked_cross_entropy(args, nullptr);
    else
      cpu::masked_cross_entropy(args, kThreads);
  }
  const auto near = [](float a, float b) { return std::abs(a - b) <= 1e-5f; };
  const bool equal = near(totals[0], totals[1]) && factor == 0.5f &&
                     std::equal(gradients[0].begin(), gradients[0].end(), gradients[1].begin(), near);
  report("masked_cross_entropy", vocab, status, equal);
}

// Guided rows that are aligned differently, one of them dead, with and without filters; the draws are close to the
// CPU's, and the ids mostly equal.
void check_sample_categorical(int64_t vocab, int64_t top_k, double top_p, double temperature) {
  constexpr int64_t kRows = 6;
  const int64_t stride = vocab + 1;
  std::vector<float> logits(static_cast<size_t>(kRows * stride + 1)), uncond = logits;
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = 3.0f * std::sin(3.0f * static_cast<float>(i));
    uncond[i] = std::cos(5.0f * static_cast<float>(i));
  }
  logits[static_cast<size_t>(2 * stride)] = NAN;
  Ints tokens[2] = {Ints(kRows), Ints(kRows)};
  std::vector<float> log_probs[2] = {std::vector<float>(kRows), std::vector<float>(kRows)};
  int status = 0;
  for (const bool on_gpu : {false, true}) {
    const SampleCategoricalArgs args = {{kRows, vocab, 1, {kRows}},
                                        rows_of(logits, 0, stride),
                                        rows_of(uncond, 1, stride),
                                        0.5f,
                                        nullptr,
                                        2,
                                        kKeys.data(),
                                        2,
                                        temperature,
                                        top_k,
                                        top_p,
                                        0.0,
                                        tokens[on_gpu].data(),
                                        log_probs[on_gpu].data(),
                                        {}};
    if (on_gpu)
      status = cuda::sample_categorical(args, nullptr);
    else
      cpu::sample_categorical(args, kThreads);
  }
  bool equal = true;
  for (size_t row = 0; row < kRows; ++row)
    equal = equal && tokens[0][row] == tokens[1][row] &&
            !(std::abs(log_probs[0][row] - log_probs[1][row]) > 1e-4f);  // both -inf: NaN
  report("sample_categorical", vocab, status, equal && tokens[0][2] == -1);
}

// Masked positions among others, few of them revealed; the choices are equal but where rounding decides, seldom.
void check_reveal_confident(int64_t length) {
  constexpr int64_t kSamples = 2, kVocab = 300;
  const size_t tokens = static_cast<size_t>(kSamples * length);
  std::vector<float> logits(tokens * kVocab), log_prob(tokens);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = std::sin(3.0f * static_cast<float>(i % 100003));
  Ints state(tokens, -7), drawn(tokens), out[2] = {Ints(tokens), Ints(tokens)};
  for (size_t i = 0; i < tokens; i += 3) state[i] = 5;
  int status = 0;
  for (const bool on_gpu : {false, true}) {
    const RevealConfidentArgs args = {{{kSamples * length, kVocab, 1, {kSamples * length}},
                                       rows_of(logits, 0, kVocab),
                                       {},
                                       1.0f,
                                       nullptr,
                                       length,
                                       kKeys.data(),
                                       2,
                                       1.0,
                                       0,
                                       1.0,
                                       0.0,
                                       drawn.data(),
                                       log_prob.data(),
                                       {state.data(), -7, 1.0, nullptr}},
                                      out[on_gpu].data(),
                                      (length + 2) / 3,
                                      nullptr,
                                      2.5};
    if (on_gpu)
      status = cuda::reveal_confident(args, nullptr);
    else
      cpu::reveal_confident(args, kThreads);
  }
  report("reveal_confident", length, status, out[0] == out[1]);
}

void check_perturb_embeddings(int64_t width) {
  std::vector<float> embeddings(static_cast<size_t>(2 * width), 0.5f), out[2] = {embeddings, embeddings};
  const float scale = 0.7f;
  int status = 0;
  for (const bool on_gpu : {false, true}) {
    const PerturbEmbeddingsArgs args = {{2, width, 1, {2}},
                                        rows_of(embeddings, 0, width),
                                        rows_of(out[on_gpu], 0, width),
                                        1,
                                        kKeys.data(),
                                        2,
                                        0.6,
                                        &scale,
                                        nullptr,
                                        0};
    if (on_gpu)
      status = cuda::perturb_embeddings(args, nullptr);
    else
      cpu::perturb_embeddings(args, kThreads);
  }
  const auto near = [](float a, float b) { return std::abs(a - b) <= 1e-5f; };
  report("perturb_embeddings", width, status, std::equal(out[0].begin(), out[0].end(), out[1].begin(), near));
}

int run_fault(const char* name) {
  const std::vector<float> in(64, 1.0f);
  std::vector<float> out(64);
  cuda_on_cpu_hopper(1);
  const int status = fault(name, in.data(), out.data());
  std::puts(cuda_on_cpu_error());
  return status != 0;
}

int run_kernels() {
  for (const int64_t count : {1, 127, 129}) check_fold_in(count);
  for (const int64_t count : {0, 1, 511, 513}) check_uniform_words(count);
  for (const int64_t length : {1, 5, 127, 128, 129, 700, 4100}) {
    check_mask_tokens(length, false);
    check_mask_tokens(length, true);
    check_init_tokens(length);
  }
  for (const bool clusters : {false, true}) {
    cuda_on_cpu_hopper(clusters);
    for (const int64_t vocab : {1, 17, 65, 300, 1025, 2049, 4097})
      for (const bool alike : {false, true}) check_token_divergence(vocab, alike);
    for (const int64_t vocab : {1, 17, 65, 300, 1025, 4097, 13001}) check_masked_cross_entropy(vocab);
  }
  for (const int64_t vocab : {17001, 40003}) check_token_divergence(vocab, true);  // two blocks a row, three
  for (const int64_t vocab : {30001, 120001}) check_masked_cross_entropy(vocab);   // four, sixteen
  for (const int64_t vocab : {1, 17, 65, 257, 1025, 4097, 8300}) {
    check_sample_categorical(vocab, 0, 1.0, 0.9);
    check_sample_categorical(vocab, std::min<int64_t>(vocab, 20), 0.8, 0.9);
    check_sample_categorical(vocab, 0, 1.0, 0.0);
  }
  for (const int64_t length : {1, 5, 64, 130}) check_reveal_confident(length);
  for (const int64_t width : {1, 3, 4, 130}) check_perturb_embeddings(width);
  return failures != 0;
}

}  // namespace
}  // namespace dimo

int main(int count, char** arguments) { return count > 1 ? dimo::run_fault(arguments[1]) : dimo::run_kernels(); }
