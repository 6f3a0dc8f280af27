"""The MaskGIT transformer against the original's weights and outputs (tests/fixtures/README.md)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from dimo.networks.maskgit import MaskGITConfig, MaskTransformer

GOLDEN = Path(__file__).parent / "fixtures" / "maskgit_transformer.safetensors"
VOCAB, CLASSES, GRID = 24, 7, 4
WITH_MASK = VOCAB + 1  # the original keeps the logit of [MASK]


@pytest.fixture(scope="module")
def golden():
    """Tensors of the golden file by name; cloned, as memory-mapped ones are unaligned and round differently."""
    with safe_open(GOLDEN, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.fixture(scope="module")
def network(golden):
    sizes = MaskGITConfig(
        grid_size=GRID, vocab_size=VOCAB, num_classes=CLASSES, width=32, depth=2, heads=4, mlp_width=64
    )
    model = MaskTransformer(sizes).eval()
    state = {name.removeprefix("state."): value for name, value in golden.items() if name.startswith("state.")}
    model.load_state_dict(state, strict=True)
    return model.requires_grad_(False)


@pytest.fixture
def tokens(golden):
    return golden["in.img_token"].flatten(1)


@pytest.fixture
def classes(golden):
    return golden["in.y"]


def assert_golden(actual, expected):
    """Rounding alone moves these logits by 1e-6; a tanh GELU in the last layer by some 2e-5."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_state_dict_has_the_original_keys_and_shapes(golden, network):
    original = {name.removeprefix("state."): v.shape for name, v in golden.items() if name.startswith("state.")}
    assert {name: v.shape for name, v in network.state_dict().items()} == original


def test_ids(network):
    assert (network.mask_id, network.null_class, network.seq_len) == (VOCAB, CLASSES, GRID * GRID)


def test_golden_holds_masked_tokens_and_mixed_labels(golden, tokens):
    """Else the comparisons below would prove less than they say."""
    assert (tokens == VOCAB).any()
    assert (tokens != VOCAB).any()
    assert 0 < golden["in.drop_label"].sum() < len(golden["in.drop_label"])


@pytest.mark.parametrize("case", ["nodrop", "drop_mixed", "drop_all"])
def test_logits(case, golden, network, tokens, classes):
    """The original's dropped labels are our null class."""
    dropped = {
        "nodrop": torch.zeros_like(golden["in.drop_label"]),
        "drop_mixed": golden["in.drop_label"],
        "drop_all": torch.ones_like(golden["in.drop_label"]),
    }[case]
    logits = network(tokens, torch.where(dropped, network.null_class, classes), columns=WITH_MASK)
    assert_golden(logits, golden[f"out.logits_{case}"])


def test_attention_averaged_over_heads(golden, network, tokens, classes):
    """From the packed projections' inputs: heads are split as the original splits them, the class token among them."""
    seen, expected = [], [golden[f"out.attn_drop_mixed.{layer}"] for layer in range(2)]
    handles = [
        attention.fn.mha.register_forward_pre_hook(lambda module, args: seen.append((module, args[0])))
        for attention, _ in network.transformer.layers
    ]
    network(tokens, torch.where(golden["in.drop_label"], network.null_class, classes))
    for handle in handles:
        handle.remove()
    for (module, x), weights in zip(seen, expected, strict=True):
        packed = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
        query, key, _ = packed.unflatten(-1, (3, module.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        assert_golden(scores.softmax(-1).mean(1), weights)


def test_embedding_noise(golden, network, tokens, classes):
    """The original's own noise through ``embed``: before positions, on the tokens alone."""
    sigma, noise = golden["in.noise_emb_perturb"].item(), golden["in.noise"][:, : GRID * GRID]

    def embed(ids, table):
        assert ids.shape == noise.shape[:2]  # the class token is not among them
        return sigma * noise + (1 - sigma**2) ** 0.5 * F.embedding(ids, table)

    assert_golden(network(tokens, classes, columns=WITH_MASK, embed=embed), golden["out.logits_noise"])


def test_guidance_per_sample(golden, network, tokens, classes):
    """Conditional and null-class logits mix to the original's u + s(c - u)."""
    both = network(tokens.repeat(2, 1), torch.cat([classes, torch.full_like(classes, CLASSES)]), columns=WITH_MASK)
    cond, uncond = both.chunk(2)
    assert_golden(uncond + golden["in.cfg"].view(-1, 1, 1) * (cond - uncond), golden["out.logits_cfg"])


def test_class_token_is_not_perturbed(network, tokens, classes):
    """With all token embeddings replaced by zeros the logits still depend on the class, and on nothing else."""
    zeros = lambda ids, table: F.embedding(ids, torch.zeros_like(table))  # noqa: E731
    blank = network(tokens, classes, embed=zeros)
    assert torch.equal(blank, network(torch.zeros_like(tokens), classes, embed=zeros))
    assert (blank - network(tokens, (classes + 1) % CLASSES, embed=zeros)).abs().max() > 1e-3


@pytest.mark.parametrize("columns", [1, 7, VOCAB, None])
def test_slicing_the_head_equals_slicing_the_output(columns, network, tokens, classes):
    sliced = network(tokens, classes, columns=columns)
    whole = network(tokens, classes, columns=network.tok_emb.num_embeddings)
    width = VOCAB if columns is None else columns
    assert sliced.shape == (*tokens.shape, width)
    torch.testing.assert_close(sliced, whole[..., :width], rtol=0, atol=1e-6)


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match=r"width: expected a multiple of heads \(3\), got 16"):
        MaskGITConfig(width=16, heads=3)
