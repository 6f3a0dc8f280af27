"""Forward masking: the native kernel against the reference, the usual eager expression and torch.compile of it.

Useful bytes a token: 8 read, 8 + 1 written. The usual expression ranks uniform draws by two sorts.
"""

from __future__ import annotations

import torch
from common import Candidate, arguments, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext

# batch, length: the digits, MaskGIT, a language model's batch, Meissonic, one long sample
SHAPES = [(256, 64), (64, 256), (16, 1024), (4, 4096), (1, 65536)]
MASK_ID = 1 << 20
BYTES_PER_TOKEN = 17


def eager(tokens: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """The k smallest of uniform draws by double argsort."""
    count = (ratio * tokens.shape[1]).round().clamp(min=1)
    mask = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1) < count[:, None]
    return torch.where(mask, MASK_ID, tokens), mask


def candidates(tokens: Tensor, ratio: Tensor, *, with_compile: bool) -> dict[str, Candidate]:
    """What is compared on one shape."""
    key = dimo_ext.random_key(0, device=tokens.device)

    def under(backend: str) -> Candidate:
        def call() -> object:
            with dimo_ext.use_backend(backend):
                return dimo_ext.mask_tokens(tokens, ratio, MASK_ID, key=key)

        return call

    served = dimo_ext.build_info()["operators"]["mask_tokens"][tokens.device.type]["backend"]
    calls = {"native": under("native")} if served == "native" else {}
    calls |= {"reference": under("reference"), "eager": lambda: eager(tokens, ratio)}
    if with_compile:
        compiled = torch.compile(eager, dynamic=False)
        calls["compile"] = lambda: compiled(tokens, ratio)
    return calls


def main() -> None:
    """Measure every shape, print the table, write the CSV."""
    options = arguments(__doc__)
    ceiling = copy_bandwidth(options.device)
    rows = []
    for batch, length in SHAPES:
        torch.compiler.reset()
        tokens = torch.randint(MASK_ID, (batch, length), device=options.device)
        ratio = torch.linspace(0.1, 0.9, batch, device=options.device)
        calls = candidates(tokens, ratio, with_compile=options.compile)
        timings = time_interleaved(calls, options.device, seconds=options.seconds)
        case = {"op": "mask_tokens", "batch": batch, "length": length}
        rows += result_rows(case, timings, BYTES_PER_TOKEN * batch * length, ceiling)
    report(rows, options.device, ceiling, options.out)


if __name__ == "__main__":
    main()
