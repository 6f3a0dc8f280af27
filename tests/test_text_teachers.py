"""Meissonic, aMUSEd and MDLM as teachers: released folders, golden outputs through the protocol, prompts."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.autograd.graph import saved_tensors_hooks

import dimo
import dimo_ext
from dimo.checkpoint import load_model, save_model
from dimo.config import DistillConfig, MethodConfig, PromptsConfig, RunConfig
from dimo.guidance import guided_logits
from dimo.memory import training_memory
from dimo.state_dicts import CheckpointError
from dimo.teachers import MDLMTeacher
from dimo.tokenizers import DiffusersTokenizer, TextTokenizer
from tests.golden import FIXTURES, Golden
from tests.released import gpt2_like, released, text_encoder

pytest.importorskip("diffusers", reason="image tokenisers and aMUSEd need dimo-ext[hub]")

GOLDEN = {"meissonic": "meissonic_transformer_1024layout", "amused": "amused_uvit2d"}
WIDTHS = {"meissonic": (24, 32), "amused": (20, 24)}  # of text states and pooled vector
KINDS = list(GOLDEN)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    states, pooled = WIDTHS[kind]
    return text_encoder(released(kind, tmp_path_factory.mktemp(kind)), states=states, pooled=pooled)


@pytest.fixture
def teacher(kind, folder):
    return dimo.load_teacher(kind, folder, grid_size=8, negative_prompt="ugly")


@pytest.fixture(scope="module")
def golden(kind):
    return Golden(GOLDEN[kind])


@pytest.fixture(scope="module")
def condition(kind, golden):
    names = {
        "meissonic": ("encoder_hidden_states", "pooled_projections"),
        "amused": ("encoder_hidden_states", "pooled_text_emb"),
    }
    states, pooled = (golden[f"in.{name}"] for name in names[kind])
    return {"states": states, "pooled": pooled, "micro_conditions": golden["in.micro_conds"]}


@pytest.fixture(scope="module")
def tokens(kind, golden):
    return golden["in.hidden_states" if kind == "meissonic" else "in.input_ids"].flatten(1)


@pytest.fixture(scope="module")
def expected(kind, golden):
    """Logits ``[B, L, V]``, for Meissonic at the golden ratios."""
    logits = golden["out.logits_timestep_ratio" if kind == "meissonic" else "out.logits"]
    return logits.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def ratio(kind, golden):
    return golden["in.timestep_ratio"] if kind == "meissonic" else torch.rand(2)


# --- text to image ---


def test_logits_are_the_original_s(teacher, tokens, condition, ratio, expected):
    logits = teacher.logits(tokens, condition, mask_ratio=ratio)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_sizes(kind, teacher):
    assert (teacher.kind, teacher.vocab_size, teacher.mask_id, teacher.seq_len) == (kind, 32, 33, 64)
    assert teacher.settings.micro_conditions == (128.0, 128.0, 0.0, 0.0, 6.0)
    assert len(teacher.layers()) == {"meissonic": 4, "amused": 2}[kind]


def test_logits_are_a_view_of_the_network_s(teacher, tokens, condition, ratio, monkeypatch):
    """No copy stands between the head and the operators."""
    outputs, plain = [], teacher.evaluate
    monkeypatch.setattr(teacher, "evaluate", lambda *args: outputs.append(plain(*args)) or outputs[-1])
    logits = teacher.logits(tokens, condition, mask_ratio=ratio)
    assert outputs[0].shape == (2, 32, 8, 8)
    assert logits.data_ptr() == outputs[0].data_ptr()
    assert logits.shape == (2, 64, 32)


def test_guidance_leads_away_from_the_negative_prompt(teacher, tokens, ratio):
    condition = teacher.condition(["a cat", "zebra"])
    cond, uncond = guided_logits(teacher, tokens, condition, 3.0, mask_ratio=ratio)
    torch.testing.assert_close(cond, teacher.logits(tokens, condition, mask_ratio=ratio), rtol=0, atol=1e-5)
    negative = teacher.logits(tokens, teacher.condition(["ugly", "ugly"]), mask_ratio=ratio)
    torch.testing.assert_close(uncond, negative, rtol=0, atol=1e-5)
    assert (cond - uncond).abs().max() > 1e-3


def test_embedding_noise(kind, teacher, golden, tokens, condition, ratio):
    """Noise of the released size on what ids become before positions mix; as large as those if so asked."""
    key = dimo_ext.random_key(3)
    plain = teacher.logits(tokens, condition, mask_ratio=ratio)
    unit = teacher.logits(tokens, condition, mask_ratio=ratio, embedding_noise=0.3, key=key)
    rms = teacher.logits(tokens, condition, mask_ratio=ratio, embedding_noise=0.3, embedding_noise_scale="rms", key=key)
    embedded = teacher._embedded_ids()
    scale = embedded.square().mean().sqrt()
    assert not torch.allclose(unit, rms)
    assert not torch.allclose(unit, plain)

    def replaced(_module, _inputs, output):
        channels_last = output if kind == "meissonic" else output.permute(0, 2, 3, 1)
        rows = channels_last.flatten(1, 2)
        noisy = dimo_ext.perturb_embeddings(rows, 0.3, scale=scale, key=key).view_as(channels_last)
        return noisy if kind == "meissonic" else noisy.permute(0, 3, 1, 2)

    with teacher.network.embed.register_forward_hook(replaced):
        torch.testing.assert_close(teacher.logits(tokens, condition, mask_ratio=ratio), rms, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", ["unit", "rms"])
def test_embedding_noise_under_autocast_leaves_every_gradient(scale, teacher, tokens, condition, ratio):
    """Measuring the embeddings keeps no cast of their weights without a gradient."""
    teacher.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = teacher.logits(
            tokens, condition, mask_ratio=ratio, embedding_noise=0.3, embedding_noise_scale=scale,
            key=dimo_ext.random_key(0),
        )  # fmt: skip
    logits.float().square().mean().backward()
    assert all(p.grad is not None for p in teacher.parameters())


def test_decode_gives_images(teacher, tokens):
    images = teacher.decode(tokens.clamp(max=31))
    assert images.shape == (2, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1


def test_image_tokeniser_is_the_original_s(kind, tmp_path):
    """The released decoder; its images are clipped as the pipelines do."""
    tokenizer = DiffusersTokenizer.from_original(released(kind, tmp_path, codes=24))
    golden = Golden("diffusers_vqmodel")
    images = tokenizer.decode(golden["in.codes"].flatten(1))
    torch.testing.assert_close(images, golden["out.image"].clamp(0, 1), rtol=0, atol=1e-4)
    assert (golden["out.image"] > 1).any()  # else clipping would not show
    with pytest.raises(ValueError, match="square number of positions, got 15"):
        tokenizer.decode(golden["in.codes_rect"].flatten(1))


def test_frozen_parameters_are_the_layers_of_ids(teacher):
    names = teacher.frozen_parameters()
    assert set(names) < {name for name, _ in teacher.named_parameters()}
    assert {name.split(".")[1] for name in names} == {"embed", "mlm_layer"}
    assert len(names) == 6


def test_recomputing_gives_the_same_gradients(teacher, tokens, condition, ratio, folder, kind):
    def gradients(recompute):
        model = dimo.load_teacher(kind, folder, grid_size=8).requires_grad_(True)
        if recompute:
            model.checkpoint_activations()
            model.checkpoint_activations()  # once more changes nothing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = model.logits(tokens, condition, mask_ratio=ratio).square().mean()
        loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, sum(kept)

    (plain, kept), (recomputed, kept_less) = gradients(recompute=False), gradients(recompute=True)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)
    assert kept_less < 0.8 * kept


def test_a_folder_of_ours_holds_all_that_is_needed(kind, teacher, tokens, ratio, tmp_path):
    """Network, settings, image tokeniser, text encoder: after the original is gone too."""
    save_model(tmp_path / "model", teacher, "dimo.teacher")
    again, _ = load_model(tmp_path / "model")
    assert again.settings == teacher.settings
    condition = teacher.condition(["a cat", "zebra"])
    expected = teacher.logits(tokens, condition, mask_ratio=ratio)
    assert torch.equal(again.logits(tokens, again.condition(["a cat", "zebra"]), mask_ratio=ratio), expected)
    assert torch.equal(again.decode(tokens.clamp(max=31)), teacher.decode(tokens.clamp(max=31)))
    assert torch.equal(again.null_condition(2)["states"], teacher.null_condition(2)["states"])
    assert type(dimo.load_teacher(tmp_path / "model")) is type(teacher)


def test_prompts_are_drawn_by_key(teacher, tmp_path):
    with pytest.raises(CheckpointError, match=r"prompts: kind .* needs some to train on, got none"):
        teacher.sample_condition(2, dimo_ext.random_key(0))
    prompts = ["a cat", "a dog", "zebra"]
    teacher.attach_prompts(prompts, PromptsConfig(cache=str(tmp_path), dtype="float32"))
    drawn = teacher.sample_condition(200, dimo_ext.random_key(5))
    assert drawn["micro_conditions"].tolist() == [list(teacher.settings.micro_conditions)] * 200
    pooled = teacher.condition(prompts)["pooled"]
    distance = torch.cdist(drawn["pooled"], pooled)
    assert distance.min(1).values.max() < 1e-2
    assert distance.argmin(1).bincount(minlength=3).min() > 40
    again = teacher.sample_condition(200, dimo_ext.random_key(5))
    assert all(torch.equal(again[name], drawn[name]) for name in drawn)


# --- what does not fit ---


def test_a_tokeniser_of_too_few_codes_is_refused(kind, tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer: expected one of 32 tokens, as the model has, got 24"):
        dimo.load_teacher(kind, released(kind, tmp_path, codes=24))


@pytest.mark.parametrize("part", ["text_encoder", "vqvae"])
def test_parts_may_lie_elsewhere(part, kind, folder, tmp_path):
    """As Di[M]O's release has the transformer alone; without a part, what needs it says so."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    for name in ("text_encoder", "tokenizer", "vqvae"):
        shutil.rmtree(bare / name)
    model = dimo.load_teacher(kind, bare, grid_size=8)
    with pytest.raises(CheckpointError, match="tokenizer: this model of kind"):
        model.decode(torch.zeros(1, 64, dtype=torch.int64))
    for call in (lambda: model.condition(["a cat"]), lambda: model.null_condition(1)):
        with pytest.raises(
            CheckpointError, match=r"text_encoder: expected a folder with text_encoder and tokenizer, got none"
        ):
            call()
    options = {"text_encoder": {"text_encoder": folder}, "vqvae": {"tokenizer": folder / "vqvae"}}[part]
    model = dimo.load_teacher(kind, bare, grid_size=8, **options)
    assert (model.encoder is not None, model.tokenizer is not None) == (part == "text_encoder", part == "vqvae")


def test_foreign_and_broken_folders_are_one_error(kind, folder, tmp_path):
    other = {"meissonic": "amused", "amused": "meissonic"}[kind]
    with pytest.raises(CheckpointError, match=r"transformer.config\.json: expected class .*, got '(Transf|UVit)"):
        dimo.load_teacher(other, folder)
    with pytest.raises(
        CheckpointError, match=r"transformer: expected a diffusers folder with transformer/config\.json"
    ):
        dimo.load_teacher(kind, tmp_path)
    with pytest.raises(CheckpointError, match="teacher colour: no option of kind"):
        dimo.load_teacher(kind, folder, colour="red")
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        dimo.load_teacher(kind, broken)
    config = broken / "transformer" / "config.json"
    name = {"meissonic": "num_layers", "amused": "num_hidden_layers"}[kind]
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: 1}))
    shutil.copy(folder / "transformer" / weights.name, weights)
    with pytest.raises(CheckpointError, match=r"does not fit the network: unexpected transformer_\w+\.1\."):
        dimo.load_teacher(kind, broken)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid_size": 0}, "grid_size: expected an integer >= 1, got 0"),
        ({"micro_conditions": (1.0, 2.0)}, "micro_conditions: expected 5 numbers"),
        ({"timestep": "step"}, "timestep: expected one of mask_ratio, scaled_mask_ratio, zero, got 'step'"),
    ],
)
def test_settings_are_checked(options, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        dimo.load_teacher("meissonic", released("meissonic", tmp_path), **({"grid_size": 8} | options))


def test_prompts_are_a_list(teacher):
    with pytest.raises(TypeError, match="prompts: expected a list of strings, got the string 'a cat'"):
        teacher.condition("a cat")


# --- Meissonic's timestep ---


@pytest.mark.parametrize(
    ("timestep", "given", "expected"),
    [
        ("mask_ratio", "ratio", "ratio"),
        ("zero", "ratio", "zero"),
        ("zero", None, "zero"),
        ("scaled_mask_ratio", "milli", "ratio"),
    ],
)
def test_timestep(timestep, given, expected, tmp_path):
    """The ratio, the 0 of Di[M]O's release whatever the ratio, and 1000 times the ratio."""
    golden = Golden(GOLDEN["meissonic"])
    ratio = {None: None, "ratio": golden["in.timestep_ratio"], "milli": golden["in.timestep_ratio"] / 1000}[given]
    model = dimo.load_teacher("meissonic", released("meissonic", tmp_path), grid_size=8, timestep=timestep)
    condition = {"states": golden["in.encoder_hidden_states"], "pooled": golden["in.pooled_projections"],
                 "micro_conditions": golden["in.micro_conds"]}  # fmt: skip
    logits = model.logits(golden["in.hidden_states"].flatten(1), condition, mask_ratio=ratio)
    wanted = golden[f"out.logits_timestep_{expected}"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


def test_timestep_needs_a_ratio(tmp_path):
    model = dimo.load_teacher("meissonic", released("meissonic", tmp_path), grid_size=8)
    golden = Golden(GOLDEN["meissonic"])
    condition = {"states": golden["in.encoder_hidden_states"], "pooled": golden["in.pooled_projections"],
                 "micro_conditions": golden["in.micro_conds"]}  # fmt: skip
    with pytest.raises(ValueError, match=r"mask_ratio: expected \[B\] for timestep 'mask_ratio', got None"):
        model.logits(golden["in.hidden_states"].flatten(1), condition)


@pytest.mark.parametrize("grid_size", [None, 5])
def test_grid_of_the_layout(grid_size, tmp_path):
    """64 where the network halves it, 32 elsewhere, unless one is given."""
    folder = released("meissonic", tmp_path)
    if grid_size is None:
        assert dimo.load_teacher("meissonic", folder).settings.grid_size == 64
        assert dimo.load_teacher("meissonic", folder).settings.micro_conditions == (1024.0, 1024.0, 0.0, 0.0, 6.0)
    else:
        assert dimo.load_teacher("meissonic", folder, grid_size=grid_size).seq_len == 25


# --- MDLM ---


@pytest.fixture
def mdlm_folder(tmp_path):
    return released("mdlm", tmp_path / "mdlm")


@pytest.mark.parametrize("file", ["", "lightning_ema.ckpt"])
def test_mdlm_logits_are_the_original_s(file, mdlm_folder):
    """From the released layout, and from the moving average of a training checkpoint."""
    golden = Golden("mdlm_dit")
    model = dimo.load_teacher("mdlm", mdlm_folder / file, **({"seq_len": 12} if file else {}))
    assert (model.vocab_size, model.mask_id, model.seq_len) == (28, 28, 12)
    logits = model.logits(golden["in.indices"], model.condition(3), mask_ratio=torch.rand(3))
    torch.testing.assert_close(logits, golden["out.logits_raw_sigma0"][..., :28], rtol=0, atol=1e-4)


def test_mdlm_with_time_conditioning(mdlm_folder):
    """The noise level of a mask ratio is the log-linear schedule's."""
    golden = Golden("mdlm_dit")
    config = json.loads((mdlm_folder / "config.json").read_text())
    (mdlm_folder / "config.json").write_text(json.dumps(config | {"time_conditioning": True}))
    model, sigma = dimo.load_teacher("mdlm", mdlm_folder), golden["in.sigma"]
    ratio = (1 - torch.exp(-sigma)) / (1 - 1e-3)
    logits = model.logits(golden["in.indices"], model.condition(3), mask_ratio=ratio)
    torch.testing.assert_close(logits, golden["out.logits_raw_sigma"][..., :28], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"mask_ratio: expected .* time conditioning, got None"):
        model.logits(golden["in.indices"], model.condition(3))


def test_mdlm_has_no_condition(mdlm_folder):
    model = dimo.load_teacher("mdlm", mdlm_folder)
    assert model.condition(3).shape == (3,)
    assert model.sample_condition(2, dimo_ext.random_key(0)).tolist() == [0, 0]
    tokens = torch.full((2, 12), model.mask_id)
    with pytest.raises(ValueError, match="guidance_scale: expected 1 for kind 'mdlm'"):
        guided_logits(model, tokens, model.condition(2), 2.0)
    assert model.frozen_parameters() == ["network.vocab_embed.embedding"]


def test_mdlm_texts(mdlm_folder, tmp_path):
    """Through a tokeniser of transformers, which a folder of ours keeps."""
    path = gpt2_like(tmp_path / "tokenizer", 28)
    model = dimo.load_teacher("mdlm", mdlm_folder, tokenizer=path)
    tokens = torch.tensor([[0, 1, 2, 27], [3, 3, 26, 0]])
    texts = model.decode(tokens)
    assert texts == ["abc ", "ddAa"]
    save_model(tmp_path / "model", model, "dimo.teacher")
    shutil.rmtree(path)
    again = dimo.load_teacher(tmp_path / "model")
    assert isinstance(again, MDLMTeacher)
    assert again.decode(tokens) == texts
    with pytest.raises(CheckpointError, match="tokenizer: expected a folder of a transformers tokeniser, got"):
        TextTokenizer.from_original(tmp_path / "nowhere")


def test_mdlm_refuses_other_files(mdlm_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"mdlm: expected a folder with config\.json and model\.safetensors"):
        dimo.load_teacher("mdlm", FIXTURES)
    config = json.loads((mdlm_folder / "config.json").read_text())
    (mdlm_folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(CheckpointError, match="expected model_type mdlm, got 'bert'"):
        dimo.load_teacher("mdlm", mdlm_folder)
    torch.save({"epoch": 1}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="expected Lightning's state_dict, found none"):
        dimo.load_teacher("mdlm", tmp_path / "a.ckpt")
    content = torch.load(mdlm_folder / "lightning_ema.ckpt", weights_only=True)
    content["ema"]["shadow_params"] = content["ema"]["shadow_params"][1:]
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(CheckpointError, match=r"expected ema\.shadow_params of 30 tensors shaped as the network's"):
        dimo.load_teacher("mdlm", tmp_path / "b.ckpt")
    torch.save({"state_dict": {"module.x": torch.zeros(2)}}, tmp_path / "c.ckpt")
    with pytest.raises(CheckpointError, match=r"expected weights named backbone\.\*, found module\.x"):
        dimo.load_teacher("mdlm", tmp_path / "c.ckpt")


def test_the_encoder_stays_off_the_device_that_trains(teacher, tmp_path, monkeypatch):
    """Where it works: with the network, until training needs the memory."""
    devices, plain = [], teacher.encoder.encode
    monkeypatch.setattr(
        teacher.encoder, "encode", lambda *args, device="cpu": devices.append(str(device)) or plain(*args)
    )
    monkeypatch.setattr(type(teacher), "device", torch.device("cpu", 0))
    teacher.condition(["a cat"])
    teacher.attach_prompts(["a cat", "zebra"], PromptsConfig(cache=str(tmp_path)))
    teacher.condition(["a cat"])
    assert devices == ["cpu:0", "cpu:0", "cpu"]


def test_the_layout_of_512_pixels(tmp_path):
    """No halving of the grid; the configuration tells."""
    golden = Golden("meissonic_transformer_512layout")
    folder = tmp_path / "transformer"
    folder.mkdir()
    sizes = {name: value for name, value in golden.constructor.items() if name != "grid"}
    (folder / "config.json").write_text(json.dumps({"_class_name": "Transformer2DModel"} | sizes))
    save_file(golden.state, folder / "diffusion_pytorch_model.safetensors")
    model = dimo.load_teacher("meissonic", tmp_path, grid_size=4)
    condition = {"states": golden["in.encoder_hidden_states"], "pooled": golden["in.pooled_projections"],
                 "micro_conditions": golden["in.micro_conds"]}  # fmt: skip
    logits = model.logits(golden["in.hidden_states"].flatten(1), condition, mask_ratio=golden["in.timestep_ratio"])
    wanted = golden["out.logits_timestep_ratio"].flatten(2).transpose(1, 2)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    assert dimo.load_teacher("meissonic", tmp_path).settings.micro_conditions == (512.0, 512.0, 0.0, 0.0, 6.0)


def test_weights_in_parts(tmp_path):
    """As diffusers writes large ones: an index beside them."""
    whole = released("meissonic", tmp_path / "whole")
    parts = shutil.copytree(whole, tmp_path / "parts") / "transformer"
    state = Golden(GOLDEN["meissonic"]).state
    names = sorted(state)
    files = {n: f"diffusion_pytorch_model-0000{1 + (n > names[40])}-of-00002.safetensors" for n in names}
    for file in set(files.values()):
        save_file({n: state[n] for n in names if files[n] == file}, parts / file)
    (parts / "diffusion_pytorch_model.safetensors").unlink()
    (parts / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    a, b = (dimo.load_teacher("meissonic", path) for path in (whole, tmp_path / "parts"))
    assert all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["meissonic", "amused", "mdlm"])
def test_the_memory_estimate_counts_what_autograd_keeps(name, precision, tmp_path):
    """Activations on tensors without memory against those of a real forward pass; recomputed ones are fewer."""
    model = dimo.load_teacher(name, released(name, tmp_path), **({} if name == "mdlm" else {"grid_size": 8}))
    run = RunConfig(output="unused", batch_size=5, precision=precision)
    method = MethodConfig(fresh_auxiliary_batch=True, guidance_scale=1.0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    model.requires_grad_(True)
    tokens, half = torch.full((5, model.seq_len), model.mask_id), precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half), saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model.logits(tokens, model.blank_condition(5), mask_ratio=torch.full((5,), 0.5))
    model.requires_grad_(False)
    kept = sum(t.untyped_storage().nbytes() for pointer, t in storages.items() if pointer not in weights)
    parts = training_memory(model, DistillConfig(run=run, method=method))
    assert parts["activations"] == pytest.approx(kept, rel=0.03)
    assert parts["logits and their gradients"] == 5 * logits.numel() * logits.element_size()
    less = DistillConfig(run=dataclasses.replace(run, activation_checkpointing=True), method=method)
    assert training_memory(model, less)["activations"] < 0.9 * kept
