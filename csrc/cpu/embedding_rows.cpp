// Embedding noise on the CPU: the rows of one task, in SIMD. Compiled once an instruction set (DIMO_ISA);
// cpu/embedding.cpp chooses. Reads and writes every element once; the draws cost more than either.
#include <cmath>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/logits.h"
#include "cpu/philox.h"
#include "cpu/simd.h"
#include "ops.h"

namespace dimo::cpu {
namespace {

constexpr int kSpan = 4 * kLanes;  // elements whose words one Philox call gives

// Two standard normal numbers from two words, by Box-Muller.
DIMO_INLINE void normal_pair(Bits32 word0, Bits32 word1, Vec& first, Vec& second) {
  const Vec radius = VecMath::sqrt(2.0f * negative_log(word0));
  // The angle in quarter turns: the nearest integer, and exactly what is left.
  const Bits32 quarter = (word1 + 0x20000000u) >> 30;
  const Vec rest = __builtin_convertvector(reinterpret_cast<Int>(word1 << 2), Vec) * 0x1p-32f + 0x1p-31f;
  const Vec angle = rest * 1.57079633f, square = angle * angle;
  const Vec sine =
      angle + angle * square * (-1.6666654611e-1f + square * (8.3321608736e-3f - 1.9515295891e-4f * square));
  const Vec cosine = 1.0f - 0.5f * square +
                     square * square * (4.1666645683e-2f + square * (-1.3887316255e-3f + 2.4433157118e-5f * square));
  const Vec x = (quarter & 1u) != 0u ? sine : cosine, y = (quarter & 1u) != 0u ? cosine : sine;
  const auto negated = [](Vec v, Bits32 bit) DIMO_INLINE_LAMBDA {  // where bit 1 is set
    return reinterpret_cast<Vec>(reinterpret_cast<Bits32>(v) ^ ((bit & 2u) << 30));
  };
  first = radius * negated(x, quarter + 1);
  second = radius * negated(y, quarter);
}

class Noise {
 public:
  explicit Noise(const PerturbEmbeddingsArgs& args)
      : args_(args),
        noise_(static_cast<float>(args.sigma) * *args.scale),
        keep_(static_cast<float>(sqrt(1.0 - args.sigma * args.sigma))) {}

  void run(int64_t row) {
    streams_.set_all(args_.key, args_.key_stride, args_.rows_per_sample, row);
    const int64_t from = args_.ids == nullptr ? row_offset(args_.shape, args_.embeddings, row)
                                              : table_offset(args_.embeddings, args_.table_rows, args_.ids[row]);
    const int64_t to = row_offset(args_.shape, args_.out, row);
    for (int64_t begin = 0; begin < args_.shape.vocab; begin += kSpan) {
      const int64_t rest = args_.shape.vocab - begin, n = rest < kSpan ? rest : kSpan;
      draw(static_cast<uint32_t>(begin / 4));
      with_type(args_.embeddings.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t stride = args_.embeddings.vocab_stride;
        read_run(static_cast<const T*>(args_.embeddings.data) + from + begin * stride, stride, n, embeddings_);
        for (int i = 0; i < kSpan; i += kLanes)
          store(embeddings_ + i, load(drawn_ + i) * noise_ + keep_ * load(embeddings_ + i));
        write_run(embeddings_, 1, n, static_cast<T*>(args_.out.data) + to + begin);
      });
    }
  }

 private:
  void draw(uint32_t first_block) {
    const LaneWords words = streams_.words(lane_numbers() + first_block);
    alignas(64) float numbers[4][kLanes];
    for (int i = 0; i < 4; i += 2) {
      Vec first, second;
      normal_pair(words.word[i], words.word[i + 1], first, second);
      store(numbers[i], first);
      store(numbers[i + 1], second);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 4; ++i) drawn_[4 * lane + i] = numbers[i][lane];
  }

  const PerturbEmbeddingsArgs& args_;
  const float noise_, keep_;
  LaneStreams streams_ = {OperatorTag::perturb_embeddings, {}, {}, {}, {}, {}};
  alignas(64) float drawn_[kSpan] = {}, embeddings_[kSpan] = {};
};

}  // namespace

void DIMO_ISA::perturb_embeddings_rows(const PerturbEmbeddingsArgs& args, int64_t begin, int64_t end) {
  Noise noise(args);
  for (int64_t row = begin; row < end; ++row) noise.run(row);
}

}  // namespace dimo::cpu
