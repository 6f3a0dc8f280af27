"""The released schedulers' recorded runs, and the samplers that follow them (tests/fixtures/README.md)."""

import pytest
import torch

import dimo_ext
from dimo.networks.maskgit import MaskGITConfig, MaskTransformer
from dimo.networks.mdlm import MDLMConfig, MDLMTransformer
from dimo.published_samplers import amused_plan, sample_amused, sample_mdlm
from dimo.samplers import sample_ancestral
from dimo.schedules import mask_ratio
from dimo.teachers import MaskGITTeacher, MDLMTeacher
from dimo_ext.reference import reveal
from tests.golden import Golden

RUNS = [("amused", 0), ("amused", 1), ("meissonic", 0), ("meissonic", 1)]


@pytest.fixture(params=RUNS, ids=lambda run: f"{run[0]}-{run[1]}")
def run(request):
    """A recorded run: (its tensors without the prefix, its arguments, mask id)."""
    name, number = request.param
    golden = Golden(f"scheduler_{name}")
    tensors = {key.replace(f"run{number}.", ""): value for key, value in golden.items() if f".run{number}." in key}
    return tensors, golden.constructor["runs"][number], golden.constructor["mask_token_id"]


def counts_of(arguments, masked, length):
    """How many tokens each step reveals of each sample, and the noise's scale; a number falls to 0.01."""
    given, starting = arguments["temperature"], arguments["starting"]
    pair = tuple(given) if isinstance(given, list) else (given, 0.01)
    plans = [
        amused_plan(arguments["masking_schedule"], arguments["steps"], n, pair, of=length * starting)
        for n in masked.tolist()
    ]
    return [(torch.tensor([count for count, _ in step]), step[0][1]) for step in zip(*plans, strict=True)]


def test_recorded_runs(run, monkeypatch):
    """Every step of every run: tokens equal, given the recorded logits and draws."""
    tensors, arguments, mask_id = run
    tokens = tensors["in.first_sample"].flatten(1)
    masked = (tokens == mask_id).sum(1)
    for step, (counts, scale) in enumerate(counts_of(arguments, masked, tokens.shape[1])):
        assert torch.equal(tokens, tensors[f"out.step{step}.sample_in"].flatten(1))
        assert scale == pytest.approx(tensors["out.temperatures"][step].item(), abs=1e-6)
        logits, drawn = (
            tensors[f"in.step{step}.model_output"].flatten(2).transpose(1, 2),
            tensors[f"in.step{step}.multinomial"],
        )
        log_prob = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        uniform = tensors.get(f"in.step{step}.uniform", torch.full(drawn.shape, 0.5)).double()  # the last draws none
        monkeypatch.setattr(reveal, "sample_categorical", lambda *_, draw=(drawn, log_prob): draw)
        monkeypatch.setattr(reveal, "uniform", lambda _, noise=uniform: noise)
        with dimo_ext.use_backend("reference"):
            key = dimo_ext.random_key(0)
            tokens = dimo_ext.reveal_confident(logits, tokens, counts, mask_id, noise_scale=scale, key=key)
        assert torch.equal(tokens, tensors[f"out.step{step}.prev_sample"].flatten(1))
    assert (tokens != mask_id).all()


def test_recorded_forward_process(run):
    """The schedules are ours: a token is masked where its draw lies below the ratio."""
    tensors, arguments, mask_id = run
    names = [name for name in tensors if name.endswith(".rand")]
    assert len(names) == 2
    for name in names:
        step = (
            arguments["steps"] - 1 - tensors["out.timesteps"][int(name.split(".")[1].removeprefix("add_noise"))].item()
        )
        ratio = mask_ratio(arguments["masking_schedule"], torch.tensor(1 - (step + 1) / arguments["steps"]))
        expected = tensors[name.replace("in.", "out.").replace(".rand", ".out")]
        assert torch.equal(torch.where(tensors[name] < ratio, mask_id, tensors["in.clean"]), expected)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = MaskTransformer(MaskGITConfig(4, 11, 3, width=16, depth=1, heads=2, mlp_width=32))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return MaskGITTeacher(network).eval().requires_grad_(False)


@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_amused_reveals_all_and_keeps_what_it_revealed(steps, model, monkeypatch):
    seen, plain = [], model.logits
    monkeypatch.setattr(
        model, "logits", lambda tokens, *args, **kw: seen.append(tokens[:3]) or plain(tokens, *args, **kw)
    )
    tokens = sample_amused(model, torch.arange(3), steps=steps, guidance_scale=2.0, key=dimo_ext.random_key(1))
    assert len(seen) == steps
    assert ((tokens >= 0) & (tokens < 11)).all()
    for before, after in zip(seen, [*seen[1:], tokens], strict=True):
        known = before != model.mask_id
        assert torch.equal(before[known], after[known])
        assert (after == model.mask_id).sum(1).unique().numel() == 1


def test_amused_refuses_greedy_draws(model):
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        sample_amused(model, torch.arange(2), steps=3, temperature=0.0, key=dimo_ext.random_key(0))


@pytest.mark.parametrize("per_sample", [False, True])
def test_amused_is_a_function_of_the_key(per_sample, model):
    """And with a key a sample, of nothing else."""
    labels = torch.arange(3)
    keys = dimo_ext.random_key([1, 2, 3]) if per_sample else dimo_ext.random_key(1)
    whole = sample_amused(model, labels, steps=4, key=keys)
    assert torch.equal(whole, sample_amused(model, labels, steps=4, key=keys))
    if per_sample:
        parts = [sample_amused(model, labels[i : i + 1], steps=4, key=keys[i : i + 1]) for i in range(3)]
        assert torch.equal(whole, torch.cat(parts))


@pytest.fixture(scope="module")
def text_model():
    torch.manual_seed(0)
    network = MDLMTransformer(MDLMConfig(9, 12, 16, 1, 2, 8))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return MDLMTeacher(network).eval().requires_grad_(False)


@pytest.mark.parametrize("steps", [1, 3, 12, 500])
def test_mdlm_draws_as_ancestral_sampling_with_fewer_evaluations(steps, text_model, monkeypatch):
    condition, key, calls, plain = text_model.condition(2), dimo_ext.random_key(4), [], text_model.logits
    expected = sample_ancestral(text_model, condition, steps=steps, mask_schedule="linear", key=key)

    def counted(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(text_model, "logits", counted)
    assert torch.equal(sample_mdlm(text_model, condition, steps=steps, key=key), expected)
    assert len(calls) <= min(steps, 2 * text_model.seq_len)
    if steps == 1:
        assert len(calls) == 1
