"""Warnings of a collapse: what raises them, that healthy runs raise none, and that each is given once."""

import pytest

from dimo.collapse import CollapseWatch

WARMUP = 20
HEALTHY = {"token_entropy": 1.3, "gradient_norm": 70.0}


def watch(values, every: int = 10, warmup: int = WARMUP) -> list[str]:
    """The warnings of a run whose log holds these records, one every so many steps."""
    judge = CollapseWatch(warmup)
    return [text for i, record in enumerate(values) for text in judge.see((i + 1) * every, HEALTHY | record)]


def test_a_healthy_run_is_not_warned_of():
    """The course of the default recipe, with twice the fluctuation of its gradients."""
    entropies = [1.32, 1.07, 1.0, 0.97, 0.92, 0.85, 0.8, 0.77, 0.76]
    norms = [69.0, 67.0, 140.0, 40.0, 130.0, 60.0, 96.0, 59.0, 62.0]
    records = [{"token_entropy": e, "gradient_norm": g} for e, g in zip(entropies, norms, strict=True)]
    assert watch(records) == []
    assert watch([{"diversity": d} for d in (1.2, 0.99, 0.95)]) == []


@pytest.mark.parametrize(
    ("records", "seen"),
    [
        ([{}, {}, {"token_entropy": 0.5}], "step 30: token entropy 0.5 nats, 1.3 at the start"),
        ([{"token_entropy": 0.04}], "step 10: token entropy 0.04 nats"),
        ([{}, {"token_entropy": 1.5}, {"token_entropy": 1.7}], "step 30: token entropy 1.7 nats, 1.3 at the start"),
        ([{}, {"gradient_norm": 60.0}, {}, {"gradient_norm": 280.0}], "step 40: gradient norm 280, 70 in the median"),
        ([{}, {"diversity": 0.73}], "step 20: diversity of the preview 0.73"),
    ],
)
def test_each_sign_is_seen_once_and_says_what_to_try(records, seen):
    texts = watch(records + records[-1:] * 3)
    assert len(texts) == 1
    assert texts[0].startswith(seen)
    assert "; try " in texts[0]


def test_all_signs_of_one_record_are_given():
    texts = watch([{}, {"token_entropy": 0.1, "gradient_norm": 1e4, "diversity": 0.2}])
    assert {text.split()[2] for text in texts} == {"token", "gradient", "diversity"}


@pytest.mark.parametrize("every", [1, 2, 5])
def test_frequent_logs_are_judged_in_blocks_of_ten_steps(every):
    count = 10 // every
    calm, wild = [{}] * (4 * count), [{"gradient_norm": 1000.0}] * count
    assert [text.split(":")[0] for text in watch(calm + wild, every)] == ["step 50"]


def test_one_wild_step_is_no_collapse():
    records = [{}] * 100
    records[44] = {"gradient_norm": 1000.0, "token_entropy": 0.01}
    assert watch(records, every=1) == []


@pytest.mark.parametrize(("warmup", "warned"), [(20, 1), (60, 0)])
def test_gradients_may_grow_during_the_warm_up(warmup, warned):
    """A healthy run with a long warm-up quadruples its gradients in the second block."""
    growth = [{"gradient_norm": g} for g in (12.6, 47.8, 52.9, 45.4, 47.6, 48.2)]
    assert len(watch(growth, warmup=warmup)) == warned


def test_records_without_these_values_are_ignored():
    judge = CollapseWatch(WARMUP)
    assert [judge.see(step, {"loss": 1.0, "gradient_norm": 10.0**step}) for step in range(10, 60, 10)] == [[]] * 5
