"""Mask schedules: closed forms, end points, the papers' distributions, the times of samplers."""

import math

import pytest
import torch

import dimo_ext
from dimo.networks.maskgit import MaskGITConfig, MaskTransformer
from dimo.samplers import sample_ancestral, sample_confident
from dimo.schedules import MASK_SCHEDULES, TRAINING_ONLY, mask_ratio, sampling_ratios
from dimo.teachers import MaskGITTeacher

CLOSED_FORMS = {
    "linear": lambda u: u,
    "square": lambda u: u * u,
    "cosine": lambda u: math.cos(math.pi * (1 - u) / 2),
    "arccos": lambda u: 2 * math.acos(1 - u) / math.pi,
}
FALLING = {  # as the papers write them, for u uniform in [0, 1]
    "cosine": lambda u: math.cos(math.pi * u / 2),
    "arccos": lambda u: math.acos(u) / (math.pi / 2),
}


def test_closed_forms_cover_every_sampling_schedule():
    assert {*CLOSED_FORMS, *TRAINING_ONLY} == set(MASK_SCHEDULES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name):
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = torch.tensor([CLOSED_FORMS[name](x) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mask_ratio(name, u), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(mask_ratio(name, u.float()), expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rises_from_0_to_1(name, dtype):
    r = mask_ratio(name, torch.linspace(0, 1, 1001, dtype=dtype))
    assert r.dtype == dtype
    assert r[0].item() == pytest.approx(0.0, abs=1e-7)
    assert r[-1].item() == 1.0
    assert (r.diff() > 0).all()
    assert ((r >= 0) & (r <= 1)).all()


@pytest.mark.parametrize("name", FALLING)
def test_same_distribution_as_the_papers_falling_form(name):
    """On the midpoints of a uniform grid both forms take the same set of values."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    falling = torch.tensor([FALLING[name](x) for x in u.tolist()], dtype=torch.float64)
    torch.testing.assert_close(mask_ratio(name, u).sort().values, falling.sort().values, rtol=0, atol=1e-12)


def test_mage_is_the_inverse_cdf_of_a_truncated_normal():
    stats = pytest.importorskip("scipy.stats")
    normal = stats.truncnorm((0.5 - 0.55) / 0.25, (1.0 - 0.55) / 0.25, loc=0.55, scale=0.25)
    u = torch.linspace(0, 1, 401, dtype=torch.float64)
    torch.testing.assert_close(mask_ratio("mage", u), torch.from_numpy(normal.ppf(u.numpy())), rtol=0, atol=1e-9)


def test_mage_stays_within_its_bounds_in_float32():
    r = mask_ratio("mage", torch.linspace(0, 1, 100_001))
    assert r[0].item() == pytest.approx(0.5, abs=1e-6)
    assert r[-1].item() == pytest.approx(1.0, abs=1e-6)
    assert (r >= 0.5 - 1e-6).all()
    assert (r <= 1.0).all()
    assert (r.diff() >= -1e-7).all()


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("steps", [1, 2, 7, 64])
def test_sampling_ratios(name, steps):
    ratios = sampling_ratios(name, steps)
    expected = [CLOSED_FORMS[name](1 - i / steps) for i in range(steps + 1)]
    assert ratios.dtype == torch.float64
    assert ratios.tolist() == pytest.approx(expected, abs=1e-12)
    assert ratios[0].item() == 1.0
    assert ratios[-1].item() == pytest.approx(0.0, abs=1e-12)
    assert (ratios.diff() < 0).all()


def test_unknown_schedule_lists_the_valid_ones():
    with pytest.raises(ValueError, match=r"mask_schedule: expected one of .*'cosin'") as caught:
        mask_ratio("cosin", torch.zeros(1))
    assert all(name in str(caught.value) for name in MASK_SCHEDULES)
    with pytest.raises(ValueError, match="expected one of"):
        sampling_ratios("cosin", 4)


def test_sampling_needs_a_step():
    with pytest.raises(ValueError, match=r"steps: expected an integer >= 1, got 0"):
        sampling_ratios("linear", 0)


@pytest.mark.parametrize("sampler", [sample_ancestral, sample_confident])
def test_samplers_refuse_mage(sampler):
    sizes = MaskGITConfig(grid_size=2, vocab_size=3, num_classes=2, width=4, depth=1, heads=1, mlp_width=4)
    model = MaskGITTeacher(MaskTransformer(sizes))
    with pytest.raises(ValueError, match="'mage' is for training only"):
        sampler(model, torch.tensor([0]), steps=2, mask_schedule="mage", key=dimo_ext.random_key(0))
