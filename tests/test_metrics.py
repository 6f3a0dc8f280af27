"""Metrics of any data: against closed forms, brute force, scipy and scikit-learn."""

import itertools
import math
import sys

import numpy as np
import pytest
import scipy.stats
import torch

import dimo_ext
from dimo import metrics
from dimo.metrics import (
    Interval,
    frechet_distance,
    mean_and_interval,
    negative_log_likelihood_bound,
    precision_recall_density_coverage,
)
from dimo.teachers import MaskGITTeacher

pytest.importorskip("sklearn")


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
    chunks = metrics._chunks(large, 30)
    assert [len(chunk) for chunk in chunks] == [30, 30, 30]
    pairs = [(small, chunk) if small is real else (chunk, small) for chunk in chunks]
    expected = [brute_force_prdc(r, g, 5) for r, g in pairs]
    value = precision_recall_density_coverage(real, generated)
    assert value == pytest.approx({key: np.mean([e[key] for e in expected]) for key in value})


# --- the other functions ---------------------------------------------------------------------------------------------


def test_two_sample_accuracy():
    rng = np.random.default_rng(0)
    real, held_out, same = rng.standard_normal((3, 300, 8))
    assert metrics.two_sample_accuracy(real, held_out, same) == pytest.approx(0.5, abs=0.06)
    assert metrics.two_sample_accuracy(real, held_out, same + 3) > 0.98
    assert metrics.two_sample_accuracy(real, held_out, real) < 0.5
    # sorted samples and unequal counts do not bias it
    many = np.sort(rng.standard_normal((900, 8)), axis=0)[:, :1] + np.zeros((1, 8))
    few = np.sort(rng.standard_normal((300, 1)), axis=0) + np.zeros((1, 8))
    assert metrics.two_sample_accuracy(few, few, many) == pytest.approx(0.5, abs=0.06)


def test_two_sample_accuracy_is_that_of_scikit_learn():
    """Fold after fold, in one thread."""
    svm, selection = pytest.importorskip("sklearn.svm"), pytest.importorskip("sklearn.model_selection")
    rng = np.random.default_rng(1)
    real, generated, held_out = rng.random((60, 4)), rng.random((50, 4)) + 0.2, rng.random((30, 4))
    rows, samples = metrics.shuffled(real, 0), metrics.shuffled(generated, 1)
    hits = []
    for fit, test in selection.KFold(5).split(samples):
        inputs = np.concatenate([rows[: len(fit)], samples[fit]])
        fitted = svm.SVC(C=10, gamma=0.5).fit(inputs, [1] * len(fit) + [0] * len(fit))
        hits += [fitted.predict(held_out).mean(), 1 - fitted.predict(samples[test]).mean()]
    assert metrics.two_sample_accuracy(real, held_out, generated) == pytest.approx(np.mean(hits), abs=1e-12)


def test_within_class_diversity():
    features = np.array([[0.0, 0], [3, 4], [0, 0], [0, 1], [0, 2], [9, 9]])
    value = metrics.within_class_diversity(features, [0, 0, 1, 1, 1, 2], 4)
    assert value[:2] == pytest.approx([5, 4 / 3])
    assert np.isnan(value[2:]).all()


def test_within_class_entropy():
    """Against scipy: class 0 has frequencies 1/4 and 3/4, then all equal; class 1 one sample; class 2 none."""
    tokens = np.array([[0, 2], [1, 2], [1, 2], [1, 2], [0, 1]])
    value = metrics.within_class_entropy(tokens, [0, 0, 0, 0, 1], vocab_size=4, num_classes=3)
    assert value[0] == pytest.approx(scipy.stats.entropy([1, 3]) / 2)
    assert value[1] == 0
    assert np.isnan(value[2])


def test_within_class_entropy_of_uniform_tokens():
    grid = np.array(list(itertools.product(range(3), repeat=2)))
    assert metrics.within_class_entropy(grid, np.zeros(9, int), 3, 1) == pytest.approx([math.log(3)])
    repeated = np.repeat(np.arange(3), 3)[:, None].repeat(2, axis=1)  # the same marginals, equal tokens
    assert metrics.within_class_entropy(repeated, np.zeros(9, int), 3, 1) == pytest.approx([math.log(3)])


def test_nearest_distances():
    value = metrics.nearest_distances([[0.0, 0], [3, 4]], [[0.0, 0], [3, 0], [20, 20]])
    assert value.tolist() == [0, 4]


def test_nearest_distances_are_those_of_scikit_learn():
    neighbours = pytest.importorskip("sklearn.neighbors").NearestNeighbors(n_neighbors=1)
    rng = np.random.default_rng(0)
    generated, reference = rng.random((40, 7)), rng.random((60, 7))
    expected = neighbours.fit(reference).kneighbors(generated)[0][:, 0]
    assert metrics.nearest_distances(generated, reference) == pytest.approx(expected, rel=1e-12)


def test_class_accuracy():
    assert metrics.class_accuracy([1, 2, 3, 4], [1, 2, 3, 0]) == 0.75
    with pytest.raises(ValueError, match="labels"):
        metrics.class_accuracy([1, 2], [1])


GOOD, NAN, TOKENS = np.zeros((9, 2)), np.full((9, 2), np.nan), np.full((9, 2), 3)


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
        (lambda: metrics.two_sample_accuracy(GOOD, GOOD[:0], GOOD), "held_out_real must have"),
        (lambda: metrics.nearest_distances(GOOD, GOOD[:0]), "reference must have"),
        (lambda: metrics.within_class_diversity(GOOD, [0] * 8, 2), r"labels must be integers of shape \[9\]"),
        (lambda: metrics.within_class_diversity(GOOD, [2] * 9, 2), r"labels must lie in 0\.\.1"),
        (lambda: metrics.within_class_entropy(GOOD, [0] * 9, 3, 1), r"tokens must be integers of shape \[N, L\]"),
        (lambda: metrics.within_class_entropy(TOKENS, [0] * 9, 3, 1), r"tokens must lie in 0\.\.2, not 3\.\.3"),
        (lambda: metrics.within_class_entropy(TOKENS, [0] * 8, 4, 1), r"labels must be integers of shape \[9\]"),
        (lambda: mean_and_interval([]), r"values must be finite numbers of shape \[S\] or \[T, S\]"),
        (lambda: mean_and_interval([1.0, math.nan]), "values must be finite"),
        (lambda: mean_and_interval(1.0), "values must be finite numbers of shape"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r"dimo-ext\[train\]"):
        metrics.two_sample_accuracy(GOOD, GOOD, GOOD)


# --- mean and interval -----------------------------------------------------------------------------------------------


def test_interval_of_three_values():
    """t(0.975, 2) = 4.302653, standard deviation 1."""
    value = mean_and_interval([1.0, 2.0, 3.0])
    assert value.mean == 2
    assert (value.low, value.high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)


@pytest.mark.parametrize("count", [2, 5, 30])
def test_interval_is_that_of_scipy(count):
    values = np.random.default_rng(count).standard_normal(count)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean_and_interval(values) == pytest.approx((values.mean(), *expected))


def test_one_value_has_no_interval():
    assert mean_and_interval([0.25]) == (0.25, None, None)


def test_sampling_seeds_do_not_count_as_training_seeds():
    """Three runs of two samplings each: the interval is that of the runs' means; one run has none."""
    runs = [[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]
    assert mean_and_interval(runs) == mean_and_interval([1.5, 3.5, 7.0])
    assert mean_and_interval(runs[:1]) == (1.5, None, None)


def test_interval_as_text():
    assert f"{Interval(1.0, 0.875, 1.125):.3f}" == "1.000 ± 0.125"
    assert f"{Interval(1.0, None, None):.2f}" == "1.00"


# --- likelihood bound ------------------------------------------------------------------------------------------------

L, V = 4, 3
KEY = dimo_ext.random_key(0)


class FunctionTeacher(MaskGITTeacher):
    """Log-probabilities [B, L, V] from a function of tokens and condition; notes the masks that it sees."""

    def __init__(self, function) -> None:
        sizes = {"grid_size": 2, "vocab_size": V, "num_classes": 2, "width": 2, "depth": 1, "heads": 1, "mlp_width": 2}
        super().__init__(MaskGITTeacher.build(sizes).network)
        self.function, self.masks = function, []

    def logits(self, tokens_BL, condition, *, mask_ratio=None, **_):
        mask = tokens_BL == self.mask_id
        assert torch.equal(mask.sum(-1), (mask_ratio * L).round().long())
        self.masks.append(mask)
        return self.function(tokens_BL, condition)


def independent(table):
    """Tokens independent of each other: log-probabilities by class [C, L, V]."""
    return FunctionTeacher(lambda tokens, condition: table[condition])


def one_image_in_all_places(tokens, condition):
    """All tokens equal, each of the V ids equally likely: certain once one token is known."""
    known = torch.where(tokens == V, -1, tokens).amax(-1)
    certain = torch.full((len(tokens), L, V), -math.inf)
    certain[torch.arange(len(tokens)), :, known] = 0.0
    return torch.where((known < 0)[:, None, None], torch.full((), -math.log(V)), certain)


def exact_bound(teacher, tokens_L, condition):
    """The mean over k and over all masks of size k, one by one."""
    means = []
    for k in range(1, L + 1):
        losses = []
        for chosen in itertools.combinations(range(L), k):
            masked = tokens_L.clone()
            masked[list(chosen)] = V
            logits = teacher.logits(masked[None], condition[None], mask_ratio=torch.tensor([k / L]))[0]
            losses.append(-logits.double().log_softmax(-1)[range(L), tokens_L][list(chosen)].mean().item())
        means.append(np.mean(losses))
    return np.mean(means)


def test_bound_is_exact_where_all_positions_are_equally_likely():
    table = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]).log()[:, None].expand(2, L, V)
    tokens = torch.zeros(6, L, dtype=torch.int64)
    bound = negative_log_likelihood_bound(independent(table), tokens, torch.tensor([0, 1] * 3), key=KEY)
    assert bound.dtype == torch.float64
    assert bound.tolist() == pytest.approx([math.log(2), math.log(4)] * 3, rel=1e-6)


def test_bound_of_independent_pixels_is_their_likelihood():
    """In the mean over masks, exactly −log p(x) a token; 4.5 standard errors."""
    table = torch.randn(1, L, V, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    tokens = torch.tensor([0, 2, 1, 1])
    rows = tokens.expand(20_000, L)
    bound = negative_log_likelihood_bound(independent(table), rows, torch.zeros(20_000, dtype=torch.int64), key=KEY)
    expected = -table[0].double()[range(L), tokens].mean().item()
    assert abs(bound.mean().item() - expected) < 4.5 * bound.std().item() / 20_000**0.5
    assert bound.std().item() > 0.05  # a single mask does not give it away


def test_bound_of_tied_tokens_is_their_likelihood():
    """p(x) = 1/V for equal tokens: all masked costs log V a token, any other mask nothing; each k comes up equally."""
    teacher = FunctionTeacher(one_image_in_all_places)
    tokens = torch.arange(V).repeat(8)[:, None].expand(-1, L)
    bound = negative_log_likelihood_bound(teacher, tokens, torch.zeros(8 * V, dtype=torch.int64), key=KEY)
    assert bound.mean().item() == pytest.approx(math.log(V) / L, rel=1e-6)


def test_bound_of_a_network_is_the_mean_over_all_masks():
    """Random logits that depend on all tokens, and contradict each other; 4.5 standard errors."""
    weight = torch.randn(L * (V + 1), L * V, generator=torch.Generator().manual_seed(1))
    one_hot = torch.nn.functional.one_hot
    teacher = FunctionTeacher(lambda x, _: (one_hot(x, V + 1).flatten(1).float() @ weight).unflatten(1, (L, V)))
    tokens, condition = torch.tensor([2, 0, 1, 0]), torch.tensor(0)
    bound = negative_log_likelihood_bound(teacher, tokens.expand(5000, L), condition.expand(5000), key=KEY, repeats=4)
    error = bound.mean().item() - exact_bound(teacher, tokens, condition)
    assert abs(error) < 4.5 * bound.std().item() / 5000**0.5


def test_bound_masks_each_number_of_positions_equally_often():
    teacher = independent(torch.zeros(1, L, V))
    tokens, labels = torch.zeros(10, L, dtype=torch.int64), torch.zeros(10, dtype=torch.int64)
    negative_log_likelihood_bound(teacher, tokens, labels, key=KEY, repeats=2)
    counts = torch.cat(teacher.masks).sum(-1).bincount(minlength=L + 1)
    assert counts.tolist() == [0, 5, 5, 5, 5]
    for half in teacher.masks:  # a sample's two repeats: one of k = 1, 2 and one of 3, 4, or the reverse
        assert half.sum(-1).bincount(minlength=L + 1).max() <= 6
    pairs = torch.stack([mask.sum(-1) for mask in teacher.masks])
    assert ((pairs[0] > 2) != (pairs[1] > 2)).all()


def test_bound_is_a_function_of_the_key_and_not_of_the_batches():
    table = torch.randn(2, L, V, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    tokens = torch.randint(0, V, (9, L), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(9) % 2

    def bound(seed, **options):
        return negative_log_likelihood_bound(
            independent(table), tokens, labels, key=dimo_ext.random_key(seed), **options
        )

    assert torch.equal(bound(0), bound(0, batch_size=4))
    assert not torch.equal(bound(0), bound(1))
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        bound(0, repeats=0)
