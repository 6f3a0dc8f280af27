// Token-level f-divergence and its gradient in one launch. From memory it reads every logit once and writes every
// gradient once, where a row fits shared memory; longer rows are read once a sweep, from the L2 cache for the most
// part. Rows that do not count are not read: zeros are written.
//
// A row belongs to a group of threads: part of a warp, a warp or a block, as the vocabulary asks. Mixed logits lie in
// shared memory as float; the gradient takes the auxiliary's place there and leaves in 16-byte stores.
#include <cstdint>
#include <type_traits>

#include "common/divergences.h"
#include "common/scalar_math.h"
#include "cuda/launch.h"
#include "cuda/logits.h"
#include "ops.h"

namespace dimo::cuda {
namespace {

constexpr int kBlockSums = 32;  // floats of shared memory that a block's reductions need
constexpr int64_t kMaxGrid = 0x7fffffff;

// softmax and log softmax of one side.
struct Softmax {
  float top, inverse_temperature, inverse_sum, log_sum;
  bool dead;  // without a finite logit

  __device__ float weight(float z) const { return expf((z - top) * inverse_temperature); }
  __device__ float log_prob(float z) const { return (z - top) * inverse_temperature - log_sum; }
};

// What does not depend on the divergence is not inlined: it is compiled once a group size, not once a kernel.

struct Copy {
  __device__ float operator()(float, float z) const { return z; }
};

// Guidance: uncond + s (cond - uncond); -inf on either side gives -inf.
struct Mix {
  float scale;
  __device__ float operator()(float cond, float uncond) const {
    const bool filtered = cond == -kInfinity || uncond == -kInfinity;
    return filtered ? -kInfinity : uncond + scale * (cond - uncond);
  }
};

// to[i] = combine(to[i], row[i])
template <int kThreads, class Combine>
__device__ DIMO_NOINLINE void read_row(const Group<kThreads>& group, const LogitRows& logits, int64_t offset,
                                       int64_t vocab, Combine combine, float* to) {
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    each_element(group, static_cast<const T*>(logits.data) + offset, logits.vocab_stride, vocab,
                 [&](int64_t i, float z) { to[i] = combine(to[i], z); });
  });
}

// row[i] = from[i], or 0 where `from` is null
template <int kThreads>
__device__ DIMO_NOINLINE void write_row(const Group<kThreads>& group, const LogitRows& logits, int64_t offset,
                                        int64_t vocab, const float* from) {
  with_type(logits.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    write_elements(group, static_cast<T*>(logits.data) + offset, logits.vocab_stride, vocab,
                   [&](int64_t i) { return from != nullptr ? from[i] : 0.0f; });
  });
}

// kCached: the logits are in shared memory, [2, vocab] a row; else every sweep reads them from global memory.
template <class Divergence, int kThreads, bool kCached>
class Row {
 public:
  __device__ Row(const TokenDivergenceArgs& args, int64_t row, const Group<kThreads>& group, float* cache)
      : args_(args),
        divergence_(args.parameter),
        row_(row),
        group_(group),
        p_(cache),
        q_(cache + args.shape.vocab),
        teacher_row_(row_offset(args.shape, args.teacher, row)),
        uncond_row_(args.uncond.data != nullptr ? row_offset(args.shape, args.uncond, row) : 0),
        auxiliary_row_(row_offset(args.shape, args.auxiliary, row)),
        gradient_row_(args.gradient.data != nullptr ? row_offset(args.shape, args.gradient, row) : 0),
        scale_(args.guidance != nullptr ? args.guidance[row / args.rows_per_sample] : args.guidance_scale),
        factor_(args.factor != nullptr ? args.factor[row * args.factor_stride] : 1.0f) {}

  __device__ bool counts() const { return (args_.mask == nullptr || args_.mask[row_]) && factor_ != 0.0f; }

  __device__ void skip() const {
    if (group_.rank == 0) args_.value[row_] = 0.0f;
    if (args_.gradient.data != nullptr) write_gradient(nullptr);
  }

  __device__ void run() {
    if constexpr (kCached) fill_cache();
    find_softmaxes();
    const bool wanted = args_.gradient.data != nullptr;
    const float pull = wanted ? pull_sum() : 0.0f;
    finish(pull, wanted);
  }

 private:
  // Calls visit(index, z_p, z_q) for the entries of this thread.
  template <class Visit>
  __device__ void each_entry(const Visit& visit) const {
    for (int64_t i = group_.rank; i < args_.shape.vocab; i += kThreads) {
      if constexpr (kCached)
        visit(i, p_[i], q_[i]);
      else
        visit(i, load_teacher(i), load(args_.auxiliary, auxiliary_row_, i));
    }
  }

  __device__ bool guided() const { return args_.uncond.data != nullptr && scale_ != 1.0f; }

  __device__ float load_teacher(int64_t i) const {
    const float cond = load(args_.teacher, teacher_row_, i);
    return guided() ? Mix{scale_}(cond, load(args_.uncond, uncond_row_, i)) : cond;
  }

  __device__ static float load(const LogitRows& logits, int64_t offset, int64_t i) {
    float x = 0.0f;
    with_type(logits.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      x = to_float(static_cast<const T*>(logits.data)[offset + i * logits.vocab_stride]);
    });
    return x;
  }

  __device__ void fill_cache() const {
    read_row(group_, args_.teacher, teacher_row_, args_.shape.vocab, Copy{}, p_);
    read_row(group_, args_.auxiliary, auxiliary_row_, args_.shape.vocab, Copy{}, q_);
    group_.sync();  // the unconditional row may be aligned otherwise: other threads own its elements
    if (!guided()) return;
    read_row(group_, args_.uncond, uncond_row_, args_.shape.vocab, Mix{scale_}, p_);
    group_.sync();
  }

  __device__ void find_softmaxes() {
    float top_p = -kInfinity, top_q = -kInfinity, least = kInfinity;
    each_entry([&](int64_t, float z_p, float z_q) {
      top_p = fmaxf(top_p, z_p);
      top_q = fmaxf(top_q, z_q);
      least = fminf(least, fminf(z_p, z_q));
    });
    start(teacher_, group_.max(top_p), args_.teacher_temperature);
    start(auxiliary_, group_.max(top_q), args_.auxiliary_temperature);
    filtered_ = group_.min(least) == -kInfinity || args_.teacher_log_floor > -kInfinity;
    float sum_p = 0.0f, sum_q = 0.0f;
    each_entry([&](int64_t, float z_p, float z_q) {
      sum_p += teacher_.weight(z_p);
      sum_q += auxiliary_.weight(z_q);
    });
    normalise(teacher_, group_.sum(sum_p));
    normalise(auxiliary_, group_.sum(sum_q));
    rate_difference_ = teacher_.inverse_temperature - auxiliary_.inverse_temperature;
    // log p - log q comes from the logits' difference, which is exact where they nearly agree; where the tops lie far
    // apart, from what is left above them.
    const float gap = (teacher_.top - auxiliary_.top) * auxiliary_.inverse_temperature;
    const bool near = fabsf(gap) < kNearTops;
    base_p_ = near ? 0.0f : teacher_.top;
    base_q_ = near ? 0.0f : auxiliary_.top;
    shift_ = (near ? gap : 0.0f) + (teacher_.log_sum - auxiliary_.log_sum);
  }

  // Where every logit is -inf the top becomes 0, so that no difference of infinities arises.
  __device__ static void start(Softmax& softmax, float top, float temperature) {
    softmax.top = top == -kInfinity ? 0.0f : top;
    softmax.inverse_temperature = 1.0f / temperature;
  }

  __device__ static void normalise(Softmax& softmax, float sum) {
    softmax.dead = sum == 0.0f;
    softmax.inverse_sum = 1.0f / sum;
    softmax.log_sum = softmax.dead ? 0.0f : logf(sum);
  }

  __device__ Terms<float> terms(float z_p, float z_q, float& q) const {
    q = auxiliary_.weight(z_q) * auxiliary_.inverse_sum;
    const float x = ((z_p - base_p_) - (z_q - base_q_)) * auxiliary_.inverse_temperature +
                    ((z_p - teacher_.top) * rate_difference_ - shift_);
    const Entry<float> entry = {teacher_.weight(z_p) * teacher_.inverse_sum, q, teacher_.log_prob(z_p),
                                auxiliary_.log_prob(z_q), x};
    if (filtered_) return terms_at<ScalarMath>(divergence_, with_floor<ScalarMath>(entry, args_.teacher_log_floor));
    return divergence_.terms(entry);
  }

  __device__ float pull_sum() const {
    float sum = 0.0f, q;
    each_entry([&](int64_t, float z_p, float z_q) { sum += terms(z_p, z_q, q).pull; });
    return group_.sum(sum);
  }

  __device__ void finish(float pull, bool wanted) {
    const float scale = (args_.factor_in_gradient ? factor_ : 1.0f) / args_.auxiliary_temperature;
    const float bound = overflow_bound(args_.gradient.dtype);
    float value = 0.0f, second = 0.0f, usable = 1.0f;
    const auto visit = [&](float z_p, float z_q) {
      float q;
      const Terms<float> t = terms(z_p, z_q, q);
      value += t.value;
      second += t.second;
      const float gradient = (t.pull - q * pull) * scale;
      if (!(fabsf(gradient) < bound)) usable = 0.0f;
      return gradient;
    };
    if constexpr (kCached)
      each_entry([&](int64_t i, float z_p, float z_q) { q_[i] = visit(z_p, z_q); });
    else
      stream_gradient(wanted, visit);
    group_.sync();  // what follows reads, or writes, what other threads wrote
    const bool dead = teacher_.dead || auxiliary_.dead;
    value = dead ? 0.0f : divergence_.combine(group_.sum(value), group_.sum(second));
    const bool lost = !dead && (group_.min(usable) == 0.0f || value != value);
    if (group_.rank == 0) args_.value[row_] = value * factor_;
    if (!wanted) return;
    if (lost && group_.rank == 0) atomicAdd(reinterpret_cast<unsigned long long*>(args_.zeroed), 1ull);
    if (dead || lost)
      write_gradient(nullptr);
    else if constexpr (kCached)
      write_gradient(q_);
  }

  template <class Visit>
  __device__ void stream_gradient(bool wanted, const Visit& visit) const {
    with_type(args_.gradient.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      T* row = static_cast<T*>(args_.gradient.data) + gradient_row_;
      each_entry([&](int64_t i, float z_p, float z_q) {
        const float gradient = visit(z_p, z_q);
        if (wanted) row[i * args_.gradient.vocab_stride] = from_float<T>(gradient);
      });
    });
  }

  __device__ void write_gradient(const float* from) const {
    write_row(group_, args_.gradient, gradient_row_, args_.shape.vocab, from);
  }

  const TokenDivergenceArgs& args_;
  const Divergence divergence_;
  const int64_t row_;
  const Group<kThreads>& group_;
  float *p_, *q_;
  const int64_t teacher_row_, uncond_row_, auxiliary_row_, gradient_row_;
  const float scale_, factor_;
  Softmax teacher_, auxiliary_;
  float rate_difference_, base_p_, base_q_, shift_;
  bool filtered_;
};

template <class Divergence, int kThreads, int kBlock, bool kCached>
__global__ __launch_bounds__(kBlock) void token_divergence_kernel(TokenDivergenceArgs args) {
  float* const shared = shared_memory<float>();
  const Group<kThreads> group(shared);
  constexpr int kRows = kBlock / kThreads;
  const int slot = static_cast<int>(threadIdx.x) / kThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + slot;
  if (row >= args.shape.rows) return;  // a whole group
  Row<Divergence, kThreads, kCached> work(args, row, group, shared + kBlockSums + 2 * args.shape.vocab * slot);
  if (work.counts())
    work.run();
  else
    work.skip();
}

// Bytes of shared memory that a block with so many cached rows needs.
size_t shared_bytes(const TokenDivergenceArgs& args, int64_t cached_rows) {
  return static_cast<size_t>(kBlockSums + 2 * args.shape.vocab * cached_rows) * sizeof(float);
}

template <class Divergence, int kThreads, int kBlock, bool kCached>
int launch_rows(const TokenDivergenceArgs& args, void* stream) {
  constexpr int64_t kRows = kBlock / kThreads;
  const int64_t blocks = (args.shape.rows + kRows - 1) / kRows;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  return launch(token_divergence_kernel<Divergence, kThreads, kBlock, kCached>, dim3(static_cast<unsigned>(blocks)),
                dim3(kBlock), shared_bytes(args, kCached ? kRows : 0), stream, args);
}

// Part of a warp, a warp or a block a row; rows that shared memory cannot hold are streamed.
template <class D>
int launch_geometry(const TokenDivergenceArgs& args, void* stream) {
  if (args.shape.vocab <= 64) return launch_rows<D, 8, 128, true>(args, stream);
  if (args.shape.vocab <= 2048) return launch_rows<D, kWarp, 128, true>(args, stream);
  if (shared_bytes(args, 1) <= max_shared_bytes()) return launch_rows<D, 512, 512, true>(args, stream);
  return launch_rows<D, 512, 512, false>(args, stream);
}

}  // namespace

int token_divergence(const TokenDivergenceArgs& args, void* stream) {
  if (args.shape.rows == 0) return cudaSuccess;
  return with_divergence<ScalarMath>(
      args.kind, [&](auto divergence) { return launch_geometry<typename decltype(divergence)::type>(args, stream); });
}

}  // namespace dimo::cuda
