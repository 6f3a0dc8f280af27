"""Masked-token training: plain cross-entropy at the masked positions, and conditions dropped at the right rate."""

import math

import pytest
import torch
import torch.nn.functional as F

import dimo_ext
from dimo.config import PretrainConfig, RunConfig
from dimo.pretrain import held_out_loss, masked_token_loss, pretrain_loss
from dimo.schedules import mask_ratio
from dimo.teachers import MaskGITTeacher
from dimo_ext.random import random_uniform

BATCH, LENGTH, VOCAB, CLASSES = 8, 9, 5, 3
SIZES = {"grid_size": 3, "vocab_size": VOCAB, "num_classes": CLASSES, "width": 16, "depth": 1, "heads": 2,
         "mlp_width": 32, "dropout": 0.0}  # fmt: skip
KEY = dimo_ext.random_key(11)


@pytest.fixture
def model():
    torch.manual_seed(0)
    built = MaskGITTeacher.build(SIZES).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


class Recorder(MaskGITTeacher):
    """Predicts constant logits and notes the conditions and tokens that it is asked with."""

    def __init__(self, logits_V: torch.Tensor) -> None:
        super().__init__(MaskGITTeacher.build(SIZES).network)
        self.constant, self.conditions, self.training_flags = logits_V, [], []

    def logits(self, tokens_BL, condition, **_):
        self.conditions.append(condition)
        self.training_flags.append((self.training, torch.is_grad_enabled()))
        return self.constant.expand(*tokens_BL.shape, VOCAB)


def batch(size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (size, LENGTH), generator=draw), torch.randint(0, CLASSES, (size,), generator=draw)


def config(**changes) -> PretrainConfig:
    return PretrainConfig(run=RunConfig(output="unused"), **changes)


@pytest.mark.parametrize("schedule", ["arccos", "mage", "linear"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_is_plain_cross_entropy_at_the_masked_positions(schedule, label_smoothing, model):
    tokens, labels = batch()
    loss = masked_token_loss(model, tokens, labels, schedule, KEY, label_smoothing)
    ratio = mask_ratio(schedule, random_uniform(dimo_ext.fold_in(KEY, 0), BATCH))
    x_t, mask = dimo_ext.mask_tokens(tokens, ratio, VOCAB, key=dimo_ext.fold_in(KEY, 1))
    assert 0 < mask.sum() < mask.numel()
    logits = model.network(x_t, labels)
    expected = F.cross_entropy(logits[mask], tokens[mask], label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)


def test_pretrain_loss_without_dropped_conditions_is_the_masked_token_loss(model):
    tokens, labels = batch()
    settings = config(condition_dropout=0.0, mask_schedule="cosine", label_smoothing=0.1)
    expected = masked_token_loss(model, tokens, labels, "cosine", KEY, 0.1)
    assert pretrain_loss(model, tokens, labels, settings, KEY).item() == expected.item()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_share_of_dropped_conditions(share):
    """Binomial within 4 standard deviations; the other labels stay; another key drops others."""
    model, count = Recorder(torch.zeros(VOCAB)), 5000
    tokens, labels = batch(count)
    for seed in (0, 1):
        pretrain_loss(model, tokens, labels, config(condition_dropout=share), dimo_ext.random_key(seed))
    first, second = (condition == CLASSES for condition in model.conditions)
    assert abs(first.sum().item() - share * count) <= 4 * math.sqrt(count * share * (1 - share))
    assert torch.equal(model.conditions[0][~first], labels[~first])
    assert share == 0 or not torch.equal(first, second)


def test_dropped_conditions_are_independent_of_the_mask_ratio():
    """The two draws use different keys: else only lightly masked samples would be unconditional."""
    u = random_uniform(dimo_ext.fold_in(KEY, 0), 4000)
    dropped = random_uniform(dimo_ext.fold_in(KEY, 2), 4000) < 0.5
    model = Recorder(torch.zeros(VOCAB))
    tokens, labels = batch(4000)
    pretrain_loss(model, tokens, labels, config(condition_dropout=0.5), KEY)
    assert torch.equal(model.conditions[0] == CLASSES, dropped)
    assert abs(u[dropped].mean() - u[~dropped].mean()) < 4 * math.sqrt(2 / 12 / 2000)


def test_held_out_loss_of_a_uniform_prediction():
    model = Recorder(torch.zeros(VOCAB)).train()
    assert held_out_loss(model, *batch(), "arccos") == pytest.approx(math.log(VOCAB), rel=1e-6)
    assert model.training_flags == [(False, False)] * 4  # evaluation mode, no gradient, four repeats
    assert model.training


def test_held_out_loss_is_reproducible_and_a_mean_over_keys(model):
    tokens, labels = batch()
    keys = [dimo_ext.random_key(n) for n in range(3)]
    expected = sum(masked_token_loss(model, tokens, labels, "arccos", key).item() for key in keys) / 3
    assert held_out_loss(model, tokens, labels, "arccos", repeats=3) == pytest.approx(expected, rel=1e-6)
    assert held_out_loss(model, tokens, labels, "arccos") == held_out_loss(model, tokens, labels, "arccos")
