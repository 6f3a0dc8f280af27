// The Python module: unpacks addresses and scalars, releases the GIL, switches the device, checks launch errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/philox.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "ops.h"

namespace py = pybind11;

namespace dimo {
namespace {

using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check_length(const char* op, int64_t length) {
  if (length > 4 * kMaxPhiloxBlocks)
    throw std::invalid_argument(std::string(op) + ": length must be at most 2^26, got " + std::to_string(length));
}

MaskTokensArgs mask_tokens_args(Address tokens, Address out_tokens, Address out_mask, int64_t batch, int64_t length,
                                double ratio, Address ratios, Address key, int64_t key_stride, int64_t mask_id,
                                bool bernoulli, int64_t min_masked, int schedule) {
  check_length("mask_tokens", length);
  return {pointer<const int64_t>(tokens),
          pointer<int64_t>(out_tokens),
          pointer<bool>(out_mask),
          batch,
          length,
          static_cast<float>(ratio),
          pointer<const float>(ratios),
          pointer<const int64_t>(key),
          key_stride,
          mask_id,
          min_masked,
          bernoulli,
          static_cast<MaskSchedule>(schedule)};
}

InitTokensArgs init_tokens_args(Address out_tokens, int64_t batch, int64_t length, double ratio, Address key,
                                int64_t key_stride, int64_t mask_id, uint32_t vocab_size) {
  check_length("init_tokens", length);
  return {pointer<int64_t>(out_tokens), batch,      length,  static_cast<float>(ratio),
          pointer<const int64_t>(key),  key_stride, mask_id, vocab_size};
}

FoldInArgs fold_in_args(Address key, int64_t key_stride, int64_t n, Address numbers, Address out, int64_t count) {
  return {pointer<const int64_t>(key), key_stride, n, pointer<const int64_t>(numbers), pointer<int64_t>(out), count};
}

UniformWordsArgs uniform_words_args(Address key, Address out, int64_t count) {
  return {pointer<const int64_t>(key), pointer<int64_t>(out), count};
}

#if defined(__linux__)

// What torch.frombuffer takes as the memory of a large output.
class OutputMemory {
 public:
  explicit OutputMemory(int64_t bytes) : bytes_(bytes), memory_(cpu::take_memory(bytes)) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  ~OutputMemory() { cpu::leave_memory(memory_); }
  OutputMemory(const OutputMemory&) = delete;
  OutputMemory& operator=(const OutputMemory&) = delete;

  py::buffer_info buffer() const { return {static_cast<uint8_t*>(memory_->data), bytes_}; }

 private:
  int64_t bytes_;
  cpu::Memory* memory_;
};

void define_output_memory(py::module_& m) {
  py::class_<OutputMemory>(m, "OutputMemory", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("bytes"))
      .def_buffer(&OutputMemory::buffer);
  m.attr("large_bytes") = cpu::kLargeBytes;
}

#endif

std::array<uint32_t, 4> philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const Words4 words = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

#if defined(DIMO_WITH_CUDA)

void check(int error, const char* op) {
  if (error != 0)
    throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + ": " +
                             cuda::error_text(error));
}

// Calls launcher(args, stream) with the device made current.
template <class Args>
void on_device(int device, Address stream, const char* op, int (*launcher)(const Args&, void*), const Args& args) {
  const cuda::DeviceGuard guard(device);
  check(guard.error(), op);
  check(launcher(args, pointer<void>(stream)), op);
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(' ', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::tuple<bool, std::string, int, int> cuda_driver_status() {
  cuda::Versions versions;
  const int error = cuda::driver_status(&versions);
  std::string reason;
  if (versions.driver == 0)
    reason = "there is no CUDA driver";
  else if (error != 0)
    reason = std::string(cuda::error_text(error)) + " (the driver supports CUDA " + version_text(versions.driver) +
             ", the module was built with CUDA " + version_text(versions.runtime) + ")";
  return {error == 0, reason, versions.driver, versions.runtime};
}

std::string cuda_device_problem(int device) {
  const int error = cuda::device_status(device);
  if (error == 0) return "";
  return std::string(cuda::error_text(error)) + " (the module was built for " + DIMO_CUDA_ARCHITECTURES + ")";
}

#else

constexpr const char* kNoCuda = "the compiled module was built without CUDA";

std::tuple<bool, std::string, int, int> cuda_driver_status() { return {false, kNoCuda, 0, 0}; }

std::string cuda_device_problem(int) { return kNoCuda; }

#endif

// Defines cpu_<name> and cuda_<name>: the arguments that `make` takes, then the number of threads, or device and
// stream.
template <class Args, class... Parameters, class OnCuda>
void define_launchers(py::module_& m, const std::string& name, Args (*make)(Parameters...),
                      void (*on_cpu)(const Args&, int), [[maybe_unused]] OnCuda on_cuda) {
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(("cpu_" + name).c_str(),
        [=](Parameters... arguments, int num_threads) { on_cpu(make(arguments...), num_threads); }, no_gil);
#if defined(DIMO_WITH_CUDA)
  m.def(("cuda_" + name).c_str(),
        [=](Parameters... arguments, int device_index, Address stream) {
          on_device<Args>(device_index, stream, name.c_str(), on_cuda, make(arguments...));
        },
        no_gil);
#endif
}

#if defined(DIMO_WITH_CUDA)
#define DIMO_LAUNCHERS(op) &cpu::op, &cuda::op
#else
#define DIMO_LAUNCHERS(op) &cpu::op, nullptr
#endif

void define_build_info(py::module_& m) {
  m.attr("compiler") = DIMO_COMPILER;
  m.attr("build_type") = DIMO_BUILD_TYPE;
#if defined(DIMO_WITH_CUDA)
  m.attr("cuda_toolkit") = DIMO_CUDA_TOOLKIT;
  m.attr("cuda_architectures") = split(DIMO_CUDA_ARCHITECTURES);
#else
  m.attr("cuda_toolkit") = py::none();
  m.attr("cuda_architectures") = std::vector<std::string>{};
#endif
  m.def("cuda_driver_status", &cuda_driver_status, "(usable, reason if not, driver version, runtime version)");
  m.def("cuda_device_problem", &cuda_device_problem, py::arg("device_index"),
        "Why this module's kernels cannot run on a device; empty if they can. Creates the device's context.");
}

constexpr const char* kIsaNames[] = {"baseline", "avx2", "avx512"};

void define_isa(py::module_& m) {
  m.def(
      "cpu_isa", [] { return kIsaNames[static_cast<int>(cpu::current_isa())]; },
      "Instruction set that SIMD kernels use.");
  m.def(
      "cpu_isas",
      [] {
        const int widest = static_cast<int>(cpu::widest_isa());
        return std::vector<std::string>(kIsaNames, kIsaNames + widest + 1);
      },
      "Instruction sets that this machine runs, the widest last.");
  m.def(
      "choose_cpu_isa",
      [](const std::string& name) {
        for (int i = 0; i <= static_cast<int>(cpu::widest_isa()); ++i)
          if (name == kIsaNames[i]) return cpu::choose_isa(static_cast<cpu::Isa>(i));
        throw std::invalid_argument("this machine has no CPU instruction set " + name);
      },
      py::arg("name"), "Use another instruction set in this process; for tests and benchmarks.");
}

// A tensor of logits: address, storage type, strides in elements (the vocabulary's last).
using LogitsArgument = std::tuple<Address, int, std::vector<int64_t>>;

LogitRows logit_rows(const std::optional<LogitsArgument>& argument, size_t dims) {
  LogitRows rows = {};
  if (!argument) return rows;
  const auto& [address, dtype, strides] = *argument;
  if (strides.size() != dims + 1) throw std::invalid_argument("logits: one stride a dimension is needed");
  rows.data = pointer<void>(address);
  rows.dtype = static_cast<DType>(dtype);
  rows.vocab_stride = strides.back();
  std::copy(strides.begin(), strides.end() - 1, rows.strides);
  return rows;
}

RowShape row_shape(const std::vector<int64_t>& sizes) {
  if (sizes.empty() || sizes.size() > kMaxDims + 1)
    throw std::invalid_argument("logits must have 1 to " + std::to_string(kMaxDims + 1) + " dimensions");
  RowShape shape = {1, sizes.back(), static_cast<int32_t>(sizes.size()) - 1, {}};
  std::copy(sizes.begin(), sizes.end() - 1, shape.sizes);
  for (int d = 0; d < shape.dims; ++d) shape.rows *= shape.sizes[d];
  return shape;
}

TokenDivergenceArgs token_divergence_args(DivergenceKind kind, double parameter, const std::vector<int64_t>& sizes,
                                          const std::array<std::optional<LogitsArgument>, 4>& logits,
                                          const std::tuple<double, Address, int64_t>& guidance,
                                          const std::array<double, 3>& temperatures_and_floor, Address mask,
                                          const std::tuple<Address, int64_t, bool>& factor, Address value,
                                          Address zeroed, Address ticket) {
  const RowShape shape = row_shape(sizes);
  const size_t dims = static_cast<size_t>(shape.dims);
  return {kind,
          parameter,
          shape,
          logit_rows(logits[0], dims),
          logit_rows(logits[1], dims),
          logit_rows(logits[2], dims),
          logit_rows(logits[3], dims),
          static_cast<float>(std::get<0>(guidance)),
          pointer<const float>(std::get<1>(guidance)),
          std::get<2>(guidance),
          static_cast<float>(temperatures_and_floor[0]),
          static_cast<float>(temperatures_and_floor[1]),
          static_cast<float>(temperatures_and_floor[2]),
          pointer<const bool>(mask),
          pointer<const float>(std::get<0>(factor)),
          std::get<1>(factor),
          std::get<2>(factor),
          pointer<float>(value),
          pointer<int64_t>(zeroed),
          pointer<int32_t>(ticket)};
}

void define_token_divergence(py::module_& m) {
  using py::arg;
  py::enum_<DivergenceKind>(m, "DivergenceKind")
      .value("ForwardKL", DivergenceKind::forward_kl)
      .value("ReverseKL", DivergenceKind::reverse_kl)
      .value("Jeffreys", DivergenceKind::jeffreys)
      .value("JensenShannon", DivergenceKind::jensen_shannon)
      .value("SquaredHellinger", DivergenceKind::squared_hellinger)
      .value("TotalVariation", DivergenceKind::total_variation)
      .value("PearsonChi2", DivergenceKind::pearson_chi2)
      .value("NeymanChi2", DivergenceKind::neyman_chi2)
      .value("Alpha", DivergenceKind::alpha)
      .value("LeCam", DivergenceKind::le_cam);
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "cpu_token_divergence",
      [](DivergenceKind kind, double parameter, const std::vector<int64_t>& sizes,
         const std::array<std::optional<LogitsArgument>, 4>& logits,
         const std::tuple<double, Address, int64_t>& guidance, const std::array<double, 3>& temperatures_and_floor,
         Address mask, const std::tuple<Address, int64_t, bool>& factor, Address value, Address zeroed, Address ticket,
         int num_threads) {
        cpu::token_divergence(token_divergence_args(kind, parameter, sizes, logits, guidance, temperatures_and_floor,
                                                    mask, factor, value, zeroed, ticket),
                              num_threads);
      },
      arg("kind"), arg("parameter"), arg("sizes"), arg("logits"), arg("guidance"), arg("temperatures_and_floor"),
      arg("mask"), arg("factor"), arg("value"), arg("zeroed"), arg("ticket"), arg("num_threads"), no_gil,
      "logits: teacher, unconditional, auxiliary, gradient; guidance: scale, scales, rows a sample; factor: address, "
      "stride, whether the gradient includes it.");
#if defined(DIMO_WITH_CUDA)
  m.def(
      "cuda_token_divergence",
      [](DivergenceKind kind, double parameter, const std::vector<int64_t>& sizes,
         const std::array<std::optional<LogitsArgument>, 4>& logits,
         const std::tuple<double, Address, int64_t>& guidance, const std::array<double, 3>& temperatures_and_floor,
         Address mask, const std::tuple<Address, int64_t, bool>& factor, Address value, Address zeroed, Address ticket,
         int device_index, Address stream) {
        on_device(device_index, stream, "token_divergence", &cuda::token_divergence,
                  token_divergence_args(kind, parameter, sizes, logits, guidance, temperatures_and_floor, mask, factor,
                                        value, zeroed, ticket));
      },
      arg("kind"), arg("parameter"), arg("sizes"), arg("logits"), arg("guidance"), arg("temperatures_and_floor"),
      arg("mask"), arg("factor"), arg("value"), arg("zeroed"), arg("ticket"), arg("device_index"), arg("stream"),
      no_gil);
#endif
}

#if defined(DIMO_WITH_CUDA)
void define_scale_gradient(py::module_& m) {
  using py::arg;
  m.def(
      "cuda_scale_gradient",
      [](const std::vector<int64_t>& sizes, const LogitsArgument& from, const LogitsArgument& to, Address upstream,
         int64_t upstream_stride, Address factor, int64_t factor_stride, int device_index, Address stream) {
        const RowShape shape = row_shape(sizes);
        const size_t dims = static_cast<size_t>(shape.dims);
        on_device(device_index, stream, "scale_gradient", &cuda::scale_gradient,
                  {shape, logit_rows(from, dims), logit_rows(to, dims), pointer<const float>(upstream), upstream_stride,
                   pointer<const float>(factor), factor_stride});
      },
      arg("sizes"), arg("from"), arg("to"), arg("upstream"), arg("upstream_stride"), arg("factor"),
      arg("factor_stride"), arg("device_index"), arg("stream"), py::call_guard<py::gil_scoped_release>());
}
#endif

CrossEntropyArgs cross_entropy_args(const std::vector<int64_t>& sizes,
                                    const std::array<std::optional<LogitsArgument>, 2>& logits, Address targets,
                                    Address mask, int64_t valid_vocab, double label_smoothing,
                                    const std::tuple<double, bool, bool>& factor, Address value, Address total,
                                    Address out_factor, Address workspace) {
  const RowShape shape = row_shape(sizes);
  const size_t dims = static_cast<size_t>(shape.dims);
  return {shape,
          logit_rows(logits[0], dims),
          logit_rows(logits[1], dims),
          pointer<const int64_t>(targets),
          pointer<const bool>(mask),
          valid_vocab,
          static_cast<float>(label_smoothing),
          static_cast<float>(std::get<0>(factor)),
          std::get<1>(factor),
          std::get<2>(factor),
          pointer<float>(value),
          pointer<float>(total),
          pointer<float>(out_factor),
          pointer<uint32_t>(workspace)};
}

void define_masked_cross_entropy(py::module_& m) {
  using py::arg;
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def(
      "cpu_masked_cross_entropy",
      [](const std::vector<int64_t>& sizes, const std::array<std::optional<LogitsArgument>, 2>& logits, Address targets,
         Address mask, int64_t valid_vocab, double label_smoothing, const std::tuple<double, bool, bool>& factor,
         Address value, Address total, Address out_factor, Address workspace, int num_threads) {
        cpu::masked_cross_entropy(cross_entropy_args(sizes, logits, targets, mask, valid_vocab, label_smoothing, factor,
                                                     value, total, out_factor, workspace),
                                  num_threads);
      },
      arg("sizes"), arg("logits"), arg("targets"), arg("mask"), arg("valid_vocab"), arg("label_smoothing"),
      arg("factor"), arg("value"), arg("total"), arg("out_factor"), arg("workspace"), arg("num_threads"), no_gil,
      "logits: themselves, gradient; factor: scale, whether it is divided by the count, whether the gradient includes "
      "it.");
#if defined(DIMO_WITH_CUDA)
  m.def(
      "cuda_masked_cross_entropy",
      [](const std::vector<int64_t>& sizes, const std::array<std::optional<LogitsArgument>, 2>& logits, Address targets,
         Address mask, int64_t valid_vocab, double label_smoothing, const std::tuple<double, bool, bool>& factor,
         Address value, Address total, Address out_factor, Address workspace, int device_index, Address stream) {
        on_device(device_index, stream, "masked_cross_entropy", &cuda::masked_cross_entropy,
                  cross_entropy_args(sizes, logits, targets, mask, valid_vocab, label_smoothing, factor, value, total,
                                     out_factor, workspace));
      },
      arg("sizes"), arg("logits"), arg("targets"), arg("mask"), arg("valid_vocab"), arg("label_smoothing"),
      arg("factor"), arg("value"), arg("total"), arg("out_factor"), arg("workspace"), arg("device_index"),
      arg("stream"), no_gil);
#endif
}

// What launchers of draws take: logits conditional and unconditional; guidance: scale, scales, rows a sample; key:
// address, stride; filters: top_k, top_p, min_p.
SampleCategoricalArgs sample_categorical_args(const std::vector<int64_t>& sizes,
                                              const std::array<std::optional<LogitsArgument>, 2>& logits,
                                              const std::tuple<double, Address, int64_t>& guidance,
                                              const std::tuple<Address, int64_t>& key, double temperature,
                                              const std::tuple<int64_t, double, double>& filters, Address tokens,
                                              Address log_prob) {
  const RowShape shape = row_shape(sizes);
  const size_t dims = static_cast<size_t>(shape.dims);
  return {shape,
          logit_rows(logits[0], dims),
          logit_rows(logits[1], dims),
          static_cast<float>(std::get<0>(guidance)),
          pointer<const float>(std::get<1>(guidance)),
          std::get<2>(guidance),
          pointer<const int64_t>(std::get<0>(key)),
          std::get<1>(key),
          temperature,
          std::get<0>(filters),
          std::get<1>(filters),
          std::get<2>(filters),
          pointer<int64_t>(tokens),
          pointer<float>(log_prob),
          {}};
}

// A draw of some rows. chance: of every position, of each sample.
SampleCategoricalArgs reveal_ancestral_args(const std::vector<int64_t>& sizes,
                                            const std::array<std::optional<LogitsArgument>, 2>& logits,
                                            const std::tuple<double, Address, int64_t>& guidance,
                                            const std::tuple<Address, int64_t>& key, double temperature,
                                            const std::tuple<int64_t, double, double>& filters, Address state,
                                            int64_t mask_id, const std::tuple<double, Address>& chance,
                                            Address out_tokens) {
  check_length("reveal_ancestral", std::get<2>(guidance));
  SampleCategoricalArgs args =
      sample_categorical_args(sizes, logits, guidance, key, temperature, filters, out_tokens, 0);
  args.wanted = {pointer<const int64_t>(state), mask_id, std::get<0>(chance),
                 pointer<const float>(std::get<1>(chance))};
  return args;
}

// count: of every sample, of each; workspace: drawn ids, their log-probabilities.
RevealConfidentArgs reveal_confident_args(const std::vector<int64_t>& sizes,
                                          const std::array<std::optional<LogitsArgument>, 2>& logits,
                                          const std::tuple<double, Address, int64_t>& guidance,
                                          const std::tuple<Address, int64_t>& key, double temperature,
                                          const std::tuple<int64_t, double, double>& filters, Address state,
                                          int64_t mask_id, const std::tuple<int64_t, Address>& count,
                                          double noise_scale, const std::tuple<Address, Address>& workspace,
                                          Address out_tokens) {
  check_length("reveal_confident", std::get<2>(guidance));
  SampleCategoricalArgs draw = sample_categorical_args(sizes, logits, guidance, key, temperature, filters,
                                                       std::get<0>(workspace), std::get<1>(workspace));
  draw.wanted = {pointer<const int64_t>(state), mask_id, 1.0, nullptr};
  return {draw, pointer<int64_t>(out_tokens), std::get<0>(count), pointer<const int64_t>(std::get<1>(count)),
          noise_scale};
}

// embeddings: read, written; ids: address, rows of the table.
PerturbEmbeddingsArgs perturb_embeddings_args(const std::vector<int64_t>& sizes,
                                              const std::array<std::optional<LogitsArgument>, 2>& embeddings,
                                              int64_t rows_per_sample, const std::tuple<Address, int64_t>& key,
                                              double sigma, Address scale, const std::tuple<Address, int64_t>& ids) {
  check_length("perturb_embeddings", sizes.empty() ? 0 : sizes.back());
  const RowShape shape = row_shape(sizes);
  const size_t dims = static_cast<size_t>(shape.dims);
  return {shape,
          logit_rows(embeddings[0], dims),
          logit_rows(embeddings[1], dims),
          rows_per_sample,
          pointer<const int64_t>(std::get<0>(key)),
          std::get<1>(key),
          sigma,
          pointer<const float>(scale),
          pointer<const int64_t>(std::get<0>(ids)),
          std::get<1>(ids)};
}

void define_draws(py::module_& m) {
  define_launchers(m, "fold_in", &fold_in_args, DIMO_LAUNCHERS(fold_in));
  define_launchers(m, "uniform_words", &uniform_words_args, DIMO_LAUNCHERS(uniform_words));
  define_launchers(m, "mask_tokens", &mask_tokens_args, DIMO_LAUNCHERS(mask_tokens));
  define_launchers(m, "init_tokens", &init_tokens_args, DIMO_LAUNCHERS(init_tokens));
  define_launchers(m, "sample_categorical", &sample_categorical_args, DIMO_LAUNCHERS(sample_categorical));
  define_launchers(m, "reveal_ancestral", &reveal_ancestral_args, DIMO_LAUNCHERS(sample_categorical));
  define_launchers(m, "reveal_confident", &reveal_confident_args, DIMO_LAUNCHERS(reveal_confident));
  for (const char* name : {"perturb_embeddings", "embed_and_perturb"})
    define_launchers(m, name, &perturb_embeddings_args, DIMO_LAUNCHERS(perturb_embeddings));
}

}  // namespace
}  // namespace dimo

PYBIND11_MODULE(_core, m, py::mod_gil_not_used()) {
  m.doc() = "Native kernels of dimo_ext. Addresses are integers; the Python layer checks every argument.";
  dimo::define_build_info(m);
  m.def("philox4x32", &dimo::philox, py::arg("counter"), py::arg("key"), "Ten rounds; for tests.");
  dimo::define_isa(m);
#if defined(__linux__)
  dimo::define_output_memory(m);
#endif
  dimo::define_token_divergence(m);
#if defined(DIMO_WITH_CUDA)
  dimo::define_scale_gradient(m);
#endif
  dimo::define_masked_cross_entropy(m);
  dimo::define_draws(m);
}
