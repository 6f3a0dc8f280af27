#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test, sanitise and benchmark in one command, within ten minutes.
#
#   scripts/gpu_check.sh OUT_FOLDER
#
# Writes log.txt, summary.txt, build_info.json and one CSV a benchmark into OUT_FOLDER. Fetches nothing: torch, pytest,
# scikit-build-core, pybind11, CMake and nvcc must be there. PYTHON names the interpreter (default python3). The package
# is installed into that interpreter's environment. Fails when the build or a test fails.
set -uo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUT_FOLDER" >&2
  exit 2
fi
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
deadline=$((SECONDS + 570))
failed=0
: >"$out/log.txt"
: >"$out/summary.txt"

die() {
  echo "gpu_check: $*" | tee -a "$out/summary.txt" >&2
  exit 1
}

# phase NAME SECONDS COMMAND...: runs it into the log, within its own limit and the deadline.
phase() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  ((limit = limit < deadline - SECONDS ? limit : deadline - SECONDS))
  if ((limit < 1)); then
    echo "skipped  $name: out of time" | tee -a "$out/summary.txt"
    return 124
  fi
  printf '\n===== %s\n' "$name" >>"$out/log.txt"
  timeout --kill-after=5 "$limit" "$@" >>"$out/log.txt" 2>&1
  status=$?
  printf '%-8s %s (%d s, exit %d)\n' "$([[ $status == 0 ]] && echo ok || echo FAILED)" "$name" $((SECONDS - begin)) \
    "$status" | tee -a "$out/summary.txt"
  return $status
}

command -v nvcc >/dev/null || die "no nvcc on PATH; install the CUDA toolkit"
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[[ $capability =~ ^[0-9]+\.[0-9]+$ ]] || die "no NVIDIA GPU: nvidia-smi reports none"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  die "$python has no torch that sees the GPU"

# Machine code for this GPU alone keeps the build short.
export DIMO_EXT_CUDA=on DIMO_EXT_REQUIRE_NATIVE=1 CUDAARCHS=${CUDAARCHS:-${capability/./}-real}
phase "build for $CUDAARCHS" 270 \
  "$python" -m pip install --no-build-isolation --no-deps --force-reinstall . || die "the build failed; see log.txt"

# Isolated (-I), so that the installed package is imported and not the source folder.
phase "kernels served on the GPU" 60 "$python" -I - "$out/build_info.json" <<'PYTHON' || failed=1
import json, pathlib, sys
import dimo_ext
info = dimo_ext.build_info()
pathlib.Path(sys.argv[1]).write_text(json.dumps(info, indent=1))
kernels = (
    *("fold_in", "uniform_words", "mask_tokens", "init_tokens", "token_divergence", "masked_cross_entropy"),
    *("sample_categorical", "reveal_ancestral", "reveal_confident", "perturb_embeddings", "embed_and_perturb"),
)
served = {name: info["operators"][name]["cuda"] for name in kernels}
sys.exit("; ".join(f"{name}: {s['problem']}" for name, s in served.items() if s["backend"] != "native") or None)
PYTHON

# With pytest-xdist on several cores; pytest-benchmark warns beside it, and warnings are errors.
parallel=()
"$python" -c 'import xdist' 2>/dev/null && parallel=(-n "$(nproc)" -p no:benchmark)
PYTHONSAFEPATH=1 OMP_NUM_THREADS=2 phase tests 300 "$python" -m pytest -q --durations=10 "${parallel[@]}" || failed=1

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # Without torch's caching every tensor is an allocation of its own, so that an overrun by one element shows.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 phase "compute-sanitizer $tool" 60 \
      compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -I - <<'PYTHON' || failed=1
import torch
import dimo_ext
with dimo_ext.use_backend("native"):
    for batch, length in [(1, 1), (3, 65), (2, 1000), (2, 5000)]:
        tokens = torch.zeros(batch, length, dtype=torch.int64, device="cuda")
        ratio = torch.linspace(0.1, 0.9, batch, device="cuda")
        for mode in ("exact", "bernoulli"):
            key = dimo_ext.random_key(list(range(batch)), device="cuda")
            dimo_ext.mask_tokens(tokens, ratio, 7, mode=mode, key=key)
    for vocab in (1, 17, 1025, 3001, 60001):  # every geometry, aligned and unaligned rows
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wide = torch.randn(3, 5, vocab + 3, device="cuda").to(dtype)
            teacher, auxiliary = wide[..., 1:-2], wide.flip(0)[..., 2:-1].detach().requires_grad_()
            mask = torch.rand(3, 5, device="cuda") < 0.6
            loss = dimo_ext.token_divergence(
                teacher, auxiliary, "jeffreys:-0.2", teacher_uncond_logits=teacher.flip(0), guidance_scale=2.0, mask=mask
            )
            loss.sum().backward()
            targets = torch.randint(vocab, (3, 5), device="cuda")
            dimo_ext.masked_cross_entropy(auxiliary, targets, mask, label_smoothing=0.1).backward()
            strided = auxiliary.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            dimo_ext.masked_cross_entropy(strided, targets, mask, valid_vocab=max(vocab - 1, 1)).backward()
            key = dimo_ext.random_key([1, 2, 3], device="cuda")
            guided = {"uncond_logits": teacher.flip(0), "guidance_scale": 2.0}
            for filters in ({}, {"top_k": min(vocab, 50), "top_p": 0.9}, {"temperature": 0.0}):
                dimo_ext.sample_categorical(teacher, key=key, **filters)
                dimo_ext.sample_categorical(teacher, key=key, **guided, **filters)
                dimo_ext.reveal_ancestral(teacher, mask.long(), 0.5, 1, key=key, **filters)
            dimo_ext.reveal_confident(teacher, mask.long(), 2, 1, noise_scale=1.0, key=key, **guided)
            dimo_ext.perturb_embeddings(teacher, 0.3, key=key)
            dimo_ext.embed_and_perturb(targets % 5, teacher[0], 0.3, key=key)
torch.cuda.synchronize()
PYTHON
  done
else
  echo "skipped  compute-sanitizer: not installed" | tee -a "$out/summary.txt"
fi

# A number missing is no defect. torch.compile takes most of the time where it is a candidate: a few vocabularies only.
for benchmark in benchmarks/bench_*.py; do
  name=$(basename "$benchmark" .py)
  phase "$name" 60 "$python" "$benchmark" --device cuda --seconds 0.3 --no-compile --out "$out/$name.csv" || true
done
phase "step_time" 90 "$python" benchmarks/step_time.py maskgit-imagenet256 --device cuda --seconds 20 --no-compile \
  --out "$out/step_time_maskgit-imagenet256.csv" || true
for name in divergence cross_entropy sampling; do
  phase "bench_$name with torch.compile" 90 "$python" "benchmarks/bench_$name.py" --device cuda --seconds 0.3 \
    --vocab 1025 126464 --out "$out/bench_${name}_compile.csv" || true
done

echo "$([[ $failed == 0 ]] && echo passed || echo FAILED) in $SECONDS s; details in $out/log.txt" |
  tee -a "$out/summary.txt"
exit $failed
