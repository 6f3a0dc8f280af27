"""Token-level divergence with its gradient: the native kernel against PyTorch expressions and peers.

The main variant is the generalised Jeffrey with guidance, value and gradient in one call: three reads and one write of
every counted logit, and zeros for the others. Further ones: Jensen-Shannon without guidance, two temperatures, and
logits [B, V, H, W] seen as [B, H, W, V], whose ids lie apart. Peers are the plain expression and torch.compile of it,
with backward, and, where it is installed, Liger-Kernel's Jensen-Shannon (which takes log-probabilities, knows no
guidance and has no mask). On a CPU with AVX-512 the kernel's AVX2 twin runs too. Ceilings are a copy, measured first,
and a plain pass with three reads and one write into memory that is there already. Every other candidate allocates what
it returns, but "in place", which overwrites the auxiliary logits; on a CPU ours then takes the memory that its last
output left, PyTorch's get fresh memory from the system.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import Candidate, arguments, chosen, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext
from dimo_ext._backend import native_module

BETA = -0.2


@dataclass(frozen=True)
class Variant:
    """What is computed, of which layout."""

    divergence: str = f"jeffreys:{BETA}"
    guidance: float | None = 2.0
    teacher_temperature: float = 1.0
    strided: bool = False


VARIANTS = {
    "guided": Variant(),
    "jensen-shannon": Variant("jensen_shannon", None),
    "two temperatures": Variant(teacher_temperature=0.8),
    "vocabulary first": Variant(strided=True),
}
# rows, vocabulary, share of rows that count, variant
CPU_CASES = [
    *((rows, vocab, share, "guided") for rows, vocab, share in [
        (16384, 1025, 1.0), (16384, 1025, 0.4), (262144, 18, 1.0), (4096, 4096, 1.0), (1024, 16384, 1.0),
        (256, 50258, 1.0), (128, 126464, 1.0), (64, 262144, 1.0)]),
    *((16384, 1025, 1.0, name) for name in VARIANTS if name != "guided"),
]  # fmt: skip
GPU_CASES = [
    *((rows, vocab, share, "guided") for rows, vocab, share in [
        (1 << 24, 17, 1.0), (16384, 1025, 1.0), (16384, 1025, 0.6), (16384, 1032, 1.0), (16384, 8193, 1.0),
        (16384, 8193, 0.6), (8192, 16384, 1.0), (2048, 50258, 1.0), (4096, 126464, 1.0), (4096, 126464, 0.6),
        (1024, 151936, 1.0), (512, 262144, 1.0)]),
    *((rows, vocab, 1.0, "jensen-shannon") for rows, vocab in [
        (1 << 24, 17), (16384, 1025), (16384, 8193), (2048, 50258), (512, 262144)]),
    *((16384, 8193, 1.0, name) for name in ("two temperatures", "vocabulary first")),
]  # fmt: skip


def expression(variant: Variant, teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """The usual PyTorch expression of the loss, from logits, in float32."""
    z_p = teacher.float() if variant.guidance is None else uncond.float() + variant.guidance * (
        teacher.float() - uncond.float()
    )  # fmt: skip
    log_p, log_q = (z_p / variant.teacher_temperature).log_softmax(-1), auxiliary.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if variant.divergence == "jensen_shannon":
        log_m = ((p + q) / 2).log()
        value = (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2
    else:
        value = ((1 - BETA) * p * (log_p - log_q) + BETA * q * (log_q - log_p)).sum(-1)
    return (value * mask).sum()


def with_gradient(loss: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Value and the gradient of the auxiliary logits, the third argument."""
    auxiliary = arguments[2].detach().requires_grad_()
    value = loss(arguments[0], arguments[1], auxiliary, arguments[3])
    return value, torch.autograd.grad(value, auxiliary)[0]


def options(variant: Variant, uncond: Tensor, mask: Tensor) -> dict[str, object]:
    """The operators' keyword arguments."""
    guidance = {} if variant.guidance is None else {
        "teacher_uncond_logits": uncond, "guidance_scale": variant.guidance
    }  # fmt: skip
    return guidance | {"mask": mask, "teacher_temperature": variant.teacher_temperature, "reduction": "sum"}


def ours(variant: Variant, teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """The loss, whose gradient goes to the auxiliary logits themselves."""
    return dimo_ext.distribution_matching_loss(
        auxiliary, teacher, auxiliary, variant.divergence, **options(variant, uncond, mask)
    )


def ours_in_place(variant: Variant, teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """The gradient goes where the auxiliary logits were: the next call reads it as logits."""
    return dimo_ext.divergence_gradient_(auxiliary, teacher, variant.divergence, **options(variant, uncond, mask))


def ours_on(isa: str, *arguments) -> tuple[Tensor, Tensor]:
    """Ours with another of the CPU's instruction sets."""
    core = native_module()
    widest = core.cpu_isa()
    core.choose_cpu_isa(isa)
    try:
        return with_gradient(*arguments)
    finally:
        core.choose_cpu_isa(widest)


def liger(teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """Liger's Jensen-Shannon divergence of log-probabilities: the nearest kernel that it has."""
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=0.5)(auxiliary.log_softmax(-1), teacher.log_softmax(-1))


def candidates(
    variant: Variant, logits: tuple[Tensor, ...], device: torch.device, *, with_compile: bool
) -> dict[str, Candidate]:
    """What is compared on one case; ``logits`` are teacher, unconditional, auxiliary and the mask."""
    served = dimo_ext.build_info()["operators"]["token_divergence"][device.type]["backend"]
    loss, plain = partial(ours, variant), partial(expression, variant)
    calls: dict[str, Candidate] = {served: lambda: with_gradient(loss, *logits)}
    if served == "native" and device.type == "cpu" and native_module().cpu_isa() == "avx512":
        calls["native, AVX2"] = lambda: ours_on("avx2", loss, *logits)
    own = [z.clone() for z in logits]
    calls[f"{served}, in place"] = lambda: ours_in_place(variant, *own)
    calls["eager"] = lambda: with_gradient(plain, *logits)
    if with_compile:
        compiled = torch.compile(plain, dynamic=False)
        calls["torch.compile"] = lambda: with_gradient(compiled, *logits)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel") and not variant.strided:
        calls["liger JSD, unguided"] = lambda: with_gradient(liger, *logits)
    target = torch.empty_like(logits[2])

    def pass_over() -> None:  # three reads, one write, in memory that is there already
        torch.addcmul(logits[0], logits[1], logits[2], out=target)

    calls["3 reads, 1 write"] = pass_over
    return calls


def relative_error(variant: Variant, logits: tuple[Tensor, ...]) -> float:
    """Relative L2 error of the gradient of 64 rows against float64."""
    few = [t[:64] for t in logits]
    _, actual = with_gradient(partial(ours, variant), *few)
    _, exact = with_gradient(partial(expression, variant), *(t.double() for t in few[:3]), few[3])
    return ((actual.double() - exact).norm() / exact.norm()).item()


def inputs(
    variant: Variant, rows: int, vocab: int, share: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, ...]:
    """Teacher, unconditional and auxiliary logits, and the mask."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (rows // 256, vocab, 256) if variant.strided else (rows, vocab)
    logits = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3)]
    mask = torch.rand(rows, generator=generator, device=device) < share
    if not variant.strided:
        return *logits, mask
    return *(z.transpose(1, 2) for z in logits), mask.view(-1, 256)


def main() -> None:
    """Time every case and dtype, print the table, write the CSV."""
    args = arguments(__doc__)
    on_gpu = args.device.type == "cuda"
    ceiling, rows = copy_bandwidth(args.device), []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for count, vocab, share, name in chosen(GPU_CASES if on_gpu else CPU_CASES, args.vocab):
            variant = VARIANTS[name]
            given = inputs(variant, count, vocab, share, dtype, args.device)
            with_compile = args.compile and (on_gpu or dtype == torch.float32)
            calls = candidates(variant, given, args.device, with_compile=with_compile)
            timings = time_interleaved(calls, args.device, seconds=args.seconds)
            reads = 2 if variant.guidance is None else 3
            useful = int(count * vocab * dtype.itemsize * (1 + reads * share))
            case = {"rows": count, "vocab": vocab, "dtype": str(dtype)[6:], "counted": share, "variant": name}
            case["gradient_error"] = f"{relative_error(variant, given):.1e}"
            results = result_rows(case, timings, useful, ceiling)
            for row in results:
                print(*row.values(), sep="  ", file=sys.stderr, flush=True)
            rows += results
            torch._dynamo.reset()
    report(rows, args.device, ceiling, args.out)


if __name__ == "__main__":
    main()
