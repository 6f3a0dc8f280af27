"""MDLM's transformer against the original's weights and outputs (tests/fixtures/README.md)."""

import pytest
import torch

from dimo.networks.mdlm import MDLMConfig, MDLMTransformer, subs_log_probs
from tests.golden import Golden

VOCAB, LENGTH = 28, 12  # without [MASK]


@pytest.fixture(scope="module")
def golden():
    return Golden("mdlm_dit")


@pytest.fixture(scope="module")
def config(golden):
    sizes = golden.constructor["config"]["model"]
    return MDLMConfig(
        vocab_size=golden.constructor["vocab_size"], model_length=sizes["length"], hidden_dim=sizes["hidden_size"],
        n_blocks=sizes["n_blocks"], n_heads=sizes["n_heads"], cond_dim=sizes["cond_dim"], dropout=sizes["dropout"],
    )  # fmt: skip


@pytest.fixture
def network(golden, config):
    model = MDLMTransformer(config).eval()
    model.load_state_dict(golden.state, strict=True)
    return model.requires_grad_(False)


@pytest.fixture(params=["sigma", "sigma0"])
def case(request, golden):
    """(name, noise level): the given one, and the 0 of released models, which take no time."""
    return request.param, golden["in.sigma"] if request.param == "sigma" else torch.zeros_like(golden["in.sigma"])


def test_state_dict_has_the_original_keys_and_shapes(golden, network):
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in golden.state.items()}


def test_logits(case, golden, network):
    name, sigma = case
    logits = network(golden["in.indices"], sigma, columns=VOCAB + 1)
    torch.testing.assert_close(logits, golden[f"out.logits_raw_{name}"], rtol=0, atol=1e-4)


def test_slicing_the_head_equals_slicing_the_output(golden, network):
    sliced = network(golden["in.indices"], golden["in.sigma"])
    assert sliced.shape == (3, LENGTH, VOCAB)
    torch.testing.assert_close(sliced, golden["out.logits_raw_sigma"][..., :VOCAB], rtol=0, atol=1e-4)


def test_subs(case, golden, network):
    """Log-probabilities of the real tokens; what the original sets to about -1e6 is -inf here, and so is [MASK]."""
    name, sigma = case
    tokens, expected = golden["in.indices"], golden[f"out.logits_subs_{name}"]
    actual = subs_log_probs(network(tokens, sigma), tokens, network.mask_id)
    possible = expected > -1e5
    assert not possible[..., VOCAB].any()
    possible, expected = possible[..., :VOCAB], expected[..., :VOCAB]
    torch.testing.assert_close(actual[possible], expected[possible], rtol=0, atol=1e-4)
    assert (actual[~possible] == -torch.inf).all()
    torch.testing.assert_close(actual.logsumexp(-1), torch.zeros(tokens.shape), rtol=0, atol=1e-5)


def test_recomputing_gives_the_same_gradients(golden, config):
    def gradients(recompute):
        model = MDLMTransformer(config).eval()
        model.load_state_dict(golden.state)
        model.recompute = recompute
        model(golden["in.indices"], golden["in.sigma"]).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, recomputed = gradients(recompute=False), gradients(recompute=True)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


def test_autocast_stays_near_float32(golden, network):
    expected = golden["out.logits_raw_sigma"][..., :VOCAB]
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(golden["in.indices"], golden["in.sigma"])
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("sizes", "message"), [({"n_heads": 5}, r"hidden_dim: .* \(10\), got 768"), ({"n_blocks": 0}, "n_blocks")]
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        MDLMConfig(**sizes)
