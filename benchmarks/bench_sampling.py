"""Categorical draws: the native kernel against PyTorch expressions and peers.

Plain, guided, with top-k and top-p, and of logits [B, V, H, W]; ours gives the log-probability of the draw too, the
others the id alone. Peers are torch's Categorical, the exponential race softmax(z) / e that eager PyTorch does best,
torch.compile of it, and, where it is installed, FlashInfer (which takes float32 probabilities, whose softmax counts,
and knows no guidance). Useful bytes: every logit read once.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from common import Candidate, arguments, chosen, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext

GUIDANCE, TOP_K, TOP_P = 2.0, 50, 0.9
MODES = ("plain", "guided", "top-k, top-p", "vocabulary first")
STRIDED_VOCABS = (1025, 8193)
# rows, vocabulary
CPU_CASES = [(262144, 17), (16384, 1025), (2048, 8193), (1024, 16384), (256, 50258), (128, 126464), (64, 262144)]
GPU_CASES = [(1 << 24, 17), (16384, 1025), (16384, 1024), (16384, 8193), (8192, 16384), (2048, 50258), (4096, 126464),
             (512, 262144)]  # fmt: skip


def guided(logits: Tensor, uncond: Tensor | None) -> Tensor:
    """In float32."""
    return logits.float() if uncond is None else uncond.float() + GUIDANCE * (logits.float() - uncond.float())


def categorical(logits: Tensor, uncond: Tensor | None) -> Tensor:
    """Draw as torch's documentation does."""
    return torch.distributions.Categorical(probs=guided(logits, uncond).softmax(-1), validate_args=False).sample()


def race(logits: Tensor, uncond: Tensor | None) -> Tensor:
    """The Gumbel-max draw without its logarithms."""
    p = guided(logits, uncond).softmax(-1)
    return (p / torch.empty_like(p).exponential_()).argmax(-1)


def filtered_race(logits: Tensor, uncond: Tensor | None) -> Tensor:
    """The usual top-k, then top-p among the ids left, which are sorted already."""
    values, ids = guided(logits, uncond).topk(min(TOP_K, logits.shape[-1]), -1)
    p = values.softmax(-1)
    p = torch.where(p.cumsum(-1) - p < TOP_P, p, 0.0)
    return ids.gather(-1, (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True))[..., 0]


def vocabulary_first(logits: Tensor) -> Tensor:
    """The same logits as a convolution over 256 positions a sample lays them out."""
    return logits.unflatten(0, (-1, 256)).transpose(1, 2).contiguous().transpose(1, 2)


def modes(vocab: int, dtype: torch.dtype, *, on_gpu: bool) -> tuple[str, ...]:
    """What is timed of a case."""
    if dtype != torch.float32 and not on_gpu:
        return MODES[:1]
    return MODES if vocab in STRIDED_VOCABS else MODES[:-1]


def candidates(logits: Tensor, uncond: Tensor | None, *, filtered: bool, with_compile: bool) -> dict[str, Candidate]:
    """What is compared on one case."""
    device, vocab = logits.device, logits.shape[-1]
    served = dimo_ext.build_info()["operators"]["sample_categorical"][device.type]["backend"]
    options: dict[str, Any] = {} if uncond is None else {"uncond_logits": uncond, "guidance_scale": GUIDANCE}
    options |= {"top_k": min(TOP_K, vocab), "top_p": TOP_P} if filtered else {}
    key = dimo_ext.random_key(0, device=device)
    expression = filtered_race if filtered else race
    calls: dict[str, Candidate] = {served: lambda: dimo_ext.sample_categorical(logits, key=key, **options)}
    calls["eager"] = lambda: expression(logits, uncond)
    if not filtered:
        calls["Categorical"] = lambda: categorical(logits, uncond)
    if with_compile:
        compiled = torch.compile(expression, dynamic=False)
        calls["torch.compile"] = lambda: compiled(logits, uncond)
    if device.type == "cuda" and uncond is None and importlib.util.find_spec("flashinfer"):
        import flashinfer

        if filtered:
            calls["flashinfer"] = lambda: flashinfer.sampling.top_k_top_p_sampling_from_probs(
                logits.float().softmax(-1), options["top_k"], TOP_P, filter_apply_order="top_k_first"
            )
        else:
            calls["flashinfer"] = lambda: flashinfer.sampling.sampling_from_probs(logits.float().softmax(-1))
    return calls


def main() -> None:
    """Time every case, mode and dtype, print the table, write the CSV."""
    args = arguments(__doc__)
    on_gpu = args.device.type == "cuda"
    ceiling, rows = copy_bandwidth(args.device), []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for count, vocab in chosen(GPU_CASES if on_gpu else CPU_CASES, args.vocab):
            generator = torch.Generator(args.device).manual_seed(0)
            logits, other = (
                (2.0 * torch.randn(count, vocab, generator=generator, device=args.device)).to(dtype) for _ in range(2)
            )
            for mode in modes(vocab, dtype, on_gpu=on_gpu):
                uncond = other if mode == "guided" else None
                compiles = args.compile and (on_gpu or dtype == torch.float32)
                given = vocabulary_first(logits) if mode == MODES[3] else logits
                calls = candidates(given, uncond, filtered=mode == MODES[2], with_compile=compiles)
                timings = time_interleaved(calls, args.device, seconds=args.seconds)
                useful = count * vocab * dtype.itemsize * (1 if uncond is None else 2)
                case = {"rows": count, "vocab": vocab, "dtype": str(dtype)[6:], "mode": mode}
                rows += result_rows(case, timings, useful, ceiling)
                torch._dynamo.reset()
    report(rows, args.device, ceiling, args.out)


if __name__ == "__main__":
    main()
