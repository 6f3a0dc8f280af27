"""The Halton-MaskGIT transformer, its order of reveal and its sampler against the originals' outputs."""

import pytest
import torch
import torch.nn.functional as F

import dimo
import dimo_ext
from dimo.generator import sample_keys
from dimo.networks.halton import HaltonConfig, HaltonTransformer
from dimo.samplers import sample_halton
from dimo.schedules import halton_order
from dimo.state_dicts import CheckpointError, load_exactly
from dimo.teachers import HaltonTeacher
from tests.golden import FIXTURES, Golden

CHECKPOINT, TOKENIZER = FIXTURES / "halton" / "ImageNet_tiny.pth", FIXTURES / "halton" / "vq_ds16_c2i.pt"
VOCAB, CLASSES = 24, 7
SIZES = {"vocab_size": VOCAB, "num_classes": CLASSES, "width": 32, "depth": 2, "mlp_width": 256}
VARIANTS = {
    "halton_transformer": HaltonConfig(grid_size=4, heads=4, **SIZES),
    "halton_transformer_proj2": HaltonConfig(grid_size=8, heads=2, registers=2, patch_size=2, **SIZES),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request):
    """The golden tensors and our network with the original's weights."""
    golden, state = Golden(request.param), Golden(request.param).state
    assert torch.equal(state.pop("head.weight"), state["tok_emb.weight"])  # one tensor under two names
    network = HaltonTransformer(VARIANTS[request.param]).eval().requires_grad_(False)
    load_exactly(network, state, request.param)
    return golden, network


@pytest.mark.parametrize("case", ["cond", "uncond", "mixed"])
def test_logits(case, variant):
    golden, network = variant
    null = torch.full_like(golden["in.y"], network.null_class)
    dropped = {"cond": torch.tensor(False), "uncond": torch.tensor(True), "mixed": golden["in.drop_label"]}[case]
    logits = network(golden["in.x"].flatten(1), torch.where(dropped, null, golden["in.y"]), columns=VOCAB + 1)
    torch.testing.assert_close(logits, golden[f"out.logits_{case}"], rtol=0, atol=1e-5)


def test_guidance_is_ours_with_the_scale_one_larger(variant):
    """(1 + w)·c - w·u there, u + s(c - u) here: s = 1 + w."""
    golden, network = variant
    tokens, classes = golden["in.x"].flatten(1), golden["in.y"]
    cond, uncond = (network(tokens, y, columns=VOCAB + 1) for y in (classes, torch.full_like(classes, CLASSES)))
    mixed = uncond + (1 + golden["in.w"]) * (cond - uncond)
    torch.testing.assert_close(mixed, golden["out.logits_cfg"], rtol=0, atol=2e-5)


def test_inputs_hold_masks_and_tokens(variant):
    """Else the comparisons would prove less than they say."""
    golden, _ = variant
    assert 0 < (golden["in.x"] == VOCAB).sum() < golden["in.x"].numel()
    assert golden["in.drop_label"].unique().tolist() == [False, True]


def test_slicing_the_head_equals_slicing_the_output(variant):
    golden, network = variant
    tokens, classes = golden["in.x"].flatten(1), golden["in.y"]
    whole = network(tokens, classes, columns=VOCAB + 1)
    torch.testing.assert_close(network(tokens, classes), whole[..., :VOCAB], rtol=0, atol=1e-6)


def test_perturbation_sees_the_token_embeddings_alone(variant):
    golden, network = variant
    tokens, classes = golden["in.x"].flatten(1), golden["in.y"]
    zeros = lambda ids, table: F.embedding(ids, torch.zeros_like(table))  # noqa: E731
    blank = network(tokens, classes, embed=zeros)
    assert torch.equal(blank, network(torch.zeros_like(tokens), classes, embed=zeros))
    assert (blank - network(tokens, (classes + 1) % CLASSES, embed=zeros)).abs().max() > 1e-3
    assert (blank[:, 0] - blank[:, 1]).abs().max() > 1e-4  # positions are there


def test_recomputed_activations_give_the_same_gradient():
    network = HaltonTransformer(VARIANTS["halton_transformer"])
    torch.nn.init.normal_(network.transformer.layers[0].mlp[1].weight, std=0.3)
    tokens, gradients = torch.arange(16)[None], []
    for recompute in (False, True):
        network.transformer.recompute = recompute
        network.zero_grad()
        network(tokens, torch.tensor([2])).logsumexp(-1).sum().backward()
        gradients.append(network.pos_emb.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_width_that_the_heads_do_not_divide():
    """The published small model has 512 channels and 6 heads of 85: its projections have 510."""
    network = HaltonTransformer(HaltonConfig(grid_size=2, width=32, depth=1, heads=6, mlp_width=8, vocab_size=5))
    assert network.transformer.layers[0].attn.wq.weight.shape == (30, 32)
    assert network(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([3])).shape == (1, 4, 5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 0}, "width: expected an integer >= 1, got 0"),
        ({"registers": -1}, "registers: expected an integer >= 0, got -1"),
        ({"patch_size": 3}, "patch_size: expected 1, or 2 for an even grid_size, got 3"),
        ({"patch_size": 2, "grid_size": 3}, "patch_size: expected 1, or 2 for an even grid_size, got 2"),
        ({"width": 4, "heads": 5}, r"heads: expected at most the width \(4\), got 5"),
    ],
)
def test_sizes_that_no_network_has(sizes, message):
    with pytest.raises(ValueError, match=message):
        HaltonConfig(**sizes)


# --- the checkpoint -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    return dimo.load_teacher("halton", CHECKPOINT, tokenizer=TOKENIZER, heads=4)


def test_published_checkpoint(teacher):
    golden = Golden("halton_transformer")
    logits = teacher.logits(golden["in.x"].flatten(1), golden["in.y"])
    torch.testing.assert_close(logits, golden["out.logits_cond"][..., :VOCAB], rtol=0, atol=1e-5)
    null = teacher.logits(golden["in.x"].flatten(1), teacher.null_condition(4))
    torch.testing.assert_close(null, golden["out.logits_uncond"][..., :VOCAB], rtol=0, atol=1e-5)
    assert (teacher.mask_id, teacher.num_classes, teacher.seq_len) == (VOCAB, CLASSES, 16)
    assert set(teacher.frozen_parameters()) <= dict(teacher.named_parameters()).keys()


def test_prefixes_of_released_files(teacher, tmp_path):
    state = torch.load(CHECKPOINT, weights_only=True)["model_state_dict"]
    torch.save({"model_state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "h.pth")
    again = dimo.load_teacher("halton", tmp_path / "h.pth", heads=4)
    assert torch.equal(again.network.cls_emb.weight, teacher.network.cls_emb.weight)
    assert again.tokenizer is None


def test_a_head_that_is_not_tied_is_refused(tmp_path):
    state = torch.load(CHECKPOINT, weights_only=True)["model_state_dict"]
    torch.save({"model_state_dict": state | {"head.weight": state["head.weight"] + 1}}, tmp_path / "h.pth")
    with pytest.raises(CheckpointError, match=r"expected head\.weight to be tok_emb\.weight, they differ"):
        dimo.load_teacher("halton", tmp_path / "h.pth", heads=4)


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        (CHECKPOINT, {}, "teacher heads: .* its width 32 is none of the published 384, 512, 768, 1024"),
        (TOKENIZER, {"heads": 4}, r"expected a state dict \('model_state_dict' or bare tensors\), found model"),
        (FIXTURES / "maskgit" / "MaskGIT_tiny.pth", {"heads": 4}, r"expected pos_emb\.weight of 2 dimensions"),
    ],
)
def test_files_of_another_layout(path, options, message):
    with pytest.raises(CheckpointError, match=message):
        dimo.load_teacher("halton", path, **options)


# --- order and sampler ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [8, 16])
def test_order_is_the_original(size):
    golden = Golden("halton_order")
    rows, columns = golden[f"out.order_{size}"].T
    assert torch.equal(halton_order(size), rows * size + columns)


@pytest.mark.parametrize("size", [1, 2, 7, 24, 32])
def test_order_meets_every_cell_once(size):
    assert halton_order(size).sort().values.tolist() == list(range(size * size))


class Observed(HaltonTeacher):
    """Uniform logits; notes its inputs."""

    def __init__(self, grid_size: int) -> None:
        sizes = {"grid_size": grid_size, "vocab_size": 3, "num_classes": 2, "width": 2, "depth": 1, "heads": 1}
        super().__init__(HaltonTeacher.build(sizes | {"mlp_width": 2}).network)
        self.inputs = []

    def logits(self, tokens_BL, condition, **_):
        self.inputs.append(tokens_BL.clone())
        return torch.zeros(*tokens_BL.shape, 3)


def first_seen(model: Observed, tokens: torch.Tensor) -> torch.Tensor:
    """The step that wrote each token; no token changes afterwards."""
    states = torch.stack([*model.inputs[1:], tokens])
    masked = states == model.mask_id
    assert not (masked[1:] & ~masked[:-1]).any()
    assert torch.equal(states.gather(0, masked.sum(0, keepdim=True))[0], tokens)
    return masked.sum(0)


@pytest.mark.parametrize(("size", "steps"), [(16, 12), (16, 32), (8, 4), (8, 8)])
def test_cells_are_written_in_the_original_step(size, steps):
    golden = Golden("halton_order")
    model = Observed(size)
    tokens = sample_halton(model, torch.tensor([0]), steps=steps, randomize=False, key=dimo_ext.random_key(0))
    assert torch.equal(first_seen(model, tokens).view(size, size), golden[f"out.step_of_{size}_steps{steps}"])


def test_random_starts_roll_the_sequence():
    """Every sample begins at its own cell of the sequence, all of which come up."""
    model, count = Observed(4), 400
    tokens = sample_halton(model, torch.zeros(count, dtype=torch.int64), steps=16, key=dimo_ext.random_key(0))
    order = first_seen(model, tokens).argsort(1)
    starts = (order[:, :1] == halton_order(4)).nonzero()[:, 1]
    assert all(torch.equal(row, halton_order(4).roll(-int(start))) for row, start in zip(order, starts, strict=True))
    counts = starts.bincount(minlength=16).double()
    assert (counts - count / 16).square().sum() / (count / 16) < 44.3  # chi-squared, 15 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("steps", [1, 3, 16, 100])
def test_samples_depend_on_their_key_alone(steps, teacher):
    labels, keys = torch.arange(6), sample_keys(3, 6)
    settings = {"steps": steps, "guidance_scale": 2.0, "temperature": 0.9}
    together = sample_halton(teacher, labels, **settings, key=keys)
    parts = [sample_halton(teacher, labels[i : i + 2], **settings, key=keys[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(together, torch.cat(parts))
    assert together.shape == (6, 16)
    assert 0 <= together.min() <= together.max() < VOCAB


def test_a_grid_that_is_no_square_is_refused(teacher, monkeypatch):
    monkeypatch.setattr(teacher, "seq_len", 15)
    with pytest.raises(ValueError, match="model: expected a square grid of tokens, got 15"):
        sample_halton(teacher, torch.tensor([0]), steps=2, key=dimo_ext.random_key(0))
