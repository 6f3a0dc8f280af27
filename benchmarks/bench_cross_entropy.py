"""Masked cross-entropy with its gradient: the native kernel against PyTorch's and peers.

Mean over the counted tokens, value and gradient in one call: one read and one write of every counted logit, and zeros
for the others. Peers are F.cross_entropy (whose ignore_index leaves the others out) and torch.compile of it, with
backward, and, where it is installed, Liger-Kernel's (which writes the gradient over its input, here a copy). Ceilings
are measured first: copy, and a plain pass with the same read and write.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Candidate, arguments, chosen, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext

IGNORED = -100
# rows, vocabulary, share of rows that count
CPU_CASES = [(16384, 1025, 1.0), (16384, 1025, 0.6), (262144, 18, 1.0), (4096, 4096, 1.0), (1024, 16384, 1.0),
             (256, 50258, 1.0), (128, 126464, 1.0), (64, 262144, 1.0)]  # fmt: skip
GPU_CASES = [
    *((1 << 24, 17, 1.0), (16384, 1025, 1.0), (16384, 1025, 0.6), (16384, 1032, 1.0)),
    *((16384, 8193, 1.0), (16384, 8193, 0.6), (8192, 16384, 1.0), (2048, 50258, 1.0)),
    *((4096, 126464, 1.0), (4096, 126464, 0.6), (1024, 151936, 1.0), (512, 262144, 1.0)),
]


def ours(logits: Tensor, targets: Tensor) -> Tensor:
    """The operator; ids outside the vocabulary are left out."""
    return dimo_ext.masked_cross_entropy(logits, targets)


def expression(logits: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, in the dtype of the logits."""
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def liger(logits: Tensor, targets: Tensor) -> Tensor:
    """Liger's, on a copy."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss(ignore_index=IGNORED)(logits.clone(), targets)


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient."""
    logits = logits.detach().requires_grad_()
    value = loss(logits, targets)
    return value, torch.autograd.grad(value, logits)[0]


def candidates(logits: Tensor, targets: Tensor, *, with_compile: bool) -> dict[str, Candidate]:
    """What is compared on one case."""
    device = logits.device
    served = dimo_ext.build_info()["operators"]["masked_cross_entropy"][device.type]["backend"]
    calls: dict[str, Candidate] = {served: lambda: with_gradient(ours, logits, targets)}
    calls["eager"] = lambda: with_gradient(expression, logits, targets)
    if with_compile:
        compiled = torch.compile(expression, dynamic=False)
        calls["torch.compile"] = lambda: with_gradient(compiled, logits, targets)
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        calls["liger"] = lambda: with_gradient(liger, logits, targets)
    target = torch.empty_like(logits)
    calls["1 read, 1 write"] = lambda: torch.mul(logits, 2.0, out=target)  # in memory that is there already
    return calls


def relative_error(logits: Tensor, targets: Tensor) -> float:
    """Relative L2 error of the gradient of 64 rows against float64."""
    _, actual = with_gradient(ours, logits[:64], targets[:64])
    _, exact = with_gradient(expression, logits[:64].double(), targets[:64])
    return ((actual.double() - exact).norm() / exact.norm()).item()


def main() -> None:
    """Time every case and dtype, print the table, write the CSV."""
    args = arguments(__doc__)
    on_gpu = args.device.type == "cuda"
    ceiling, rows = copy_bandwidth(args.device), []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for count, vocab, share in chosen(GPU_CASES if on_gpu else CPU_CASES, args.vocab):
            generator = torch.Generator(args.device).manual_seed(0)
            logits = torch.randn(count, vocab, generator=generator, device=args.device).to(dtype)
            targets = torch.randint(vocab, (count,), generator=generator, device=args.device)
            targets[torch.rand(count, generator=generator, device=args.device) >= share] = IGNORED
            calls = candidates(logits, targets, with_compile=args.compile and (on_gpu or dtype == torch.float32))
            timings = time_interleaved(calls, args.device, seconds=args.seconds)
            useful = int(count * vocab * dtype.itemsize * (1 + share))
            case = {"rows": count, "vocab": vocab, "dtype": str(dtype)[6:], "counted": share}
            case["gradient_error"] = f"{relative_error(logits, targets):.1e}"
            rows += result_rows(case, timings, useful, ceiling)
            torch._dynamo.reset()
    report(rows, args.device, ceiling, args.out)


if __name__ == "__main__":
    main()
