"""The teacher protocol, shown on the digits teacher and a bare MaskGIT."""

import json

import pytest
import torch
import torch.nn.functional as F

import dimo_ext
from dimo.data.digits import load_digits_split
from dimo.guidance import guided_logits
from dimo.teachers import TEACHERS, DigitsTeacher, MaskGITTeacher, Teacher
from dimo.teachers.base import concat_conditions, condition_size

TINY = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "dropout": 0.0}


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    model = DigitsTeacher.build(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(0, 18, (4, 64), generator=torch.Generator().manual_seed(1))


def test_registry_goes_by_kind():
    assert TEACHERS["digits"] is DigitsTeacher
    assert TEACHERS["maskgit"] is MaskGITTeacher
    assert all(issubclass(cls, Teacher) and cls.kind == kind for kind, cls in TEACHERS.items())


def test_digits_sizes(teacher):
    assert (teacher.kind, teacher.vocab_size, teacher.mask_id, teacher.seq_len) == ("digits", 17, 17, 64)
    assert teacher.num_classes == 10
    assert teacher.device == torch.device("cpu")


def test_logits_are_those_of_the_real_tokens(teacher, tokens):
    """V columns, the network's first: [MASK] and class ids never appear."""
    labels = torch.tensor([0, 3, 9, 10])
    logits = teacher.logits(tokens, labels, mask_ratio=torch.rand(4))
    assert logits.shape == (4, 64, 17)
    whole = teacher.network(tokens, labels, columns=29)
    torch.testing.assert_close(logits, whole[..., :17], rtol=0, atol=1e-6)


def test_null_condition_is_the_class_after_the_last(teacher, tokens):
    assert teacher.null_condition(3).tolist() == [10, 10, 10]
    cond = teacher.logits(tokens, torch.zeros(4, dtype=torch.int64))
    assert (cond - teacher.logits(tokens, teacher.null_condition(4))).abs().max() > 1e-3


def test_sample_condition_is_uniform_and_a_function_of_the_key(teacher):
    key = dimo_ext.random_key(5)
    labels = teacher.sample_condition(20_000, key)
    assert torch.equal(labels, teacher.sample_condition(20_000, key))
    assert not torch.equal(labels, teacher.sample_condition(20_000, dimo_ext.random_key(6)))
    counts = labels.bincount(minlength=10).double()
    assert len(counts) == 10
    assert (counts - 2000).square().sum() / 2000 < 33.7  # chi-squared, 9 degrees of freedom, p = 1e-4


@pytest.mark.parametrize("scale", ["unit", "rms"])
def test_embedding_noise_is_the_perturbation_of_the_token_embeddings(scale, teacher, tokens):
    key, labels = dimo_ext.random_key(3), torch.arange(4)
    table = teacher.network.tok_emb.weight
    size = 1.0 if scale == "unit" else table.square().mean().sqrt().item()
    noise = dimo_ext.perturb_embeddings(torch.zeros(4, 64, 16), 1.0, key=key)  # sigma 1 leaves the noise alone
    expected = teacher.network(
        tokens, labels, embed=lambda ids, table: 0.6 * size * noise + 0.8 * F.embedding(ids, table)
    )
    actual = teacher.logits(tokens, labels, embedding_noise=0.6, embedding_noise_scale=scale, key=key)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual - teacher.logits(tokens, labels)).abs().max() > 1e-2


def test_embedding_noise_is_added_by_the_lookup_itself(monkeypatch, teacher, tokens):
    monkeypatch.delattr(dimo_ext, "perturb_embeddings")  # the second pass over the embeddings
    teacher.logits(tokens, torch.arange(4), embedding_noise=0.6, key=dimo_ext.random_key(3))


def test_unknown_noise_scale_lists_the_valid_ones(teacher, tokens):
    with pytest.raises(ValueError, match="embedding_noise_scale: expected one of unit, rms, got 'std'"):
        teacher.logits(tokens, torch.arange(4), embedding_noise=0.1, embedding_noise_scale="std")


def test_decode_gives_back_the_pixels(teacher):
    split = load_digits_split("validation")
    images = teacher.decode(split.tokens)
    assert images.shape == (180, 1, 8, 8)
    assert torch.equal(images[:, 0].flatten(1) * 16, split.tokens.float())
    with pytest.raises(ValueError, match=r"0\.\.16"):
        teacher.decode(torch.full((1, 64), teacher.mask_id))


def test_build_from_network_config_is_the_same_network(teacher, tokens):
    sizes = json.loads(json.dumps(teacher.network_config()))
    again = DigitsTeacher.build(sizes)
    assert again.network_config() == sizes
    again.load_state_dict(teacher.state_dict(), strict=True)
    assert torch.equal(again.eval().logits(tokens, torch.arange(4)), teacher.logits(tokens, torch.arange(4)))


def test_the_data_fix_the_sizes_of_a_digits_teacher():
    model = DigitsTeacher.build({**TINY, "vocab_size": 5, "grid_size": 3, "num_classes": 2})
    assert (model.vocab_size, model.seq_len, model.num_classes) == (17, 64, 10)


def test_build_refuses_unknown_sizes():
    with pytest.raises(TypeError, match="widht"):
        DigitsTeacher.build({"widht": 16})


@pytest.mark.parametrize("cls", [DigitsTeacher, MaskGITTeacher])
def test_frozen_parameters_exist(cls):
    model = cls.build({**TINY, "grid_size": 2, "vocab_size": 5, "num_classes": 3})
    names = model.frozen_parameters()
    assert names
    assert set(names) <= dict(model.named_parameters()).keys()


@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_build_refuses_sizes_that_are_no_counts(size):
    with pytest.raises(ValueError, match="depth: expected an integer >= 1"):
        DigitsTeacher.build({**TINY, "depth": size})


def test_bare_maskgit_has_no_decoder():
    model = MaskGITTeacher.build({**TINY, "grid_size": 2, "vocab_size": 5, "num_classes": 3})
    with pytest.raises(ValueError, match="'maskgit' has no tokeniser"):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))


def test_conditions_are_pytrees():
    """Concatenation and size reach every leaf of a nested condition."""
    condition = {"text": torch.arange(6).view(3, 2), "sizes": (torch.arange(3),)}
    both = concat_conditions(condition, condition)
    assert condition_size(both) == 6
    assert both["text"].tolist() == condition["text"].tolist() * 2
    assert both["sizes"][0].tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 4), (2.0, 8), (0.0, 8)])
def test_guided_logits_is_one_call(scale, rows, teacher, tokens, monkeypatch):
    """B rows without guidance, 2B with it, and then the halves are the two separate evaluations."""
    labels, ratio, calls, plain = torch.arange(4), torch.linspace(0.1, 0.9, 4), [], teacher.logits

    def logits(rows_BL, condition, *, mask_ratio):
        calls.append((rows_BL.shape[0], mask_ratio))
        return plain(rows_BL, condition)

    monkeypatch.setattr(teacher, "logits", logits)
    cond, uncond = guided_logits(teacher, tokens, labels, scale, mask_ratio=ratio)
    assert [count for count, _ in calls] == [rows]
    assert torch.equal(calls[0][1], ratio.repeat(rows // 4))
    torch.testing.assert_close(cond, plain(tokens, labels), rtol=0, atol=1e-5)
    if rows == 4:
        assert uncond is None
    else:
        torch.testing.assert_close(uncond, plain(tokens, teacher.null_condition(4)), rtol=0, atol=1e-5)
