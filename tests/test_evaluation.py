"""Metrics: against closed forms and brute force, then as measurements of samples whose quality is known."""

import sys

import numpy as np
import pytest
import torch

from dimo import evaluation
from dimo.data.digits import load_digits_split
from dimo.evaluation import METRICS, DigitsEvaluator, frechet_distance, precision_recall_density_coverage

pytest.importorskip("sklearn")

CHEAP = ["class_accuracy", "frechet_feature", "frechet_pixel", "diversity"]


def whitened(rng, rows, width):
    """Normal draws with sample mean exactly 0 and sample covariance exactly 1."""
    x = rng.standard_normal((rows, width))
    x -= x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x.T))).T


# --- Fréchet distance ------------------------------------------------------------------------------------------------


def test_frechet_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mean_a, mean_b, std_a, std_b = rng.uniform(0.5, 2.0, (4, 6))
    a, b = whitened(rng, 50, 6) * std_a + mean_a, whitened(rng, 80, 6) * std_b + mean_b
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_full_covariances_matches_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((60, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((90, 8)) + 1
    ca, cb = np.cov(a.T), np.cov(b.T)
    root = linalg.sqrtm(ca @ cb).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_invariances():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((40, 5)), rng.standard_normal((30, 5)) * 2 + 1
    rotation = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    value = frechet_distance(a, b)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(b, a) == pytest.approx(value)
    assert frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(value)
    assert frechet_distance(a * 3, b * 3) == pytest.approx(9 * value)
    assert frechet_distance(a[::-1], b) == pytest.approx(value)
    assert frechet_distance(a + 0.5, a) == pytest.approx(5 * 0.25)
    assert frechet_distance(torch.tensor(a), torch.tensor(b)) == value


def test_frechet_of_rank_deficient_sets():
    rng = np.random.default_rng(3)
    few = rng.standard_normal((4, 20))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-12)
    point_a, point_b = np.zeros((3, 20)), np.full((5, 20), 2.0)
    assert frechet_distance(point_a, point_b) == pytest.approx(80)


def test_frechet_survives_a_large_offset():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((50, 4)), rng.standard_normal((50, 4)) + 1
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(frechet_distance(a, b), rel=1e-6)


# --- precision, recall, density, coverage ----------------------------------------------------------------------------


def brute_force_prdc(real, generated, k):
    """The definitions, point by point."""

    def radius(points, i):
        return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

    n, m = len(real), len(generated)
    in_real = [[np.linalg.norm(real[i] - generated[j]) < radius(real, i) for j in range(m)] for i in range(n)]
    in_generated = [[np.linalg.norm(real[i] - generated[j]) < radius(generated, j) for j in range(m)] for i in range(n)]
    return {
        "precision": sum(any(in_real[i][j] for i in range(n)) for j in range(m)) / m,
        "recall": sum(any(in_generated[i]) for i in range(n)) / n,
        "density": sum(sum(row) for row in in_real) / (k * m),
        "coverage": sum(any(row) for row in in_real) / n,
    }


def test_prdc_by_hand():
    real = np.array([[0.0], [1.0], [3.0], [10.0]])  # radii for k = 1: 1, 1, 2, 7
    generated = np.array([[0.5], [4.5], [0.6], [30.0]])  # radii: .1, 3.9, .1, 25.5
    # balls: .5 and .6 lie in those of 0 and 1; 4.5 in those of 3 and 10; 30 in none. In a generated ball: 1 and 3 in
    # that of 4.5 (.6 to 8.4), 10 in that of 30; 0 in none
    assert precision_recall_density_coverage(real, generated, k=1) == {
        "precision": 0.75,
        "recall": 0.75,
        "density": 6 / 4,
        "coverage": 1.0,
    }


@pytest.mark.parametrize("k", [1, 3, 5])
def test_prdc_matches_brute_force(k):
    rng = np.random.default_rng(k)
    real, generated = rng.standard_normal((24, 3)), rng.standard_normal((24, 3)) * 1.3 + 0.4
    assert precision_recall_density_coverage(real, generated, k) == pytest.approx(brute_force_prdc(real, generated, k))


def test_prdc_extremes():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((40, 3))
    same = precision_recall_density_coverage(real, real)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    far = precision_recall_density_coverage(real, real + 100)
    assert set(far.values()) == {0.0}
    collapsed = precision_recall_density_coverage(real, np.repeat(real[:1], 40, axis=0))
    assert collapsed["precision"] == 1
    assert collapsed["recall"] == 0
    assert collapsed["coverage"] < 0.5


@pytest.mark.parametrize("sizes", [(30, 95), (95, 30)], ids=["more generated", "more real"])
def test_prdc_uses_equal_sizes(sizes):
    rng = np.random.default_rng(6)
    real, generated = rng.standard_normal((sizes[0], 3)), rng.standard_normal((sizes[1], 3)) + 0.5
    small, large = (real, generated) if sizes[0] < sizes[1] else (generated, real)
    chunks = evaluation._chunks(large, 30)
    assert [len(chunk) for chunk in chunks] == [30, 30, 30]
    pairs = [(small, chunk) if small is real else (chunk, small) for chunk in chunks]
    expected = [brute_force_prdc(r, g, 5) for r, g in pairs]
    value = precision_recall_density_coverage(real, generated)
    assert value == pytest.approx({key: np.mean([e[key] for e in expected]) for key in value})


# --- the other functions ---------------------------------------------------------------------------------------------


def test_two_sample_accuracy():
    rng = np.random.default_rng(0)
    real, held_out, same = rng.standard_normal((3, 300, 8))
    assert evaluation.two_sample_accuracy(real, held_out, same) == pytest.approx(0.5, abs=0.06)
    assert evaluation.two_sample_accuracy(real, held_out, same + 3) > 0.98
    assert evaluation.two_sample_accuracy(real, held_out, real) < 0.5
    # sorted samples and unequal counts do not bias it
    many = np.sort(rng.standard_normal((900, 8)), axis=0)[:, :1] + np.zeros((1, 8))
    few = np.sort(rng.standard_normal((300, 1)), axis=0) + np.zeros((1, 8))
    assert evaluation.two_sample_accuracy(few, few, many) == pytest.approx(0.5, abs=0.06)


def test_within_class_diversity():
    features = np.array([[0.0, 0], [3, 4], [0, 0], [0, 1], [0, 2], [9, 9]])
    value = evaluation.within_class_diversity(features, [0, 0, 1, 1, 1, 2], 4)
    assert value[:2] == pytest.approx([5, 4 / 3])
    assert np.isnan(value[2:]).all()


def test_nearest_distance():
    assert evaluation.nearest_distance([[0.0, 0], [3, 4]], [[0.0, 0], [3, 0], [20, 20]]) == pytest.approx(2)


def test_class_accuracy():
    assert evaluation.class_accuracy([1, 2, 3, 4], [1, 2, 3, 0]) == 0.75
    with pytest.raises(ValueError, match="labels"):
        evaluation.class_accuracy([1, 2], [1])


GOOD, NAN = np.zeros((9, 2)), np.full((9, 2), np.nan)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(GOOD, NAN), "features_b holds values that are not finite"),
        (lambda: frechet_distance(GOOD[:1], GOOD), "features_a must have at least 2 rows"),
        (lambda: frechet_distance(GOOD, GOOD[:, :1]), "features_a and features_b differ in width: 2 and 1"),
        (lambda: frechet_distance(GOOD[0], GOOD), r"features_a must have shape \[N, D\]"),
        (lambda: precision_recall_density_coverage(GOOD, GOOD[:5]), "generated must have at least 6 rows"),
        (lambda: precision_recall_density_coverage(GOOD, GOOD, k=0), "k must be"),
        (lambda: precision_recall_density_coverage(NAN, GOOD), "real holds"),
        (lambda: evaluation.two_sample_accuracy(GOOD, GOOD[:0], GOOD), "held_out_real must have"),
        (lambda: evaluation.nearest_distance(GOOD, GOOD[:0]), "reference must have"),
        (lambda: evaluation.within_class_diversity(GOOD, [0] * 8, 2), r"labels must be integers of shape \[9\]"),
        (lambda: evaluation.within_class_diversity(GOOD, [2] * 9, 2), r"labels must lie in 0\.\.1"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- the digits evaluator --------------------------------------------------------------------------------------------


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


def test_real_images_score_near_the_floor(evaluator):
    """Test images in the place of samples, against validation: as far from it as their own smaller count makes them."""
    test = load_digits_split("test")
    value, floor = evaluator(test.tokens, test.labels, "validation"), evaluator.floor("validation")
    assert value["class_accuracy"] == pytest.approx(floor["class_accuracy"], abs=0.02)
    assert value["frechet_pixel"] < floor["frechet_pixel"] + 0.08
    assert value["nearest_train"] == pytest.approx(floor["nearest_train"], rel=0.1)
    assert value["two_sample_accuracy"] == pytest.approx(0.5, abs=0.12)
    assert value["diversity"] == pytest.approx(1, abs=0.05)
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


def test_copies_of_training_images_are_exposed(evaluator):
    train = load_digits_split("train")
    value = evaluator(train.tokens, train.labels, "test")
    assert value["nearest_train"] == 0
    assert value["two_sample_accuracy"] < 0.4


def test_lost_modes_are_seen(evaluator, floor):
    """One image of each class, repeated: perfect precision, no variety."""
    train = load_digits_split("train")
    first = [int((train.labels == c).nonzero()[0]) for c in train.labels]
    value = evaluator(train.tokens[first], train.labels, "test")
    assert value["diversity"] == 0
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


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"dimo-ext\[train\]"):
        evaluation.two_sample_accuracy(GOOD, GOOD, GOOD)
