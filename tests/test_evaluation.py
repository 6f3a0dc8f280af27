"""The digits evaluator as a measurement of samples whose quality is known."""

import json

import numpy as np
import pytest
import torch

from dimo.data.digits import load_digits_split
from dimo.evaluation import METRICS, DigitsEvaluator, recipe_text, recipes

pytest.importorskip("sklearn")

CHEAP = ["class_accuracy", "frechet_feature", "frechet_pixel", "diversity"]


@pytest.fixture(scope="module")
def evaluator():
    return DigitsEvaluator()


@pytest.fixture(scope="module")
def floor(evaluator):
    return evaluator.floor("test")


def independent_pixels(seed=0):
    """For each class every pixel drawn on its own from the training images: what no one-step factorised model beats."""
    train = load_digits_split("train")
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.empty_like(train.tokens)
    for c in range(10):
        pool = train.tokens[train.labels == c]
        tokens[train.labels == c] = pool.gather(0, torch.randint(len(pool), pool.shape, generator=generator))
    return tokens, train.labels


def test_floor_is_what_real_images_score(floor):
    assert list(floor) == list(METRICS)
    assert floor["class_accuracy"] > 0.97
    assert floor["frechet_feature"] < 0.15
    assert floor["frechet_pixel"] == pytest.approx(0.068, abs=0.005)
    assert floor["precision"] > 0.94
    assert floor["recall"] > 0.94
    assert floor["coverage"] > 0.95
    assert floor["density"] == pytest.approx(1, abs=0.1)
    assert floor["diversity"] == pytest.approx(1)
    assert floor["two_sample_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert floor["marginal_entropy"] == 1
    assert floor["near_copies"] == pytest.approx(0.01, abs=0.002)  # by definition, of 359 images
    assert floor["teacher_nll"] == pytest.approx(1.25, abs=0.05)  # nats a token; uniform draws have log 17 = 2.83


def test_real_images_score_near_the_floor(evaluator):
    """Test images in the place of samples, against validation: as far from it as their own smaller count makes them."""
    test = load_digits_split("test")
    value, floor = evaluator(test.tokens, test.labels, "validation"), evaluator.floor("validation")
    assert value["class_accuracy"] == pytest.approx(floor["class_accuracy"], abs=0.02)
    assert value["frechet_pixel"] < floor["frechet_pixel"] + 0.08
    assert value["nearest_train"] == pytest.approx(floor["nearest_train"], rel=0.1)
    assert value["two_sample_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert value["diversity"] == pytest.approx(1, abs=0.05)
    assert value["teacher_nll"] == pytest.approx(floor["teacher_nll"], abs=0.05)
    assert value["near_copies"] < 0.05
    assert min(value["precision"], value["recall"], value["coverage"]) > 0.9


def test_independent_pixels_score_worse(evaluator, floor):
    value = evaluator(*independent_pixels(), "test")
    assert value["class_accuracy"] > 0.93  # blind to it, as documented
    assert value["frechet_pixel"] == pytest.approx(0.24, abs=0.04)
    assert value["frechet_feature"] > 2 * floor["frechet_feature"]
    assert value["two_sample_accuracy"] > 0.9
    assert value["recall"] == pytest.approx(0.67, abs=0.08)
    assert value["coverage"] == pytest.approx(0.7, abs=0.08)
    assert value["precision"] < floor["precision"] - 0.05
    assert value["nearest_train"] > 1.3 * floor["nearest_train"]
    # blind to it, as documented; a little below 1, as these are draws from the frequencies of 126 images a class
    assert value["marginal_entropy"] == pytest.approx(0.975, abs=0.015)
    assert value["teacher_nll"] > floor["teacher_nll"] + 0.3
    assert value["near_copies"] == 0


def test_noise_scores_far_worse(evaluator):
    tokens, labels = independent_pixels()
    order = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    value = evaluator(tokens.gather(1, order), labels, "test")
    assert value["class_accuracy"] < 0.3
    assert value["frechet_pixel"] > 1
    assert value["frechet_feature"] > 2
    assert value["recall"] < 0.2
    assert value["coverage"] < 0.2
    assert value["two_sample_accuracy"] > 0.99
    assert value["teacher_nll"] > 3


def test_copies_of_training_images_are_exposed(evaluator):
    train = load_digits_split("train")
    value = evaluator(train.tokens, train.labels, "test")
    assert value["nearest_train"] == 0
    assert value["near_copies"] == 1
    assert value["two_sample_accuracy"] < 0.4


def test_lost_modes_are_seen(evaluator, floor):
    """One image of each class, repeated: perfect precision, no variety."""
    train = load_digits_split("train")
    first = [int((train.labels == c).nonzero()[0]) for c in train.labels]
    value = evaluator(train.tokens[first], train.labels, "test")
    assert value["diversity"] == 0
    assert value["marginal_entropy"] == 0
    assert value["recall"] == 0
    assert value["coverage"] < 0.3
    assert value["frechet_pixel"] > 5 * floor["frechet_pixel"]


def test_cheap_subset_equals_the_full_values(evaluator):
    tokens, labels = independent_pixels()
    cheap = evaluator(tokens, labels, "test", full=False)
    full = evaluator(tokens, labels, "test")
    assert list(cheap) == CHEAP
    assert list(full) == list(METRICS)
    assert cheap == {key: full[key] for key in CHEAP}
    assert list(evaluator.floor("test", full=False)) == CHEAP


def numpy_state():
    """The position of numpy's global generator, which scikit-learn draws from by default."""
    _, words, position, *_ = np.random.get_state()  # noqa: NPY002
    return words.tolist(), position


def test_deterministic_by_seed_and_global_random_state_untouched(evaluator):
    tokens, labels = independent_pixels()
    before = torch.get_rng_state(), numpy_state()
    with torch.no_grad():  # as inside a training loop's evaluation
        value = DigitsEvaluator(seed=0)(tokens, labels)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert numpy_state() == before[1]
    assert value == evaluator(tokens, labels)


def test_seed_changes_the_feature_network_alone(evaluator):
    tokens, labels = independent_pixels()
    value, other = (e(tokens, labels, full=False) for e in (evaluator, DigitsEvaluator(seed=1)))
    assert value.pop("frechet_feature") != other.pop("frechet_feature")
    assert value == other


def test_sample_labels_are_a_copy_of_the_training_labels(evaluator):
    labels = load_digits_split("train").labels
    evaluator.sample_labels().zero_()
    assert torch.equal(evaluator.sample_labels(), labels)


def test_evaluator_errors(evaluator):
    tokens, labels = independent_pixels()
    with pytest.raises(ValueError, match="unknown reference 'train'; the references are validation, test"):
        evaluator(tokens, labels, "train")
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.16, not 17\.\.17"):
        evaluator(torch.full_like(tokens, 17), labels)
    with pytest.raises(ValueError, match="tokens must be integers"):
        evaluator(tokens.float(), labels)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \[1258\]"):
        evaluator(tokens, labels[:-1])
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.9"):
        evaluator(tokens, labels + 1)
    with pytest.raises(ValueError, match="at least 6 samples"):
        evaluator(tokens[:5], labels[:5])
    with pytest.raises(ValueError, match="some class at least twice"):
        evaluator(tokens[:3], torch.arange(3), full=False)


def test_every_metric_has_a_recipe(evaluator):
    assert list(recipes()) == list(METRICS)
    assert all(len(recipe) > 40 for recipe in recipes().values())
    lines = recipe_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [metric.title for metric in METRICS.values()]


def test_description_says_what_the_numbers_depend_on(evaluator):
    value = json.loads(json.dumps(evaluator.describe("test")))
    assert value["seed"] == 0
    assert value["train"] == {"count": 1258, "sha256": load_digits_split("train").checksum()}
    assert value["reference"] == {"count": 359, "sha256": load_digits_split("test").checksum()}
    assert value["versions"]["torch"] == torch.__version__
    assert value["versions"]["numpy"] == np.__version__
    assert {"scikit-learn", "scipy"} <= set(value["versions"])
    assert evaluator.describe("validation")["reference"]["count"] == 180
