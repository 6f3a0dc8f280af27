"""The Meissonic transformer against the original's weights and outputs (tests/fixtures/README.md)."""

import pytest
import torch

from dimo.networks.meissonic import MeissonicConfig, MeissonicTransformer
from tests.golden import Golden

LAYOUTS = ["1024layout", "512layout"]


@pytest.fixture(scope="module", params=LAYOUTS)
def golden(request):
    return Golden(f"meissonic_transformer_{request.param}")


@pytest.fixture(scope="module")
def config(golden):
    return MeissonicConfig(**{name: value for name, value in golden.constructor.items() if name != "grid"})


@pytest.fixture
def network(golden, config):
    model = MeissonicTransformer(config).eval()
    model.load_state_dict(golden.state, strict=True)
    return model.requires_grad_(False)


@pytest.fixture
def inputs(golden):
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "micro_conds")
    return [golden[f"in.{name}"] for name in names]


def assert_golden(actual, expected):
    """Rounding alone moves the logits by 1e-5, guided ones by 3e-5; another norm eps by 4e-3."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_state_dict_has_the_original_keys_and_shapes(golden, network):
    assert {n: v.shape for n, v in network.state_dict().items()} == {n: v.shape for n, v in golden.state.items()}


def test_golden_holds_masked_and_other_tokens(golden, network):
    """Else the comparisons below would prove less than they say."""
    masked = golden["in.hidden_states"] == network.mask_id
    assert 0 < masked.sum() < masked.numel()


@pytest.mark.parametrize("timestep", ["int", "ratio", "zero"])
def test_logits(timestep, golden, network, inputs):
    """One timestep for all, one a sample, and the 0 of the one-step release."""
    value = torch.zeros(1) if timestep == "zero" else golden[f"in.timestep_{timestep}"]
    assert_golden(network(*inputs, value), golden[f"out.logits_timestep_{timestep}"])


def test_embedding_noise(golden, network, inputs):
    """The original's own noise through ``perturb``: on the token embeddings, before the grid is halved."""
    sigma, noise = golden["in.noise_emb_perturb"], golden["in.noise"].flatten(2).transpose(1, 2)

    def perturb(embeddings):
        assert embeddings.shape == noise.shape
        return sigma * noise + (1 - sigma**2).sqrt() * embeddings

    assert_golden(network(*inputs, golden["in.timestep_int"], perturb=perturb), golden["out.logits_noise"])


def test_guidance(golden, network, inputs):
    """The original's first half is the unconditional one."""
    uncond, cond = network(*inputs, golden["in.timestep_int"]).chunk(2)
    assert_golden(uncond + golden["in.guidance_scale"] * (cond - uncond), golden["out.logits_cfg"])


def test_logits_are_a_view_with_the_vocabulary_together(golden, network, inputs):
    """``[B, V, H, W]`` becomes ``[B, L, V]`` without a copy, and contiguous."""
    logits = network(*inputs, golden["in.timestep_int"])
    rows = logits.flatten(2).transpose(1, 2)
    assert rows.data_ptr() == logits.data_ptr()
    assert rows.is_contiguous()


def test_recomputing_gives_the_same_gradients(golden, config, inputs):
    """And keeps fewer tensors between forward and backward."""

    def run(recompute):
        torch.manual_seed(0)
        model = MeissonicTransformer(config)
        model.load_state_dict(golden.state)
        model.recompute = recompute
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model(*inputs, golden["in.timestep_ratio"]).square().mean()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, sum(kept)

    (plain, kept), (recomputed, kept_less) = run(recompute=False), run(recompute=True)
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())
    assert kept_less < kept / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_near_float32(dtype, golden, network, inputs):
    with torch.autocast("cpu", dtype):
        logits = network(*inputs, golden["in.timestep_int"])
    assert logits.dtype == dtype
    error = (logits.float() - golden["out.logits_timestep_int"]).norm() / golden["out.logits_timestep_int"].norm()
    assert error < {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"pooled_projection_dim": 31}, r"pooled_projection_dim: expected heads . head width \(32\), got 31"),
        (
            {"axes_dims_rope": [4, 6, 8]},
            r"axes_dims_rope: expected even numbers that sum to .* \(16\), got \(4, 6, 8\)",
        ),
        ({"vocab_size": 32}, r"vocab_size: expected more than codebook_size \(32\), got 32"),
        ({"num_layers": 0}, "num_layers: expected an integer >= 1, got 0"),
        ({"guidance_embeds": True}, "guidance_embeds: expected False, got True"),
        ({"upsample": False}, r"upsample: expected downsample \(True\), got False"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    good = Golden("meissonic_transformer_1024layout").constructor
    with pytest.raises(ValueError, match=message):
        MeissonicConfig(**{n: v for n, v in good.items() if n != "grid"} | sizes)
