"""What changes the weights: AdamW with its schedule and clipping, and the moving average."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from .config import OptimizerConfig


class Updater:
    """One network's optimiser: AdamW, warm-up and decay, clipping; ``updates_per_step`` times a training step."""

    def __init__(
        self, parameters: list[Tensor], config: OptimizerConfig, steps: int, updates_per_step: int = 1
    ) -> None:
        self.config, self.total_updates = config, steps * updates_per_step
        self.parameters = [p for p in parameters if p.requires_grad]
        device = self.parameters[0].device
        self.rates = [torch.zeros((), device=device) for _ in range(updates_per_step)]
        self.optimizer = torch.optim.AdamW(
            self.parameters, self.rates[0], config.betas, config.eps, config.weight_decay,
            fused=True, capturable=device.type == "cuda",
        )  # fmt: skip

    def schedule(self, step: int) -> None:
        """Set the learning rates of 0-based training step ``step``."""
        for k, rate in enumerate(self.rates):
            rate.fill_(self.learning_rate(step * len(self.rates) + k))

    def learning_rate(self, update: int) -> float:
        """Return the rate of 0-based ``update``: linear warm-up, then constant or cosine to ``final_fraction``."""
        config = self.config
        factor = min(1.0, (update + 1) / max(config.warmup_steps, 1))
        if config.decay == "cosine":
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, update / self.total_updates)))
            factor *= config.final_fraction + (1.0 - config.final_fraction) * cosine
        return config.learning_rate * factor

    def update(self, k: int = 0) -> Tensor:
        """The ``k``-th update of a step; drops the gradients, returns their norm before clipping, on the device."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[k]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


class Ema:
    """Exponential moving average of a model's parameters, decay min(d, (1+n)/(10+n)) at step n."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, source: nn.Module, step: int) -> None:
        """Move the average towards ``source`` after 0-based ``step``."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(source.parameters()), 1.0 - decay)
