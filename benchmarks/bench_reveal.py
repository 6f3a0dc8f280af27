"""Reveals of parallel decoding: the fused operators against a draw of every row and the usual PyTorch expressions.

60 % of the positions are masked; half of them are revealed, by chance or by the noisy confidence of MaskGIT.
Useful bytes: the logits of masked positions read once; the others need not be read.
"""

from __future__ import annotations

import torch
from common import Candidate, arguments, chosen, copy_bandwidth, report, result_rows, time_interleaved
from torch import Tensor

import dimo_ext

# length, vocabulary, batch: the digits, MaskGIT, Meissonic, a language model
CPU_CASES = [(64, 17, 256), (256, 1025, 16), (1024, 8193, 1), (64, 126464, 1)]
GPU_CASES = [(64, 17, 16384), (256, 1025, 64), (4096, 8193, 4), (4096, 126464, 1)]
MASKED, PROBABILITY, NOISE, MASK_ID = 0.6, 0.5, 2.0, -1


def eager_draw(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids by the exponential race, and their log-probabilities."""
    log_p = logits.float().log_softmax(-1)
    ids = (log_p.exp() / torch.empty_like(log_p).exponential_()).argmax(-1)
    return ids, log_p.gather(-1, ids[..., None])[..., 0]


def eager_ancestral(logits: Tensor, tokens: Tensor) -> Tensor:
    """Draw everywhere, show some."""
    ids, _ = eager_draw(logits)
    return torch.where((tokens == MASK_ID) & (torch.rand_like(tokens, dtype=torch.float32) < PROBABILITY), ids, tokens)


def eager_confident(logits: Tensor, tokens: Tensor, count: int) -> Tensor:
    """MaskGIT's step as its PyTorch ports write it."""
    ids, log_prob = eager_draw(logits)
    noise = -torch.log(-torch.log(torch.rand_like(log_prob).clamp(1e-20, 1 - 1e-7)))
    best = (log_prob + NOISE * noise).masked_fill(tokens != MASK_ID, -torch.inf).topk(count, -1).indices
    return tokens.scatter(-1, best, ids.gather(-1, best))


def candidates(logits: Tensor, tokens: Tensor, mode: str) -> dict[str, Candidate]:
    """What is compared on one case."""
    count, key = int(MASKED * PROBABILITY * tokens.shape[1]), dimo_ext.random_key(0, device=logits.device)
    served = dimo_ext.build_info()["operators"][f"reveal_{mode}"][logits.device.type]["backend"]
    calls: dict[str, Candidate] = {"a draw of every row": lambda: dimo_ext.sample_categorical(logits, key=key)}
    if mode == "ancestral":
        calls[served] = lambda: dimo_ext.reveal_ancestral(logits, tokens, PROBABILITY, MASK_ID, key=key)
        return calls | {"eager": lambda: eager_ancestral(logits, tokens)}
    calls[served] = lambda: dimo_ext.reveal_confident(logits, tokens, count, MASK_ID, noise_scale=NOISE, key=key)
    return calls | {"eager": lambda: eager_confident(logits, tokens, count)}


def main() -> None:
    """Time every case and mode, print the table, write the CSV."""
    args = arguments(__doc__)
    on_gpu = args.device.type == "cuda"
    ceiling, rows = copy_bandwidth(args.device), []
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for length, vocab, batch in chosen(GPU_CASES if on_gpu else CPU_CASES, args.vocab):
        generator = torch.Generator(args.device).manual_seed(0)
        logits = (2.0 * torch.randn(batch, length, vocab, generator=generator, device=args.device)).to(dtype)
        tokens = torch.randint(vocab, (batch, length), generator=generator, device=args.device)
        masked = torch.rand(batch, length, generator=generator, device=args.device) < MASKED
        tokens = tokens.masked_fill(masked, MASK_ID)
        for mode in ("ancestral", "confident"):
            timings = time_interleaved(candidates(logits, tokens, mode), args.device, seconds=args.seconds)
            case = {"batch": batch, "length": length, "vocab": vocab, "dtype": str(dtype)[6:], "mode": mode}
            rows += result_rows(case, timings, int(masked.sum()) * vocab * dtype.itemsize, ceiling)
    report(rows, args.device, ceiling, args.out)


if __name__ == "__main__":
    main()
