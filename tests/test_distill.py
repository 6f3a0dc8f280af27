"""Student and auxiliary losses against an independent plain-PyTorch reading of the method (arXiv 2503.15457)."""

import math

import pytest
import torch
import torch.nn.functional as F

import dimo_ext
from dimo.config import MethodConfig
from dimo.distill import auxiliary_loss, draw_from_student, student_loss
from dimo.teachers import MaskGITTeacher
from dimo_ext.random import random_uniform

BATCH, LENGTH, VOCAB, CLASSES = 6, 9, 5, 3
SIZES = {"grid_size": 3, "vocab_size": VOCAB, "num_classes": CLASSES, "width": 16, "depth": 1, "heads": 2,
         "mlp_width": 32, "dropout": 0.0}  # fmt: skip

DIVERGENCES = {  # D(p || q) from log-probabilities, straight from the definitions
    "forward_kl": lambda p, q: (p.exp() * (p - q)).sum(-1),
    "reverse_kl": lambda p, q: (q.exp() * (q - p)).sum(-1),
    "jeffreys:-0.2": lambda p, q: 1.2 * (p.exp() * (p - q)).sum(-1) - 0.2 * (q.exp() * (q - p)).sum(-1),
    "squared_hellinger": lambda p, q: ((p / 2).exp() - (q / 2).exp()).square().sum(-1),
}


def model(seed: int, dtype=torch.float64) -> MaskGITTeacher:
    """A tiny MaskGIT with weights large enough that its predictions differ from uniform."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        built = MaskGITTeacher.build(SIZES)
        for parameter in built.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return built.to(dtype).eval()


def networks(dtype=torch.float64) -> tuple[MaskGITTeacher, MaskGITTeacher, MaskGITTeacher]:
    """Student, teacher, auxiliary; all of them would take gradients."""
    return model(0, dtype), model(1, dtype), model(2, dtype)


CONDITION = torch.tensor([0, 1, 2, 0, 1, 2])
KEY = dimo_ext.random_key(7)


class Table(MaskGITTeacher):
    """Predicts a table of logits ``[B, L, V]`` whatever its input."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(model(0).network)
        self.table = torch.nn.Parameter(logits)

    def logits(self, tokens_BL, condition, **_):
        return self.table


def record_calls(monkeypatch, network: MaskGITTeacher) -> list[dict]:
    """The list that every later call of ``network.logits`` is noted in."""
    calls, original = [], network.logits

    def logits(tokens_BL, condition, **kwargs):
        out = original(tokens_BL, condition, **kwargs)
        calls.append({"tokens": tokens_BL.clone(), "condition": condition.clone(), "out": out, **kwargs})
        return out

    monkeypatch.setattr(network, "logits", logits)
    return calls


# --- the same step, written out -------------------------------------------------------------------------------------


def plain_draw(student: MaskGITTeacher, method: MethodConfig, key) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at x_init with noisy embeddings, and the tokens drawn from them."""
    x_init = dimo_ext.init_tokens(
        BATCH, LENGTH, vocab_size=VOCAB, mask_id=VOCAB, r_init=method.r_init, key=dimo_ext.fold_in(key, 0)
    )
    table, sigma = student.network.tok_emb.weight, method.embedding_noise
    scale = {"unit": 1.0, "rms": table.detach().square().mean().sqrt().item()}[method.embedding_noise_scale]
    noise = dimo_ext.perturb_embeddings(
        torch.zeros(BATCH, LENGTH, table.shape[1], dtype=table.dtype), 1.0, key=dimo_ext.fold_in(key, 1)
    )
    embed = lambda ids, table: sigma * scale * noise + math.sqrt(1 - sigma**2) * F.embedding(ids, table)  # noqa: E731
    logits = student.network(x_init, CONDITION, embed=embed)
    drawn = dimo_ext.sample_categorical(
        logits / method.student_temperature, key=dimo_ext.fold_in(key, 2)
    )  # the temperature divides
    return logits, drawn.tokens


def plain_mask(tokens: torch.Tensor, uniform_key, mask_key) -> tuple[torch.Tensor, torch.Tensor]:
    """Arccos schedule at one uniform time a sample, then exactly round(r·L) masked positions, at least one."""
    u = random_uniform(uniform_key, BATCH)
    return dimo_ext.mask_tokens(tokens, 2 * torch.acos(1 - u) / math.pi, VOCAB, key=mask_key)


def plain_student_loss(student, teacher, auxiliary, method, key) -> tuple[torch.Tensor, torch.Tensor]:
    """The divergence, and a loss ½‖z - sg(z - g)‖² whose gradient at z is g, both over the batch size."""
    logits, tokens = plain_draw(student, method, dimo_ext.fold_in(key, 0))
    x_t, mask = plain_mask(tokens, dimo_ext.fold_in(key, 1), dimo_ext.fold_in(key, 2))
    with torch.no_grad():
        cond, uncond = teacher.network(x_t, CONDITION), teacher.network(x_t, torch.full_like(CONDITION, CLASSES))
        target = uncond + method.guidance_scale * (cond - uncond)
        z = auxiliary.network(x_t, CONDITION)
    z.requires_grad_()
    per_token = DIVERGENCES[method.divergence]((target / method.teacher_temperature).log_softmax(-1), z.log_softmax(-1))
    value = (per_token * mask).sum() / BATCH
    (gradient,) = torch.autograd.grad(value, z)
    return value.detach(), 0.5 * (logits - (logits - gradient).detach()).square().sum()


METHODS = [
    MethodConfig(),
    MethodConfig(divergence="reverse_kl", guidance_scale=1.0, r_init=0.5),
    MethodConfig(divergence="jeffreys:-0.2", guidance_scale=2.5, teacher_temperature=0.7, embedding_noise=0.3),
    MethodConfig(divergence="squared_hellinger", student_temperature=1.6, embedding_noise_scale="unit"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.divergence)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 2e-4)])
def test_student_gradient_is_the_pseudo_gradient(method, dtype, tolerance):
    student, teacher, auxiliary = networks(dtype)
    loss = student_loss(student, teacher, auxiliary, CONDITION, method, KEY).loss
    actual = torch.autograd.grad(loss, list(student.parameters()))
    value, plain = plain_student_loss(student, teacher, auxiliary, method, KEY)
    expected = torch.autograd.grad(plain, list(student.parameters()))
    torch.testing.assert_close(loss.detach(), value, rtol=tolerance, atol=tolerance)
    scale = max(gradient.abs().max().item() for gradient in expected)
    assert scale > 1e-3
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


def test_teacher_and_auxiliary_get_no_gradient(monkeypatch):
    """Neither do their outputs hang on a graph, unless the auxiliary trains on this very batch."""
    student, teacher, auxiliary = networks()
    seen = [record_calls(monkeypatch, network) for network in (teacher, auxiliary)]
    student_loss(student, teacher, auxiliary, CONDITION, MethodConfig(fresh_auxiliary_batch=True), KEY).loss.backward()
    for network, calls in zip((teacher, auxiliary), seen, strict=True):
        assert all(parameter.grad is None for parameter in network.parameters())
        assert not any(call["out"].requires_grad for call in calls)
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_a_reused_batch_carries_the_auxiliarys_own_gradient(monkeypatch):
    """Its cross-entropy at the very tokens of the divergence, to the auxiliary alone; the divergence gives it none."""
    student, teacher, auxiliary = networks()
    calls = record_calls(monkeypatch, auxiliary)
    method = MethodConfig(fresh_auxiliary_batch=False, label_smoothing=0.1)
    losses = student_loss(student, teacher, auxiliary, CONDITION, method, KEY)
    losses.loss.backward()
    assert all(parameter.grad is None for parameter in auxiliary.parameters())
    x_t, tokens = calls[0]["tokens"], losses.draw.tokens
    expected = F.cross_entropy(
        auxiliary.network(x_t, CONDITION)[x_t == VOCAB], tokens[x_t == VOCAB], label_smoothing=0.1
    )
    torch.testing.assert_close(losses.auxiliary, expected, rtol=1e-9, atol=1e-9)
    parameters = list(auxiliary.parameters())
    actual, wanted = torch.autograd.grad(losses.auxiliary, parameters), torch.autograd.grad(expected, parameters)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("guidance_scale", "rows"), [(1.0, BATCH), (1.25, 2 * BATCH), (0.0, 2 * BATCH)])
def test_each_network_is_called_once(guidance_scale, rows, monkeypatch):
    """Guidance doubles the teacher's rows, never the calls; teacher and auxiliary see the same tokens and ratios."""
    student, teacher, auxiliary = networks()
    by_student, by_teacher, by_auxiliary = (record_calls(monkeypatch, n) for n in (student, teacher, auxiliary))
    student_loss(student, teacher, auxiliary, CONDITION, MethodConfig(guidance_scale=guidance_scale), KEY)
    assert [len(calls) for calls in (by_student, by_teacher, by_auxiliary)] == [1, 1, 1]
    assert by_teacher[0]["tokens"].shape == (rows, LENGTH)
    assert by_auxiliary[0]["tokens"].shape == (BATCH, LENGTH)
    for name in ("tokens", "mask_ratio"):
        repeats = (rows // BATCH,) + (1,) * (by_auxiliary[0][name].dim() - 1)
        assert torch.equal(by_teacher[0][name], by_auxiliary[0][name].repeat(repeats))
    nulls = torch.full((rows - BATCH,), CLASSES)
    assert torch.equal(by_teacher[0]["condition"], torch.cat([CONDITION, nulls]))


def test_only_masked_positions_matter(monkeypatch):
    """The student's logits get exactly zero where its token stayed visible, something else elsewhere."""
    student = Table(torch.randn(BATCH, LENGTH, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    _, teacher, auxiliary = networks()
    calls = record_calls(monkeypatch, auxiliary)
    student_loss(student, teacher, auxiliary, CONDITION, MethodConfig(), KEY).loss.backward()
    mask = calls[0]["tokens"] == VOCAB
    assert 0 < mask.sum() < mask.numel()
    assert (student.table.grad[~mask] == 0).all()
    assert (student.table.grad[mask].abs().amax(-1) > 0).all()


def test_logits_at_visible_positions_do_not_change_the_loss(monkeypatch):
    """Teacher logits shifted where tokens are visible leave loss and gradient as they were."""
    student, teacher, auxiliary = networks()
    method = MethodConfig(guidance_scale=1.0)
    before = student_loss(student, teacher, auxiliary, CONDITION, method, KEY).loss
    plain = teacher.logits

    def shifted(tokens_BL, condition, **kwargs):
        visible = (tokens_BL != VOCAB)[..., None]
        noise = torch.arange(VOCAB, dtype=torch.float64)
        return plain(tokens_BL, condition, **kwargs) + torch.where(visible, noise, 0.0)

    monkeypatch.setattr(teacher, "logits", shifted)
    after = student_loss(student, teacher, auxiliary, CONDITION, method, KEY).loss
    assert after.item() == before.item()


def test_loss_is_a_function_of_the_key():
    student, teacher, auxiliary = networks()
    losses = [
        student_loss(student, teacher, auxiliary, CONDITION, MethodConfig(), dimo_ext.random_key(seed)).loss.item()
        for seed in (1, 1, 2)
    ]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


# --- the draw -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r_init", [0.0, 0.3, 0.8, 1.0])
def test_x_init_holds_exactly_the_share_of_masks(r_init, monkeypatch):
    student = model(0)
    calls = record_calls(monkeypatch, student)
    draw_from_student(student, CONDITION, MethodConfig(r_init=r_init), KEY)
    (call,) = calls
    assert ((call["tokens"] == VOCAB).sum(1) == round(r_init * LENGTH)).all()
    visible = call["tokens"][call["tokens"] != VOCAB]
    assert ((visible >= 0) & (visible < VOCAB)).all()
    torch.testing.assert_close(call["mask_ratio"], torch.full((BATCH,), r_init))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.divergence)
def test_draw_matches_the_plain_one(method):
    student = model(0)
    draw = draw_from_student(student, CONDITION, method, KEY)
    logits, tokens = plain_draw(student, method, KEY)
    torch.testing.assert_close(draw.logits, logits, rtol=1e-7, atol=1e-7)  # the noise scale is float32
    assert torch.equal(draw.tokens, tokens)


def test_embedding_noise_changes_the_logits():
    student = model(0)
    logits = [draw_from_student(student, CONDITION, MethodConfig(embedding_noise=s), KEY).logits for s in (0, 0.1, 0.5)]
    near, far = ((other - logits[0]).abs().mean().item() for other in logits[1:])
    assert 1e-3 < near < far


def test_draws_follow_the_student_temperature():
    """At a low temperature every token is the most probable one."""
    student = model(0)
    draw = draw_from_student(student, CONDITION, MethodConfig(student_temperature=1e-3), KEY)
    assert torch.equal(draw.tokens, draw.logits.argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_entropy(temperature):
    """Mean entropy of softmax(logits / τ): here of (¾, ⅛, ⅛, 0, 0) and of the uniform distribution, half of each."""
    p = torch.tensor([0.75, 0.125, 0.125, 1e-300, 1e-300], dtype=torch.float64)
    table = torch.zeros(BATCH, LENGTH, VOCAB, dtype=torch.float64)
    table[::2] = temperature * p.log()
    _, teacher, auxiliary = networks()
    method = MethodConfig(student_temperature=temperature)
    entropy = student_loss(Table(table), teacher, auxiliary, CONDITION, method, KEY).token_entropy
    expected = 0.5 * math.log(VOCAB) + 0.5 * (0.75 * math.log(4 / 3) + 0.25 * math.log(8))
    assert entropy.item() == pytest.approx(expected, rel=1e-5)
    assert not entropy.requires_grad


# --- the auxiliary --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_auxiliary_loss_is_plain_cross_entropy(label_smoothing):
    """At freshly masked positions, mean over them; value and gradient."""
    auxiliary, method = model(2), MethodConfig(label_smoothing=label_smoothing)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))
    loss = auxiliary_loss(auxiliary, tokens, CONDITION, method, KEY)
    x_t, mask = plain_mask(tokens, dimo_ext.fold_in(KEY, 0), dimo_ext.fold_in(KEY, 1))
    logits = auxiliary.network(x_t, CONDITION)
    expected = F.cross_entropy(logits[mask], tokens[mask], label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    parameters = list(auxiliary.parameters())
    actual, wanted = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_logits_without_a_finite_value_show_in_the_scalars(broken):
    """Their draw is no token: that must end in a NaN that the trainer reports, not in an index out of range."""
    table = torch.zeros(BATCH, LENGTH, VOCAB, dtype=torch.float64)
    table[0] = broken
    _, teacher, auxiliary = networks()
    losses = student_loss(Table(table), teacher, auxiliary, CONDITION, MethodConfig(r_init=1.0), KEY)
    assert losses.loss.isfinite()
    assert losses.auxiliary.isfinite()
    assert losses.token_entropy.isnan()
    assert auxiliary_loss(auxiliary, losses.draw.tokens, CONDITION, MethodConfig(), KEY).isfinite()
