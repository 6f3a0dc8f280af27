"""What a call costs on tensors so small that nothing else counts: every public operator, forward and backward.

The floors: the bare kernel through its binding, torch.ops without the public function's checks, one aten operator.
"""

from __future__ import annotations

import torch
from common import Candidate, arguments, copy_bandwidth, report, result_rows, time_interleaved

import dimo_ext as dx

B, L, V = 2, 4, 5


def candidates(device: torch.device) -> dict[str, Candidate]:
    """Name → call."""
    key = dx.random_key(0, device=device)
    tokens = torch.zeros(B, L, dtype=torch.int64, device=device)
    teacher, auxiliary = torch.randn(2, B, L, V, device=device)
    student = torch.randn(B, L, V, device=device, requires_grad=True)
    plain = torch.nn.functional.cross_entropy

    def backward(loss: torch.Tensor) -> None:
        student.grad = None
        loss.backward()

    return {
        "aten add": lambda: tokens + 1,
        "torch.ops mask_tokens": lambda: torch.ops.dimo_ext.mask_tokens(tokens, key, 0.5, None, V, False, 1),
        "mask_tokens": lambda: dx.mask_tokens(tokens, 0.5, V, key=key),
        "init_tokens": lambda: dx.init_tokens(B, L, vocab_size=V, mask_id=V, r_init=0.5, key=key),
        "fold_in": lambda: dx.fold_in(key, 3),
        "sample_categorical": lambda: dx.sample_categorical(teacher, key=key),
        "perturb_embeddings": lambda: dx.perturb_embeddings(teacher, 0.3, key=key),
        "token_divergence": lambda: dx.token_divergence(teacher, auxiliary, "jeffreys:-0.2"),
        "distribution_matching_loss, backward": lambda: backward(
            dx.distribution_matching_loss(student, teacher, auxiliary, "jeffreys:-0.2")
        ),
        "masked_cross_entropy, backward": lambda: backward(dx.masked_cross_entropy(student, tokens)),
        "aten cross_entropy, backward": lambda: backward(plain(student.view(-1, V), tokens.view(-1))),
    }


def main() -> None:
    """Measure, print the table, write the CSV."""
    options = arguments(__doc__)
    timings = time_interleaved(candidates(options.device), options.device, seconds=options.seconds * 5, host=True)
    ceiling = copy_bandwidth(options.device)
    rows = result_rows({"op": "overhead", "batch": B, "length": L}, timings, 0, ceiling)
    report(rows, options.device, ceiling, options.out)


if __name__ == "__main__":
    main()
