"""One Di[M]O step as a straightforward release writes it: the baseline of step_time.py.

Straight from the method's equations in eager PyTorch, with common habits: attention that materialises and returns its
weights, a head over every column that is sliced afterwards, a call for each half of the guidance, gradient bookkeeping
wherever nothing forbids it, a fresh student batch for the auxiliary, a loop over parameters for the moving average,
numbers logged with .item().
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dimo.config import DistillConfig
from dimo.phases import phase
from dimo.teachers import MaskGITTeacher

SMALL = 1e-20


class WeightedAttention(nn.Module):
    """The network's attention with explicit weights, which stay available after the call."""

    def __init__(self, mha: nn.Module) -> None:
        super().__init__()
        self.mha = mha
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention's output; keep its weights."""
        packed = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = packed.unflatten(-1, (3, self.mha.heads, -1)).permute(2, 0, 3, 1, 4)
        self.weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.mha.out_proj((self.weights @ v).transpose(1, 2).flatten(2))


def plain_network(teacher: MaskGITTeacher) -> nn.Module:
    """A copy of the network with explicit attention."""
    network = copy.deepcopy(teacher.network)
    for attention, _ in network.transformer.layers:
        attention.fn.mha = WeightedAttention(attention.fn.mha)
    return network


def jeffreys(teacher: Tensor, auxiliary: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Generalised Jeffrey divergence of each token and its gradient with respect to the auxiliary logits."""
    p, q = teacher.softmax(-1), auxiliary.softmax(-1)
    log_ratio = torch.log(p + SMALL) - torch.log(q + SMALL)
    forward, reverse = (p * log_ratio).sum(-1), (q * -log_ratio).sum(-1)
    gradient_forward = q - p
    gradient_reverse = q * (-log_ratio - reverse[..., None])
    value = (1 - beta) * forward + beta * reverse
    return value, (1 - beta) * gradient_forward + beta * gradient_reverse


def matching_loss(
    student: Tensor, cond: Tensor, uncond: Tensor, auxiliary: Tensor, mask: Tensor, scale: float, beta: float
) -> tuple[Tensor, Tensor]:
    """A squared distance whose gradient is the divergence's, and the divergence."""
    student, cond, uncond, auxiliary = (z.float() for z in (student, cond, uncond, auxiliary))
    guided = uncond + scale * (cond - uncond)
    value, gradient = jeffreys(guided, auxiliary, beta)
    target = (student - gradient).detach()
    distance = 0.5 * F.mse_loss(student, target, reduction="none").sum(-1)
    return (distance * mask).sum() / len(student), (value * mask).sum() / len(student)


def fit_loss(logits: Tensor, tokens: Tensor, mask: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy at the masked positions."""
    targets = torch.where(mask, tokens, -100)
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), label_smoothing=label_smoothing)


class PlainTrainer:
    """Student, auxiliary, moving average and their optimisers."""

    def __init__(self, teacher: MaskGITTeacher, config: DistillConfig, *, compiled: bool) -> None:
        self.config, self.method = config, config.method
        self.model = teacher
        self.teacher = plain_network(teacher).requires_grad_(False)
        self.student, self.auxiliary, self.ema = (plain_network(teacher) for _ in range(3))
        for network in (self.student, self.auxiliary):
            network.requires_grad_(True)
        self.optimizers = {
            name: torch.optim.AdamW(
                getattr(self, name).parameters(), lr=o.learning_rate, betas=o.betas, weight_decay=o.weight_decay
            )
            for name, o in (("student", config.student), ("auxiliary", config.auxiliary))
        }
        self.matching_loss: Callable[..., tuple[Tensor, Tensor]] = matching_loss
        self.fit_loss: Callable[..., Tensor] = fit_loss
        if compiled:
            for network in (self.teacher, self.student, self.auxiliary):
                for layer in network.transformer.layers:
                    layer.compile(dynamic=False)
            self.matching_loss, self.fit_loss = torch.compile(matching_loss), torch.compile(fit_loss)

    def logits(self, network: nn.Module, tokens: Tensor, labels: Tensor, **options) -> tuple[Tensor, list[Tensor]]:
        """Logits of the real ids, sliced from the whole head, and the attention weights."""
        half = self.config.run.precision == "bfloat16"
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=half):
            out = network(tokens, labels, columns=network.tok_emb.num_embeddings, **options)
        return out[..., : self.model.vocab_size], [
            attention.fn.mha.weights for attention, _ in network.transformer.layers
        ]

    def draw(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Student logits at x_init, and the tokens drawn from them."""
        shape = (len(labels), self.model.seq_len)
        tokens = torch.randint(self.model.vocab_size, shape, device=labels.device)
        tokens, _ = self.mask(tokens, torch.full((len(labels),), self.method.r_init, device=labels.device))
        with phase("student forward"):
            logits, _ = self.logits(self.student, tokens, labels, embed=self.embed)
        with phase("draws"):
            probabilities = (logits.float() / self.method.student_temperature).softmax(-1)
            drawn = torch.multinomial(probabilities.flatten(0, 1), 1).view(shape)
        return logits, drawn

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """Token embeddings with noise."""
        embeddings, sigma = F.embedding(tokens, table), self.method.embedding_noise
        return math.sqrt(1 - sigma**2) * embeddings + sigma * torch.randn_like(embeddings)

    def mask(self, tokens: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Mask this share of the tokens, at least one."""
        order = torch.rand(tokens.shape, device=tokens.device).argsort(1).argsort(1)
        mask = order < (ratio * tokens.shape[1]).round().clamp(min=1)[:, None]
        return torch.where(mask, self.model.mask_id, tokens), mask

    def labels(self) -> Tensor:
        """Random classes."""
        return torch.randint(self.model.num_classes, (self.config.run.batch_size,), device=self.model.device)

    def ratio(self, count: int) -> Tensor:
        """Mask ratios of the arccos schedule."""
        return 2 / math.pi * torch.acos(1 - torch.rand(count, device=self.model.device))

    def step(self, _: int) -> dict[str, float]:
        """One student and one auxiliary update."""
        labels = self.labels()
        student_logits, tokens = self.draw(labels)
        with phase("masking"):
            masked, mask = self.mask(tokens, self.ratio(len(labels)))
        with phase("teacher"), torch.no_grad():
            cond, _ = self.logits(self.teacher, masked, labels)
            uncond, _ = self.logits(self.teacher, masked, torch.full_like(labels, self.model.num_classes))
        with phase("auxiliary forward"):
            estimate, _ = self.logits(self.auxiliary, masked, labels)
        with phase("loss"):
            beta = 0.0 if self.method.divergence == "forward_kl" else float(self.method.divergence.split(":")[1])
            loss, divergence = self.matching_loss(
                student_logits, cond, uncond, estimate.detach(), mask, self.method.guidance_scale, beta
            )
        norm = self.update("student", loss)
        with phase("average"):
            self.average()
        fit = self.update_auxiliary()
        return {"loss": loss.item(), "divergence": divergence.item(), "norm": norm.item(), "fit": fit.item()}

    def update_auxiliary(self) -> Tensor:
        """On a batch of its own."""
        labels = self.labels()
        with torch.no_grad():
            _, tokens = self.draw(labels)
        with phase("masking"):
            masked, mask = self.mask(tokens, self.ratio(len(labels)))
        with phase("auxiliary forward"):
            logits, _ = self.logits(self.auxiliary, masked, labels)
        with phase("loss"):
            loss = self.fit_loss(logits, tokens, mask, self.method.label_smoothing)
        self.update("auxiliary", loss)
        return loss

    def update(self, name: str, loss: Tensor) -> Tensor:
        """Backward, clipping, step of the network of that name."""
        optimizer, network = self.optimizers[name], getattr(self, name)
        with phase(f"{name} backward"):
            optimizer.zero_grad()
            loss.backward()
        with phase(f"{name} optimiser"):
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
        return norm

    @torch.no_grad()
    def average(self) -> None:
        """Move the average, parameter by parameter."""
        decay = self.config.run.ema_decay
        for ours, theirs in zip(self.ema.parameters(), self.student.parameters(), strict=True):
            ours.copy_(decay * ours + (1 - decay) * theirs)
