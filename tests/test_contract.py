"""What every operator promises about dispatch and transforms, and about values on the device."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo_ext import _backend, _checks
from dimo_ext.random import random_uniform
from tests import conftest
from tests.conftest import assert_close


def inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 3, 7, generator=generator).to(device) for _ in range(3)]
    tokens = torch.randint(0, 7, (2, 3), generator=generator).to(device)
    return dict(zip(("student", "teacher", "auxiliary"), logits, strict=True)) | {"tokens": tokens}


CALLS: dict[str, Callable[[dict[str, Tensor], Tensor], object]] = {
    "fold_in": lambda x, key: dx.fold_in(key, x["tokens"]),
    "uniform_words": lambda x, key: random_uniform(key, 9),
    "token_divergence": lambda x, key: dx.token_divergence(x["teacher"], x["auxiliary"], "jeffreys:-0.2"),
    "masked_cross_entropy": lambda x, key: dx.masked_cross_entropy(x["student"], x["tokens"]),
    "sample_categorical": lambda x, key: dx.sample_categorical(x["teacher"], top_k=4, key=key).tokens,
    "reveal_ancestral": lambda x, key: dx.reveal_ancestral(x["teacher"], x["tokens"] % 2, 0.5, 1, key=key),
    "reveal_confident": lambda x, key: dx.reveal_confident(x["teacher"], x["tokens"] % 2, 1, 1, key=key),
    "mask_tokens": lambda x, key: dx.mask_tokens(x["tokens"], 0.5, 7, key=key).tokens,
    "init_tokens": lambda x, key: dx.init_tokens(2, 5, vocab_size=7, mask_id=7, r_init=0.4, key=key),
    "perturb_embeddings": lambda x, key: dx.perturb_embeddings(x["student"], 0.3, key=key),
    "embed_and_perturb": lambda x, key: dx.embed_and_perturb(x["tokens"] % 3, x["student"][0], 0.3, key=key),
}
every_operator = pytest.mark.parametrize("name", CALLS)


def call(name: str, device: torch.device) -> Tensor:
    return CALLS[name](inputs(device), dx.random_key(5, device=device))


# --- the tests' own tool --------------------------------------------------------------------------------------------


def test_cross_meets_every_pair_of_values(monkeypatch):
    """Under "ci" any two values of any two axes occur together, under "full" every combination does."""
    axes = [range(19), "abcd", range(7), [False, True], ["alone"]]
    for profile, most in (("ci", 200), ("full", 19 * 4 * 7 * 2)):
        monkeypatch.setattr(conftest, "PROFILE", profile)
        rows = conftest.cross(*axes)
        assert len(set(rows)) == len(rows) <= most
        for (i, first), (j, second) in itertools.combinations(enumerate(axes), 2):
            assert {(row[i], row[j]) for row in rows} == set(itertools.product(first, second))
    assert len(rows) == most


# --- dispatch -------------------------------------------------------------------------------------------------------


def test_every_operator_is_covered_here():
    assert set(CALLS) == set(_backend.OPERATORS)


@every_operator
def test_native_never_falls_back(device, name, monkeypatch):
    """Where native was required, the reference does not run: the kernel serves, or the call fails and says why."""
    served = dx.build_info()["operators"][name][device.type]["backend"] == "native"
    monkeypatch.setattr(dx.reference, name, lambda *_: pytest.fail("the reference ran"))
    with dx.use_backend("native"):
        if served:
            call(name, device)
        else:
            with pytest.raises(RuntimeError, match=f"{name} has no native kernel on {device.type}"):
                call(name, device)


@every_operator
def test_reference_never_uses_a_kernel(device, name, monkeypatch):
    monkeypatch.setattr(_backend, "_find_kernel", lambda *_: pytest.fail("a kernel was looked up"))
    with dx.use_backend("reference"):
        call(name, device)


# --- transforms -----------------------------------------------------------------------------------------------------


@every_operator
@pytest.mark.filterwarnings("ignore:.*batching rule.*")
def test_vmap_is_the_loop(device, name):
    """Torch runs an operator without batching rule once an element; with a key an element, draws follow the key."""
    if name == "init_tokens":
        keys = dx.random_key([1, 2, 3], device=device)
        run = lambda key: dx.init_tokens(2, 5, vocab_size=7, mask_id=7, r_init=0.4, key=key)  # noqa: E731
        assert torch.equal(torch.vmap(run)(keys), torch.stack([run(key) for key in keys]))
        return
    stacked = {k: torch.stack([v, v.flip(0), v.roll(1, -1)]) for k, v in inputs(device).items()}
    keys = dx.random_key([1, 2, 3], device=device)
    mapped = torch.vmap(CALLS[name])(stacked, keys)
    looped = [CALLS[name]({k: v[i] for k, v in stacked.items()}, keys[i]) for i in range(3)]
    assert torch.equal(mapped, torch.stack(looped))


@every_operator
def test_export(device, name):
    class Module(torch.nn.Module):
        def forward(self, x, key):
            return CALLS[name](x, key)

    arguments = (inputs(device), dx.random_key(5, device=device))
    program = torch.export.export(Module(), arguments)
    assert torch.equal(program.module()(*arguments), call(name, device))


def whole_step(x, ratio, temperature, n, key):
    """Every operator once, with scalars that change from call to call."""
    key = dx.fold_in(key, n)
    start = dx.init_tokens(x.shape[0], x.shape[1], vocab_size=7, mask_id=7, r_init=ratio, key=key)
    drawn = dx.sample_categorical(dx.perturb_embeddings(x, 0.3, key=key), temperature=temperature, top_p=0.9, key=key)
    masked = dx.mask_tokens(drawn.tokens + 0 * start, ratio, 7, key=key)
    loss = dx.distribution_matching_loss(
        x, x + 1, x.cos(), "jeffreys:0.3", mask=masked.mask, auxiliary_temperature=temperature, reduction="mean"
    )
    return loss + dx.masked_cross_entropy(x, drawn.tokens, masked.mask, label_smoothing=ratio / 10)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_once_for_all_sizes_and_scalars(device, dynamic):
    """New batch sizes and step numbers must not run into the recompilation limit; a float recompiles once a value."""
    torch.compiler.reset()
    compiled = torch.compile(whole_step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    key = dx.random_key(5, device=device)
    for n in range(12):
        x = torch.randn(2 + n, 3, 7, generator=torch.Generator().manual_seed(n)).to(device)
        arguments = (x, (0.2, 0.6)[n % 2], (0.5, 1.5)[n % 2], n, key)
        assert_close(compiled(*arguments), whole_step(*arguments))


def test_export_with_a_dynamic_batch(device):
    class Module(torch.nn.Module):
        def forward(self, x, key):
            return whole_step(x, 0.5, 1.0, 3, key)

    key = dx.random_key(5, device=device)
    batch = {0: torch.export.Dim("batch", min=2)}
    x = torch.randn(3, 3, 7, device=device)
    program = torch.export.export(Module(), (x, key), dynamic_shapes=(batch, None))
    other = torch.randn(5, 3, 7, device=device)
    assert_close(program.module()(other, key), Module()(other, key))


@pytest.mark.parametrize("name", ["token_divergence", "masked_cross_entropy", "perturb_embeddings"])
def test_forward_mode_is_refused(device, name):
    """Without a formula the tangents would silently be zero."""
    x, key = inputs(device), dx.random_key(5, device=device)
    target = {"token_divergence": "auxiliary"}.get(name, "student")
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda z: CALLS[name](x | {target: z}, key), (x[target],), (torch.ones_like(x[target]),))


def test_inductor(device, tmp_path, monkeypatch):
    """One function with every operator, compiled without graph breaks, forward and backward."""
    # The machine's own cache may hold a library that a killed process left half-written.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def step(x, key):
        drawn = dx.sample_categorical(x["student"], key=key)
        masked = dx.mask_tokens(drawn.tokens, 0.6, 7, key=key)
        loss = dx.distribution_matching_loss(
            x["student"], x["teacher"], x["auxiliary"], "jensen_shannon", mask=masked.mask
        )
        return loss + dx.masked_cross_entropy(x["student"], drawn.tokens, masked.mask)

    key, gradients = dx.random_key(5, device=device), []
    for function in (step, torch.compile(step, fullgraph=True)):
        x = inputs(device)
        x["student"].requires_grad_()
        function(x, key).backward()
        gradients.append(x["student"].grad)
    assert gradients[0].abs().sum() > 0
    assert_close(gradients[1], gradients[0])


def test_autocast(device):
    """Half-precision logits of a network go in, a float32 loss comes out, gradients reach the weights."""
    x = inputs(device)
    head = torch.nn.Linear(7, 7).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = head(x["student"])
        loss = dx.distribution_matching_loss(logits, x["teacher"], x["auxiliary"], "forward_kl")
        loss = loss + dx.masked_cross_entropy(logits, x["tokens"])
    assert (logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    assert head.weight.grad.abs().sum() > 0


# --- values that live on the device ---------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
BAD_VALUES = {
    "mask_ratio": lambda x, key: dx.mask_tokens(x["tokens"], torch.tensor([0.5, 1.5]).to(key.device), 7, key=key),
    "guidance_scale": lambda x, key: dx.sample_categorical(
        x["teacher"], uncond_logits=x["student"], guidance_scale=torch.tensor([NAN, 1.0]).to(key.device), key=key
    ),
    "teacher_logits": lambda x, key: dx.token_divergence(x["teacher"] * NAN, x["auxiliary"], "forward_kl"),
    "auxiliary_logits": lambda x, key: dx.token_divergence(x["teacher"], x["auxiliary"] + INF, "forward_kl"),
    "logits": lambda x, key: dx.sample_categorical(x["teacher"] - INF, key=key),
    "tokens": lambda x, key: dx.embed_and_perturb(x["tokens"] + 7, x["student"][0], 0.3, key=key),
    "probability": lambda x, key: dx.reveal_ancestral(
        x["teacher"], x["tokens"], torch.tensor([0.5, -1.0]).to(key.device), 1, key=key
    ),
    "targets": lambda x, key: dx.masked_cross_entropy(x["student"], x["tokens"] + 7),
    "weight": lambda x, key: dx.distribution_matching_loss(
        x["student"], x["teacher"], x["auxiliary"], "forward_kl", weight=torch.tensor([1.0, INF]).to(key.device)
    ),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_are_checked_under_debug_alone(device, name, monkeypatch):
    x, key = inputs(device), dx.random_key(5, device=device)
    BAD_VALUES[name](x, key)  # defined behaviour, no error, nothing read back
    monkeypatch.setattr(_checks, "DEBUG", True)
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got .* other value"):
        BAD_VALUES[name](x, key)


@every_operator
def test_debug_accepts_good_values(device, name, monkeypatch):
    monkeypatch.setattr(_checks, "DEBUG", True)
    call(name, device)


def test_debug_ignores_rows_that_are_masked_out(device, monkeypatch):
    monkeypatch.setattr(_checks, "DEBUG", True)
    x = inputs(device)
    mask = torch.ones(2, 3, dtype=torch.bool, device=device)
    mask[0, 1] = False
    x["teacher"][0, 1] = NAN
    x["tokens"][0, 1] = 99
    dx.token_divergence(x["teacher"], x["auxiliary"], "forward_kl", mask=mask)
    dx.masked_cross_entropy(x["student"], x["tokens"], mask)
    dx.reveal_confident(x["teacher"], mask.long(), 1, 1, key=dx.random_key(0, device=device))
