"""What every operator promises about dispatch, transforms, processes and threads, and values on the device."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from dimo_ext import _backend, _checks
from dimo_ext.random import random_integers
from tests.conftest import assert_close


def inputs(device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(2, 3, 7, generator=generator).to(device) for _ in range(3)]
    tokens = torch.randint(0, 7, (2, 3), generator=generator).to(device)
    return dict(zip(("student", "teacher", "auxiliary"), logits, strict=True)) | {"tokens": tokens}


CALLS: dict[str, Callable[[dict[str, Tensor], Tensor], object]] = {
    "fold_in": lambda x, key: dx.fold_in(key, x["tokens"]),
    "token_divergence": lambda x, key: dx.token_divergence(x["teacher"], x["auxiliary"], "jeffreys:-0.2"),
    "masked_cross_entropy": lambda x, key: dx.masked_cross_entropy(x["student"], x["tokens"]),
    "sample_categorical": lambda x, key: dx.sample_categorical(x["teacher"], top_k=4, key=key).tokens,
    "mask_tokens": lambda x, key: dx.mask_tokens(x["tokens"], 0.5, 7, key=key).tokens,
    "init_tokens": lambda x, key: dx.init_tokens(2, 5, vocab_size=7, mask_id=7, r_init=0.4, key=key),
    "perturb_embeddings": lambda x, key: dx.perturb_embeddings(x["student"], 0.3, key=key),
}
every_operator = pytest.mark.parametrize("name", CALLS)


def call(name: str, device: torch.device) -> Tensor:
    return CALLS[name](inputs(device), dx.random_key(5, device=device))


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


@every_operator
def test_two_threads_get_what_one_gets(device, name):
    expected, results = call(name, device), []
    threads = [threading.Thread(target=lambda: results.append(call(name, device))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    assert all(torch.equal(expected, result) for result in results)


# As text, since a spawned child cannot import a test module. Torch's own thread pool does not survive a fork.
IN_A_CHILD = """
import torch, dimo_ext
torch.set_num_threads(1)
queue.put(dimo_ext.mask_tokens(torch.arange(200).view(2, 100), 0.5, -1, key=dimo_ext.random_key(5)).tokens.tolist())
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # forking a process with threads is what is tested
def test_child_processes(method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    expected = dx.mask_tokens(torch.arange(200).view(2, 100), 0.5, -1, key=dx.random_key(5)).tokens.tolist()
    child = context.Process(target=exec, args=(IN_A_CHILD, {"queue": queue}))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(timeout=10)
        child.kill()
    assert child.exitcode == 0


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


# --- the draws are part of the contract: values that no later version may change --------------------------------------

KEY_12 = (1, 2)
KNOWN_DRAWS = {
    "fold_in": [-8200629057115953869, -7815700616092848060],
    "init_tokens": [20, 5, -1, -1, 60, 29, 48, 23],
    "mask_tokens": [-1, -1, -1, -1, 4, 5, 6, 7],
    "sample_categorical": [488, 478, 415, 337],
    "perturb_embeddings": [-0.0496, 0.3029, -1.4616, 1.0193],
    "random_integers": [250, 698, 603, 948],
}


def test_known_draws(device):
    key = dx.random_key(*KEY_12, device=device)
    logits = torch.linspace(-2, 2, 600, device=device).repeat(1, 4, 1)
    drawn = {
        "fold_in": dx.fold_in(key, 7).tolist(),
        "init_tokens": dx.init_tokens(1, 8, vocab_size=100, mask_id=-1, r_init=0.25, key=key)[0].tolist(),
        "mask_tokens": dx.mask_tokens(torch.arange(8, device=device), 0.5, -1, key=key).tokens.tolist(),
        "sample_categorical": dx.sample_categorical(logits, key=key).tokens[0].tolist(),
        "perturb_embeddings": [
            round(v, 4) for v in dx.perturb_embeddings(torch.zeros(1, 4, device=device), 1.0, key=key)[0].tolist()
        ],
        "random_integers": random_integers(key, 4, 1000).tolist(),
    }
    assert drawn == KNOWN_DRAWS


def test_inductor(device):
    """One function with every operator, compiled without graph breaks, forward and backward."""

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


def test_nothing_waits_for_the_gpu(device):
    """No call reads a value back: on a GPU that would stall the training step and break graph capture."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    prepared = [(CALLS[name], inputs(device), dx.random_key(5, device=device)) for name in CALLS]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run, x, key in prepared:
            run(x, key)
    finally:
        torch.cuda.set_sync_debug_mode("default")
