"""The VQGANs of taming-transformers and LlamaGen against the originals' outputs."""

import pytest
import torch
from safetensors.torch import save_file

from dimo.networks.vqgan import VQGANConfig
from dimo.state_dicts import CheckpointError
from dimo.tokenizers import VQGANTokenizer
from tests.golden import FIXTURES, Golden

TAMING, LLAMAGEN = FIXTURES / "vqgan" / "last.ckpt", FIXTURES / "halton" / "vq_ds16_c2i.pt"
SIZES = {"codebook_size": 5, "embed_dim": 4, "z_channels": 4, "channels": (32,), "attention": (False,), "blocks": 1}


def assert_golden(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vqgan_decoder", "llamagen_vq_levels"])
def test_decoders_alone(name, tmp_path):
    """Shortcut convolutions, norms over two channels a group; two resolutions under LlamaGen's names."""
    golden = Golden(name)
    save_file(golden.state, tmp_path / "vq.safetensors")
    tokenizer = VQGANTokenizer.from_original(tmp_path / "vq.safetensors")
    assert_golden(tokenizer.network.decode(golden["in.codes"]), golden["out.image"])
    with pytest.raises(CheckpointError, match="expected an encoder, found a decoder alone"):
        VQGANTokenizer.from_original(tmp_path / "vq.safetensors", encoder=True)


@pytest.mark.parametrize(
    ("path", "outputs"), [(TAMING, "vqgan_full_outputs"), (LLAMAGEN, "llamagen_vq_container_outputs")]
)
def test_containers(path, outputs):
    """Codes to images and back, in the released layouts."""
    golden = Golden(outputs)
    network = VQGANTokenizer.from_original(path, encoder=True).network
    assert_golden(network.decode(golden["in.codes"]), golden["out.image"])
    assert torch.equal(network.encode(golden["in.image"]).flatten(), golden["out.encode_ids"])
    assert_golden(network.quantize(golden["in.codes"]).permute(0, 3, 1, 2), golden["out.quant"])
    assert_golden(network.quant_conv(network.encoder(golden["in.image"])), golden["out.encode_prequant"])
    if "in.codes_rect" in golden:
        assert_golden(network.decode(golden["in.codes_rect"]), golden["out.image_rect"])


def test_images_become_tokens_and_images_again():
    golden = Golden("vqgan_full_outputs")
    tokenizer = VQGANTokenizer.from_original(FIXTURES / "vqgan", encoder=True)
    tokens = tokenizer.encode((golden["in.image"] + 1) / 2)
    assert torch.equal(tokens.flatten(), golden["out.encode_ids"])
    assert_golden(tokenizer.decode(tokens), (golden["out.recon"] / 2 + 0.5).clamp(0, 1))


def test_the_encoder_is_left_out_unless_asked_for():
    names = {True: None, False: None}
    for encoder in names:
        names[encoder] = set(VQGANTokenizer.from_original(TAMING, encoder=encoder).state_dict())
    gone = names[True] - names[False]
    assert names[False] < names[True]
    assert {name.split(".")[1] for name in gone} == {"encoder", "quant_conv"}
    assert not any("loss" in name for name in names[True])


def test_build_from_network_config_is_the_same_network():
    tokenizer = VQGANTokenizer.from_original(LLAMAGEN)
    again = VQGANTokenizer.build(tokenizer.network_config())
    again.load_state_dict(tokenizer.state_dict())
    tokens = torch.arange(16)[None]
    assert torch.equal(again.decode(tokens), tokenizer.decode(tokens))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"blocks": 0}, "blocks: expected an integer >= 1, got 0"),
        ({"channels": (48,)}, r"channels: expected multiples of 32, the groups of a norm, got \(48,\)"),
        ({"channels": ()}, "channels: expected multiples of 32"),
        ({"attention": (False, True)}, "attention: expected 1 entries, as channels"),
    ],
)
def test_sizes_that_no_network_has(sizes, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**SIZES | sizes)
