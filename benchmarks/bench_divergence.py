"""Token-level divergence with its gradient: the native kernel against PyTorch expressions and peers.

Generalised Jeffrey with guidance, value and gradient in one call: three reads and one write of every counted logit,
and zeros for the others. Peers are the plain expression and torch.compile of it, with backward, and, where it is
installed, Liger-Kernel's JSD (which takes log-probabilities, knows no guidance and has no mask). On a CPU with AVX-512
the kernel's AVX2 twin runs too. Ceilings are a copy, measured first, and a plain pass with the same three reads and one
write into memory that is there already; every other candidate allocates what it returns.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch
from common import Candidate, arguments, chosen, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext
from dimo_ext._backend import native_module

BETA, GUIDANCE = -0.2, 2.0
# rows, vocabulary, share of rows that count
CPU_CASES = [(16384, 1025, 1.0), (16384, 1025, 0.4), (262144, 18, 1.0), (4096, 4096, 1.0), (1024, 16384, 1.0),
             (256, 50258, 1.0), (128, 126464, 1.0), (64, 262144, 1.0)]  # fmt: skip
GPU_CASES = [
    *((1 << 24, 17, 1.0), (16384, 1025, 1.0), (16384, 1025, 0.6), (16384, 1032, 1.0)),
    *((16384, 8193, 1.0), (16384, 8193, 0.6), (8192, 16384, 1.0), (2048, 50258, 1.0)),
    *((4096, 126464, 1.0), (4096, 126464, 0.6), (1024, 151936, 1.0), (512, 262144, 1.0)),
]


def expression(teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """The usual PyTorch expression of the loss, from logits, in float32."""
    guided = uncond.float() + GUIDANCE * (teacher.float() - uncond.float())
    log_p, log_q = guided.log_softmax(-1), auxiliary.float().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    value = ((1 - BETA) * p * (log_p - log_q) + BETA * q * (log_q - log_p)).sum(-1)
    return (value * mask).sum()


def with_gradient(loss: Callable[..., Tensor], *arguments: Tensor) -> tuple[Tensor, Tensor]:
    """Value and the gradient of the auxiliary logits, the third argument."""
    auxiliary = arguments[2].detach().requires_grad_()
    value = loss(arguments[0], arguments[1], auxiliary, arguments[3])
    return value, torch.autograd.grad(value, auxiliary)[0]


def ours(teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """The operator with the same arguments."""
    return dimo_ext.token_divergence(
        teacher, auxiliary, dimo_ext.Jeffreys(BETA), teacher_uncond_logits=uncond, guidance_scale=GUIDANCE, mask=mask
    ).sum()


def ours_on(isa: str, *logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ours with another of the CPU's instruction sets."""
    core = native_module()
    widest = core.cpu_isa()
    core.choose_cpu_isa(isa)
    try:
        return with_gradient(ours, *logits)
    finally:
        core.choose_cpu_isa(widest)


def liger(teacher: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor) -> Tensor:
    """Liger's Jensen-Shannon divergence of log-probabilities: the nearest kernel that it has."""
    from liger_kernel.transformers import LigerJSD

    return LigerJSD(beta=0.5)(auxiliary.log_softmax(-1), teacher.log_softmax(-1))


def candidates(logits: tuple[Tensor, ...], device: torch.device, *, with_compile: bool) -> dict[str, Candidate]:
    """What is compared on one case; ``logits`` are teacher, unconditional, auxiliary and the mask."""
    served = dimo_ext.build_info()["operators"]["token_divergence"][device.type]["backend"]
    calls: dict[str, Candidate] = {served: lambda: with_gradient(ours, *logits)}
    if served == "native" and device.type == "cpu" and native_module().cpu_isa() == "avx512":
        calls["native, AVX2"] = lambda: ours_on("avx2", *logits)
    calls["eager"] = lambda: with_gradient(expression, *logits)
    if with_compile:
        compiled = torch.compile(expression, dynamic=False)
        calls["torch.compile"] = lambda: with_gradient(compiled, *logits)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        calls["liger JSD, unguided"] = lambda: with_gradient(liger, *logits)
    target = torch.empty_like(logits[2])

    def pass_over() -> None:  # three reads, one write, in memory that is there already
        torch.addcmul(logits[0], logits[1], logits[2], out=target)

    calls["3 reads, 1 write"] = pass_over
    return calls


def relative_error(logits: tuple[Tensor, ...]) -> float:
    """Relative L2 error of the gradient of 64 rows against float64."""
    few = [t[:64] for t in logits]
    _, actual = with_gradient(ours, *few)
    _, exact = with_gradient(expression, *(t.double() for t in few[:3]), few[3])
    return ((actual.double() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Time every case and dtype, print the table, write the CSV."""
    args = arguments(__doc__)
    on_gpu = args.device.type == "cuda"
    ceiling, rows = copy_bandwidth(args.device), []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for count, vocab, share in chosen(GPU_CASES if on_gpu else CPU_CASES, args.vocab):
            generator = torch.Generator(args.device).manual_seed(0)
            *logits, draws = (
                *(torch.randn(count, vocab, generator=generator, device=args.device).to(dtype) for _ in range(3)),
                torch.rand(count, generator=generator, device=args.device),
            )
            given = (*logits, draws < share)
            calls = candidates(given, args.device, with_compile=args.compile and (on_gpu or dtype == torch.float32))
            timings = time_interleaved(calls, args.device, seconds=args.seconds)
            useful = int(count * vocab * dtype.itemsize * (1 + 3 * share))
            case = {"rows": count, "vocab": vocab, "dtype": str(dtype)[6:], "counted": share}
            case["gradient_error"] = f"{relative_error(given):.1e}"
            results = result_rows(case, timings, useful, ceiling)
            for row in results:
                print(*row.values(), sep="  ", file=sys.stderr, flush=True)
            rows += results
            torch._dynamo.reset()
    report(rows, args.device, ceiling, args.out)


if __name__ == "__main__":
    main()
