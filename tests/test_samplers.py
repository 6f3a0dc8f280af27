"""Samplers: what they reveal and when, that they reproduce known distributions, and per-sample keys."""

import math
import random

import numpy as np
import pytest
import scipy.stats
import torch

import dimo_ext
from dimo.config import MethodConfig, SamplingConfig
from dimo.generator import labels_per_class, sample_keys
from dimo.samplers import ancestral_states, sample_ancestral, sample_confident, sample_few_steps, sample_one_step
from dimo.schedules import sampling_ratios
from dimo.teachers import DigitsTeacher, MaskGITTeacher

LENGTH, VOCAB, CLASSES = 64, 17, 10
STEPS = [1, 2, 3, 7, 64, 100]
SAMPLERS = {"ancestral": sample_ancestral, "confident": sample_confident}
KEY = dimo_ext.random_key(3)


class TableModel(MaskGITTeacher):
    """Tokens independent of each other: logits from a table ``[C + 1, L, V]`` by class; notes its inputs."""

    def __init__(self, table: torch.Tensor) -> None:
        classes, length, vocab = table.shape
        sizes = {"grid_size": math.isqrt(length), "vocab_size": vocab, "num_classes": classes - 1, "width": 2,
                 "depth": 1, "heads": 1, "mlp_width": 2}  # fmt: skip
        super().__init__(MaskGITTeacher.build(sizes).network)
        self.table, self.inputs, self.ratios = table, [], []

    def logits(self, tokens_BL, condition, *, mask_ratio=None, **_):
        self.inputs.append(tokens_BL.clone())
        self.ratios.append(mask_ratio)
        return self.table[condition]


def random_table(classes: int = CLASSES, length: int = LENGTH, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(classes + 1, length, vocab, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    """A digits teacher of width 16 with random weights."""
    torch.manual_seed(0)
    model = DigitsTeacher.build({"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.0})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# --- what is revealed when ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["arccos", "square"])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_token_is_revealed_once_and_never_changes(sampler, steps, schedule):
    """L reveals in all, no [MASK] left, ids of the vocabulary; one evaluation a step, at most L if confident."""
    model = TableModel(random_table())
    labels = labels_per_class(CLASSES, 2)
    tokens = SAMPLERS[sampler](model, labels, steps=steps, mask_schedule=schedule, key=KEY)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (20, LENGTH)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    assert len(model.inputs) == steps or (sampler == "confident" and len(model.inputs) <= min(steps, LENGTH))
    assert (model.inputs[0] == VOCAB).all()
    for before, after in zip(model.inputs, [*model.inputs[1:], tokens], strict=True):
        visible = before != VOCAB
        assert torch.equal(before[visible], after[visible])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_model_is_told_the_mask_ratio(sampler):
    model = TableModel(random_table())
    SAMPLERS[sampler](model, torch.arange(3), steps=5, mask_schedule="cosine", key=KEY)
    expected = sampling_ratios("cosine", 5)[:-1, None].expand(5, 3).float()
    torch.testing.assert_close(torch.stack(model.ratios), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_takes_one_call_of_twice_the_rows(sampler):
    model = TableModel(random_table())
    SAMPLERS[sampler](model, torch.arange(3), steps=4, guidance_scale=2.0, key=KEY)
    assert [len(rows) for rows in model.inputs] == [6] * 4


@pytest.mark.parametrize("schedule", ["linear", "arccos"])
def test_ancestral_reveals_are_binomial(schedule):
    """A masked token is revealed with probability (r_t - r_s)/r_t, in every step; |z| below 4.5 in each."""
    steps, samples = 8, 500
    model = TableModel(random_table())
    tokens = sample_ancestral(
        model, torch.zeros(samples, dtype=torch.int64), steps=steps, mask_schedule=schedule, key=KEY
    )
    masked = torch.stack([(rows == VOCAB).sum() for rows in [*model.inputs, tokens]]).double()
    ratios = sampling_ratios(schedule, steps)
    for step in range(steps - 1):
        p = ((ratios[step] - ratios[step + 1]) / ratios[step]).item()
        revealed, trials = (masked[step] - masked[step + 1]).item(), masked[step].item()
        assert abs(revealed - p * trials) < 4.5 * math.sqrt(trials * p * (1 - p)), f"step {step}"
    assert masked[0] == samples * LENGTH
    assert masked[-1] == 0


def test_ancestral_states_start_masked_and_end_in_the_samples():
    model, labels = TableModel(random_table()), torch.arange(10)
    states = list(ancestral_states(model, labels, steps=6, guidance_scale=1.5, key=KEY))
    assert len(states) == 7
    assert (states[0] == VOCAB).all()
    assert all(torch.equal(state, seen[:10]) for state, seen in zip(states, model.inputs, strict=False))
    assert torch.equal(states[-1], sample_ancestral(model, labels, steps=6, guidance_scale=1.5, key=KEY))
    assert not any(state.requires_grad for state in states)


def test_ancestral_counts_vary_between_samples():
    """The number revealed is random, not fixed as in the confident sampler."""
    model = TableModel(random_table())
    sample_ancestral(model, torch.zeros(200, dtype=torch.int64), steps=2, mask_schedule="linear", key=KEY)
    counts = (model.inputs[1] == VOCAB).sum(1).double()
    assert counts.var().item() == pytest.approx(LENGTH / 4, rel=0.4)  # Binomial(64, 1/2)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("schedule", ["linear", "arccos", "square"])
def test_confident_reveals_exact_counts(schedule, steps):
    """round(r·L) stay masked after a step, and always at least one fewer than before."""
    model = TableModel(random_table())
    sample_confident(model, torch.arange(4), steps=steps, mask_schedule=schedule, key=KEY)
    expected, ratios = [LENGTH], sampling_ratios(schedule, steps).tolist()
    for ratio in ratios[1:-1]:
        expected.append(min(round(ratio * LENGTH), expected[-1] - 1))
    expected = [left for left in expected if left > 0]
    assert [(rows == VOCAB).sum(1).tolist() for rows in model.inputs] == [[left] * 4 for left in expected]


def test_confident_reveals_the_most_confident_first():
    """Position p is uniform over p + 1 ids, so that its confidence is -log(p + 1) whatever is drawn."""
    length = vocab = 16
    table = torch.full((2, length, vocab), -math.inf)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    for rank, position in enumerate(order.tolist()):
        table[:, position, : rank + 1] = 0.0
    model = TableModel(table)
    sample_confident(
        model, torch.zeros(5, dtype=torch.int64), steps=4, mask_schedule="linear", choice_temperature=0.0, key=KEY
    )
    for step, rows in enumerate(model.inputs):
        visible = torch.zeros(length, dtype=torch.bool)
        visible[order[: 4 * step]] = True
        assert torch.equal(rows != vocab, visible.expand(5, -1))


def test_choice_noise_changes_the_order_and_fades():
    """At a huge choice temperature the first reveals are random; it is annealed to 0 in the last step."""
    length = vocab = 16
    table = torch.full((2, length, vocab), -math.inf)
    for position in range(length):
        table[:, position, : position + 1] = 0.0
    model = TableModel(table)
    labels = torch.zeros(400, dtype=torch.int64)
    sample_confident(model, labels, steps=2, mask_schedule="linear", choice_temperature=1e6, key=KEY)
    shown = (model.inputs[1] != vocab).double().mean(0)
    assert (shown - 0.5).abs().max() < 4.5 * 0.5 / 20  # each position in half of the 400 samples


# --- few steps of a student -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "arccos"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_mask_the_schedules_share_again_and_keep_the_rest(steps, schedule):
    model, labels = TableModel(random_table()), labels_per_class(CLASSES, 2)
    tokens = sample_few_steps(model, labels, MethodConfig(), steps=steps, mask_schedule=schedule, key=KEY)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    ratios = sampling_ratios(schedule, steps)
    assert len(model.inputs) == steps
    for step in range(1, steps):
        assert ((model.inputs[step] == VOCAB).sum(-1) == round(ratios[step].item() * LENGTH)).all()
        assert (model.ratios[step] == ratios[step].float()).all()
    if steps > 1:
        kept = model.inputs[-1] != VOCAB
        assert torch.equal(tokens[kept], model.inputs[-1][kept])


def test_few_steps_start_from_the_one_step_sample(network):
    """One step is that sample; in two, the tokens left unmasked are its own, and others are drawn again."""
    labels, sampling = labels_per_class(10, 2), SamplingConfig()
    first = sample_one_step(network, labels, sampling, key=KEY)
    assert torch.equal(sample_few_steps(network, labels, sampling, steps=1, key=KEY), first)
    second = sample_few_steps(network, labels, sampling, steps=2, mask_schedule="linear", key=KEY)
    changed = (second != first).sum(-1)
    assert (changed <= LENGTH // 2).all()
    assert changed.sum() > 100


def test_few_steps_reproduce_independent_tokens():
    model = TableModel(0.7 * random_table(classes=2, length=4, vocab=5))
    sampling = SamplingConfig(student_temperature=1.5)
    tokens = sample_few_steps(model, torch.ones(6000, dtype=torch.int64), sampling, steps=3, key=KEY)
    assert_independent(tokens, (model.table[1] / 1.5).softmax(-1))


# --- distributions --------------------------------------------------------------------------------------------------


def assert_independent(tokens: torch.Tensor, probabilities_LV: torch.Tensor) -> None:
    """χ² of every position and of every pair of neighbours, false alarm 1e-5 in all."""
    tokens, p = tokens.numpy(), probabilities_LV.double().numpy()
    length, vocab = p.shape
    observed, expected, degrees = [], [], 0
    for i in range(length):
        observed.append(np.bincount(tokens[:, i], minlength=vocab))
        expected.append(p[i])
    for i in range(length - 1):
        observed.append(np.bincount(tokens[:, i] * vocab + tokens[:, i + 1], minlength=vocab**2))
        expected.append(np.outer(p[i], p[i + 1]).ravel())
    for counts, share in zip(observed, expected, strict=True):
        assert (counts[share == 0] == 0).all()
        possible = share > 0
        degrees = possible.sum() - 1
        statistic = (np.square(counts - len(tokens) * share)[possible] / (len(tokens) * share[possible])).sum()
        assert scipy.stats.chi2.sf(statistic, degrees) > 1e-5 / len(observed)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("guidance_scale", "temperature"), [(1.0, 1.0), (2.0, 1.0), (1.0, 0.5), (1.5, 2.0)])
def test_ancestral_reproduces_independent_tokens(steps, guidance_scale, temperature):
    model = TableModel(0.7 * random_table(classes=2, length=4, vocab=5))
    labels = torch.ones(6000, dtype=torch.int64)
    tokens = sample_ancestral(
        model, labels, steps=steps, guidance_scale=guidance_scale, temperature=temperature, key=KEY
    )
    cond, uncond = model.table[1], model.table[2]  # the last row is the null class
    assert_independent(tokens, ((uncond + guidance_scale * (cond - uncond)) / temperature).softmax(-1))


def test_confident_reproduces_independent_tokens_in_one_step():
    model = TableModel(0.7 * random_table(classes=2, length=4, vocab=5))
    tokens = sample_confident(model, torch.zeros(6000, dtype=torch.int64), steps=1, temperature=0.8, key=KEY)
    assert_independent(tokens, (model.table[0] / 0.8).softmax(-1))


def test_confident_reproduces_equally_likely_tokens_in_many_steps():
    """Where all possible ids are equally likely, choosing by confidence does not prefer any of them."""
    table = torch.zeros(2, 4, 5)
    table[:, 1, 3:] = table[:, 2, 0] = -math.inf
    tokens = sample_confident(TableModel(table), torch.zeros(6000, dtype=torch.int64), steps=3, key=KEY)
    assert_independent(tokens, table[0].softmax(-1))


def test_one_step_reproduces_independent_tokens():
    model = TableModel(0.7 * random_table(classes=2, length=4, vocab=5))
    method = MethodConfig(student_temperature=1.5)
    tokens = sample_one_step(model, torch.ones(6000, dtype=torch.int64), method, key=KEY)
    assert_independent(tokens, (model.table[1] / 1.5).softmax(-1))
    assert len(model.inputs) == 1


def test_temperature_0_takes_the_most_probable_token():
    model, labels = TableModel(random_table()), torch.tensor([4])
    expected = model.table[4].argmax(-1)
    assert torch.equal(sample_ancestral(model, labels, steps=3, temperature=0.0, key=KEY)[0], expected)
    assert torch.equal(sample_one_step(model, labels, SamplingConfig(student_temperature=0.0), key=KEY)[0], expected)


def test_confident_refuses_temperature_0():
    """Greedy draws have log-probability 0 everywhere: nothing to choose by."""
    with pytest.raises(ValueError, match="temperature: expected a number > 0"):
        sample_confident(TableModel(random_table()), torch.tensor([4]), steps=3, temperature=0.0, key=KEY)


# --- keys -----------------------------------------------------------------------------------------------------------

DRAWS = {
    "one_step": lambda model, labels, key: sample_one_step(model, labels, MethodConfig(), key=key),
    "few_steps": lambda model, labels, key: sample_few_steps(model, labels, MethodConfig(), steps=3, key=key),
    "ancestral": lambda model, labels, key: sample_ancestral(model, labels, steps=5, guidance_scale=1.5, key=key),
    "confident": lambda model, labels, key: sample_confident(model, labels, steps=5, key=key),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_a_sample_with_its_own_key_does_not_depend_on_the_batch(draw, network):
    labels, keys = labels_per_class(10, 2), sample_keys(7, 20)
    whole = DRAWS[draw](network, labels, keys)
    parts = [DRAWS[draw](network, labels[rows], keys[rows]) for rows in (slice(0, 1), slice(1, 8), slice(8, 20))]
    assert torch.equal(whole, torch.cat(parts))
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[shuffled], DRAWS[draw](network, labels[shuffled], keys[shuffled]))


@pytest.mark.parametrize("draw", DRAWS)
def test_samples_with_their_own_keys_differ(draw, network):
    tokens = DRAWS[draw](network, torch.zeros(20, dtype=torch.int64), sample_keys(7, 20))
    assert len({tuple(row) for row in tokens.tolist()}) == 20


@pytest.mark.parametrize("draw", DRAWS)
def test_draws_are_a_function_of_the_key(draw, network):
    labels = torch.arange(10)
    tokens = DRAWS[draw](network, labels, dimo_ext.random_key(1))
    assert torch.equal(tokens, DRAWS[draw](network, labels, dimo_ext.random_key(1)))
    assert not torch.equal(tokens, DRAWS[draw](network, labels, dimo_ext.random_key(2)))
    assert not tokens.requires_grad


@pytest.mark.parametrize("draw", DRAWS)
def test_global_random_state_is_neither_read_nor_changed(draw, network):
    torch.manual_seed(1)
    first = DRAWS[draw](network, torch.arange(10), KEY)
    torch.manual_seed(2)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    second = DRAWS[draw](network, torch.arange(10), KEY)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002


def test_sample_keys_are_prefixes():
    """Asking for more samples leaves the first ones as they were; another seed changes all."""
    keys = sample_keys(3, 10)
    assert torch.equal(sample_keys(3, 4), keys[:4])
    assert len({tuple(k) for k in torch.cat([keys, sample_keys(4, 10)]).tolist()}) == 20


def test_labels_per_class():
    assert labels_per_class(3, 2).tolist() == [0, 0, 1, 1, 2, 2]
