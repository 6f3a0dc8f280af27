"""Every operator as torch sees it: schema, fake and autograd registrations, torch.compile, the choice of backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import dimo_ext as dx
from tests.conftest import LogitsCase

OPERATORS = torch.ops.dimo_ext
LAYOUTS = ["contiguous", "sliced", "vocab_first", "batch_second"]


def logits_of(device, layout="contiguous", dtype=torch.float32, count=3) -> list[Tensor]:
    return LogitsCase((2, 3), 5, dtype, layout).build(device, count)


# --- opcheck --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_gradient", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("layout", "dtype"), [(lay, torch.float32) for lay in LAYOUTS] + [("sliced", torch.bfloat16),
                         ("sliced", torch.float16), ("contiguous", torch.float64)], ids=str)  # fmt: skip
def test_opcheck_token_divergence(device, layout, dtype, guided, need_gradient):
    teacher, auxiliary, uncond = logits_of(device, layout, dtype)
    mask = torch.tensor([[True, False, True]] * 2, device=device) if guided else None
    scale = torch.tensor([1.0, 2.0], device=device) if guided else None
    floor = -20.0 if guided else None
    receiver = auxiliary.clone().requires_grad_(need_gradient)
    arguments = (teacher, auxiliary, "jeffreys:-0.2", uncond if guided else None, 1.5, scale, 1.0, 0.8, floor, mask)
    choices = factors((2, 3), device, torch.float64 if dtype == torch.float64 else torch.float32)
    for factor, reduce in choices[::2] if guided else choices[1::2]:
        torch.library.opcheck(OPERATORS.token_divergence.default, (receiver, *arguments, factor, reduce, need_gradient))


@pytest.mark.parametrize(("layout", "dtype"), [(lay, torch.float32) for lay in LAYOUTS] + [("sliced", torch.float16),
                         ("contiguous", torch.float64)], ids=str)  # fmt: skip
def test_opcheck_divergence_gradient_(device, layout, dtype):
    teacher, auxiliary, uncond = logits_of(device, layout, dtype)
    mask, scale = torch.tensor([[True, False, True]] * 2, device=device), torch.tensor([1.0, 2.0], device=device)
    for factor, reduce in factors((2, 3), device, torch.float64 if dtype == torch.float64 else torch.float32):
        arguments = (auxiliary, teacher, "jeffreys:-0.2", uncond, 1.5, scale, 1.0, 0.8, -20.0, mask, factor, reduce)
        torch.library.opcheck(OPERATORS.divergence_gradient_.default, arguments)


def factors(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor | None, bool]]:
    """What the reductions pass on: (factor, reduce)."""
    weight = torch.rand(shape, device=device, dtype=dtype)
    return [(None, False), (torch.tensor(0.25, device=device, dtype=dtype), True), (weight, True), (weight, False)]


@pytest.mark.parametrize("need_gradient", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_masked_cross_entropy(device, layout, need_gradient):
    (logits,) = logits_of(device, layout, count=1)
    logits = logits.detach().requires_grad_(need_gradient)
    targets = torch.tensor([[0, 4, -1], [2, 5, 1]], device=device)
    mask = targets > 0 if need_gradient else None
    for valid_vocab, reduction in [(None, "none"), (4, "sum"), (4, "mean"), (None, "batchmean")]:
        arguments = (logits, targets, mask, 0.1, valid_vocab, reduction, need_gradient)
        torch.library.opcheck(OPERATORS.masked_cross_entropy.default, arguments)


@pytest.mark.parametrize("filters", [(1.0, 0, 1.0, 0.0), (0.7, 3, 0.9, 0.1), (0.0, 0, 1.0, 0.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_sample_categorical(device, layout, filters):
    cond, uncond = logits_of(device, layout, count=2)
    guidance = (uncond, 2.0, None) if filters[1] else (None, 1.0, None)
    torch.library.opcheck(
        OPERATORS.sample_categorical.default, (cond, dx.random_key([1, 2], device=device), *filters, *guidance)
    )


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_reveal(device, layout, each):
    cond, uncond = logits_of(device, layout, count=2)
    tokens = torch.tensor([[5, 5], [5, 1], [2, 5]], device=device).T
    chances, counts = (torch.tensor(n, device=device) if each else None for n in ([0.2, 0.8], [1, 2]))
    draw = (0.7, 3, 0.9, 0.1, uncond, 2.0, None) if each else (1.0, 0, 1.0, 0.0, None, 1.0, None)
    key = dx.random_key([1, 2], device=device)
    torch.library.opcheck(OPERATORS.reveal_ancestral.default, (cond, tokens, key, 0.5, chances, 5, *draw))
    torch.library.opcheck(OPERATORS.reveal_confident.default, (cond, tokens, key, 1, counts, 2.0, 5, *draw))


@pytest.mark.parametrize("bernoulli", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_mask_tokens(device, bernoulli, transposed):
    tokens = torch.arange(12, device=device).view(3, 4)
    tokens = tokens.T if transposed else tokens
    ratio = torch.full((len(tokens),), 0.5, device=device) if bernoulli else None
    key = dx.random_key(1, device=device)
    torch.library.opcheck(OPERATORS.mask_tokens.default, (tokens, key, 0.5, ratio, -7, bernoulli, 1))


def test_opcheck_fold_in(device):
    for key in (dx.random_key(3, device=device), dx.random_key([3, 4], device=device)):
        for n in (None, torch.tensor([5, -1], device=device), torch.tensor([[1], [2], [3]], device=device)):
            torch.library.opcheck(OPERATORS.fold_in.default, (key, 7, n))


@pytest.mark.parametrize("count", [0, 7])
def test_opcheck_uniform_words(device, count):
    torch.library.opcheck(OPERATORS.uniform_words.default, (dx.random_key(3, device=device), count))


@pytest.mark.parametrize("seed", [1, [1, 2]])
def test_opcheck_init_tokens(device, seed):
    torch.library.opcheck(OPERATORS.init_tokens.default, (dx.random_key(seed, device=device), 2, 7, 9, -1, 0.6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_perturb_embeddings(device, dtype, transposed):
    embeddings = torch.randn(3, 2, 5, device=device).to(dtype)
    embeddings = (embeddings.transpose(0, 1) if transposed else embeddings).detach().requires_grad_()
    key, scale = dx.random_key(1, device=device), torch.tensor(0.5, device=device)
    torch.library.opcheck(OPERATORS.perturb_embeddings.default, (embeddings, key, 0.3, scale))


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 0)])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_embed_and_perturb(device, transposed, shape):
    table = torch.randn(5, 7, device=device)
    table = (table.T if transposed else table).detach().requires_grad_()
    tokens = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    key, scale = dx.random_key(1, device=device), torch.tensor(0.5, device=device)
    torch.library.opcheck(OPERATORS.embed_and_perturb.default, (table, tokens, key, 0.3, scale))


# --- torch.compile --------------------------------------------------------------------------------------------------


def divergence_step(x: Tensor, key: Tensor) -> Tensor:
    scale = torch.full((len(x),), 1.5, device=x.device)
    return dx.token_divergence(
        x.flip(-1), 2 * x, "jeffreys:-0.2", teacher_uncond_logits=x.flip(0), guidance_scale=scale
    ).sum()


def matching_step(x: Tensor, key: Tensor) -> Tensor:
    weight = torch.ones(len(x), device=x.device)
    mask = x.detach()[..., 0] > 0
    return dx.distribution_matching_loss(x * 3, x.flip(-1), x.cos(), dx.ReverseKL(), mask=mask, weight=weight)


def in_place_step(x: Tensor, key: Tensor) -> Tensor:
    gradient = x.detach().cos()
    value = dx.divergence_gradient_(gradient, x.detach() * 3, dx.ReverseKL())
    return value + (x * gradient).sum()


def cross_entropy_step(x: Tensor, key: Tensor) -> Tensor:
    return dx.masked_cross_entropy(x * 2, x.detach().argmin(-1), label_smoothing=0.1)


def sampling_step(x: Tensor, key: Tensor) -> Tensor:
    sample = dx.sample_categorical(x, temperature=0.8, top_k=4, top_p=0.9, key=dx.fold_in(key, 3))
    return (x.gather(-1, sample.tokens[..., None])[..., 0] + sample.log_prob).sum()


def reveal_step(x: Tensor, key: Tensor) -> Tensor:
    tokens = x.detach().argmax(-1)
    shown = dx.reveal_ancestral(x, tokens, torch.full((len(x),), 0.7, device=x.device), 1, key=key)
    shown = dx.reveal_confident(x, shown, 2, 2, noise_scale=0.5, key=key)
    return x.gather(-1, shown[..., None]).sum()


def masking_step(x: Tensor, key: Tensor) -> Tensor:
    tokens = dx.init_tokens(len(x), x.shape[1], vocab_size=5, mask_id=4, r_init=0.6, key=key)
    masked = dx.mask_tokens(tokens, torch.full((len(x),), 0.5, device=x.device), 4, key=dx.fold_in(key, 1))
    return (x.gather(-1, masked.tokens[..., None])[..., 0] * masked.mask).sum()


def embedding_step(x: Tensor, key: Tensor) -> Tensor:
    looked_up = dx.embed_and_perturb(x.detach().argmax(-1) % 3, x[0] * 3, 0.4, scale=0.02, key=key)
    return dx.perturb_embeddings(x * 2, 0.4, scale=0.02, key=key).square().sum() + looked_up.square().sum()


@pytest.mark.parametrize(
    "step",
    [
        divergence_step,
        matching_step,
        in_place_step,
        cross_entropy_step,
        sampling_step,
        reveal_step,
        masking_step,
        embedding_step,
    ],
)
def test_compiled_equals_eager(device, step: Callable[[Tensor, Tensor], Tensor]):
    """One full graph, the same value and the same gradient, and fresh draws when the key changes."""
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = logits_of(device, count=1)[0].requires_grad_()
    for seed in (1, 2):
        key = dx.random_key(seed, device=device)
        results = [function(x, key) for function in (step, compiled)]
        eager, traced = ((value, *torch.autograd.grad(value, x)) for value in results)
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a, b)
    assert eager[0] != 0


def test_compiled_draws_follow_the_key(device):
    """The key is an input of the graph, no constant in it."""
    torch._dynamo.reset()
    tokens = torch.zeros(2, 64, dtype=torch.int64, device=device)
    function = torch.compile(
        lambda key: dx.mask_tokens(tokens, 0.5, 1, key=key).mask, fullgraph=True, backend="aot_eager"
    )
    masks = [function(dx.random_key(seed, device=device)) for seed in (1, 2, 1)]
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])


def test_a_generator_under_compile_is_a_clear_error(device):
    """Compiled code passes a key; the message says how."""
    torch._dynamo.reset()
    generator = torch.Generator(device)
    function = torch.compile(lambda x: dx.sample_categorical(x, generator=generator).tokens, backend="aot_eager",
                             fullgraph=True)  # fmt: skip
    with pytest.raises(Exception, match=r"pass key=dimo_ext.random_key\(seed\)"):
        function(torch.zeros(2, 3, device=device))


@pytest.mark.filterwarnings("ignore:.*batching rule.*")
def test_gradient_through_vmap(device):
    """Vmap hides that its inputs require a gradient; the gradient of an outer backward is the loop's."""
    logits, targets = logits_of(device, count=1)[0], torch.zeros(2, 3, dtype=torch.int64, device=device)
    mapped, looped = (logits.clone().requires_grad_() for _ in range(2))
    torch.vmap(dx.masked_cross_entropy)(mapped, targets).sum().backward()
    sum(dx.masked_cross_entropy(z, t) for z, t in zip(looped, targets, strict=True)).backward()
    assert torch.equal(mapped.grad, looped.grad)


# --- names and backends ---------------------------------------------------------------------------------------------


def test_every_public_name_exists():
    """``__all__`` holds what the documentation promises, and nothing that is missing."""
    operators = (
        "token_divergence distribution_matching_loss divergence_gradient_ masked_cross_entropy sample_categorical "
        "reveal_ancestral reveal_confident mask_tokens init_tokens perturb_embeddings embed_and_perturb random_key "
        "fold_in use_backend "
        "build_info parse_divergence"
    )
    divergences = (
        "ForwardKL ReverseKL Jeffreys JensenShannon SquaredHellinger TotalVariation PearsonChi2 NeymanChi2 Alpha LeCam"
    )
    assert {*operators.split(), *divergences.split()} <= set(dx.__all__)
    assert all(hasattr(dx, name) for name in dx.__all__)


def test_an_unknown_backend_is_refused():
    """The message lists the choices."""
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'native', 'reference', got 'gpu'"):
        dx.use_backend("gpu").__enter__()


def test_backends_agree(device):
    """Whatever serves this device equals the reference: integers and masks exactly, the others nearly."""
    x = LogitsCase((8, 16), 300).build(device, 2)
    key = dx.random_key([*range(8)], 5, device=device)
    tokens = torch.arange(8 * 16, device=device).view(8, 16)
    calls = {
        "key": lambda: [dx.fold_in(key[0], 9), dx.fold_in(key, 2**32 - 1), dx.fold_in(key, tokens[:, :1] - 20)],
        "mask": lambda: dx.mask_tokens(tokens, 0.4, -1, key=key),
        "bernoulli": lambda: dx.mask_tokens(tokens, 0.4, -1, mode="bernoulli", key=key),
        "init": lambda: [dx.init_tokens(8, 16, vocab_size=1000, mask_id=-1, r_init=0.6, key=key)],
        "divergence": lambda: [dx.token_divergence(*x, "jensen_shannon")],
        "cross_entropy": lambda: [dx.masked_cross_entropy(x[0], tokens)],
        "embedding": lambda: [dx.perturb_embeddings(x[0], 0.3, key=key)],
    }
    for call in calls.values():
        served = call()
        with dx.use_backend("reference"):
            expected = call()
        for a, b in zip(served, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    sampled = dx.sample_categorical(x[0].repeat(1, 100, 1), key=key, top_p=0.9)
    with dx.use_backend("reference"):
        expected = dx.sample_categorical(x[0].repeat(1, 100, 1), key=key, top_p=0.9)
    assert (sampled.tokens != expected.tokens).sum() <= 1  # floating-point ties: at most 1 row in 10,000
