"""What Meissonic and aMUSEd share as teachers: prompts, micro-conditions, the negative prompt, image tokens."""

from __future__ import annotations

import dataclasses
import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dimo_ext.random import random_integers

from ..config import PromptsConfig
from ..data.encoded import EncodedPrompts, default_cache
from ..diffusers_layout import WEIGHT_FILES
from ..state_dicts import CheckpointError, locate
from ..text_encoder import EncodedText, LongPrompts, PromptEncoder
from ..tokenizers import DiffusersTokenizer
from .base import Condition, Teacher, perturbation

_ENCODER = ("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/*")
_AESTHETIC_SCORE = 6.0
EXAMPLES = (
    "a photograph of a red fox in the snow", "an oil painting of a harbour at dawn", "a bowl of fruit on a table",
    "a lighthouse on a cliff, watercolour", "a close-up of a hummingbird", "a street in the rain at night",
    "an astronaut reading a book", "a stained-glass window with a tree", "a castle of sand on a beach",
    "a still life with a violin",
)  # fmt: skip
_PIXELS = 16  # a token, along each side, in the released models


@dataclass(frozen=True)
class TextToImageSettings:
    """What a text-to-image model is evaluated with, besides tokens and prompts.

    ``micro_conditions`` are width and height of the image in pixels, top and left of the crop, aesthetic score.
    """

    grid_size: int
    micro_conditions: tuple[float, float, float, float, float]
    negative_prompt: str = ""
    long_prompts: LongPrompts = "truncate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "micro_conditions", tuple(map(float, self.micro_conditions)))  # JSON gives a list
        if not isinstance(self.grid_size, int) or self.grid_size < 1:
            raise ValueError(f"grid_size: expected an integer >= 1, got {self.grid_size!r}")
        if len(self.micro_conditions) != 5:
            raise ValueError(f"micro_conditions: expected 5 numbers, got {self.micro_conditions}")

    @classmethod
    def complete(cls, grid_size: int, micro_conditions: Sequence[float] | None, **given: Any) -> TextToImageSettings:
        """Fill in what is None: the micro-conditions of an uncropped square image of the size."""
        side = float(_PIXELS * grid_size)
        micro_conditions = micro_conditions or (side, side, 0.0, 0.0, _AESTHETIC_SCORE)
        return cls(grid_size, micro_conditions, **{name: value for name, value in given.items() if value is not None})


class TextToImageTeacher(Teacher):
    """A masked image model conditioned on CLIP's text states.

    ``condition`` is a dictionary: ``states`` ``[B, S, D]``, ``pooled`` ``[B, P]``, ``micro_conditions`` ``[B, 5]``. The
    null condition is the negative prompt.
    """

    published: ClassVar[bool] = True
    prompted: ClassVar[bool] = True
    hub_patterns: ClassVar[tuple[str, ...]] = (
        *(f"{part}/{name}" for part in ("transformer", "vqvae") for name in WEIGHT_FILES), *_ENCODER,
    )  # fmt: skip

    def __init__(self, network: nn.Module, settings: TextToImageSettings) -> None:
        super().__init__()
        self.network, self.settings = network, settings
        self.vocab_size, self.mask_id = network.config.codebook_size, network.config.vocab_size - 1
        self.seq_len = settings.grid_size**2
        self.encoder: PromptEncoder | None = None
        self.prompts: EncodedPrompts | None = None
        self._encode_on: torch.device | None = None  # None = where the network is
        self._negative: EncodedText | None = None

    @abstractmethod
    def evaluate(
        self, tokens_BHW: Tensor, condition: Condition, mask_ratio: Tensor | None, perturb: Callable | None
    ) -> Tensor:
        """Return logits ``[B, V, H, W]``; ``perturb`` goes over the token embeddings ``[B, H·W, D]``."""

    def logits(
        self,
        tokens_BL: Tensor,
        condition: Condition,
        *,
        mask_ratio: Tensor | None = None,
        embedding_noise: float = 0.0,
        embedding_noise_scale: str = "unit",
        key: Tensor | None = None,
    ) -> Tensor:
        """Return logits ``[B, L, V]``, a view of the network's ``[B, V, H, W]``."""
        perturb = None
        if embedding_noise > 0.0:
            table = self._embedded_ids() if embedding_noise_scale == "rms" else self.network.embed.embeddings.weight
            perturb = perturbation(table, embedding_noise, embedding_noise_scale, key)
        grid = (self.settings.grid_size, self.settings.grid_size)
        logits = self.evaluate(tokens_BL.unflatten(1, grid), condition, mask_ratio, perturb)
        return logits.flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _embedded_ids(self) -> Tensor:
        """Every id as the noise meets it: normed and projected.

        Without autocast, which would keep a cast of the weights that has no gradient.
        """
        with torch.autocast(self.device.type, enabled=False):
            return self.network.embed(torch.arange(self.mask_id + 1, device=self.device).view(1, 1, -1))

    # --- prompts ---

    def attach_encoder(self, folder: str | os.PathLike) -> None:
        """Make the text encoder and tokeniser of a released folder those that prompts go through."""
        self.encoder, self._negative = PromptEncoder(folder, long_prompts=self.settings.long_prompts), None

    def attach_prompts(self, prompts: Sequence[str], config: PromptsConfig) -> None:
        """Encode prompts, once, and make them those that :meth:`sample_condition` draws from.

        The encoder works on the CPU from then on: training needs the memory.
        """
        encoder, folder = self._encoder(), config.cache or default_cache()
        self.prompts = EncodedPrompts(prompts, encoder, folder, dtype=config.dtype, device=self.device)
        self._encode_on = torch.device("cpu")
        encoder.to(self._encode_on)

    def origin(self) -> dict[str, str]:
        """Return the fingerprint of the attached prompts and their encoder."""
        return {} if self.prompts is None else {"prompts": self.prompts.fingerprint}

    def condition(self, inputs: Sequence[str] | Condition) -> Condition:
        """Return the condition of prompts; a condition passes through.

        Raises:
            CheckpointError: prompts, and the model has no text encoder.
        """
        if isinstance(inputs, str):
            raise TypeError(f"prompts: expected a list of strings, got the string {inputs!r}")
        if isinstance(inputs, dict):
            return inputs
        different = list(dict.fromkeys(inputs))
        rows = torch.tensor([different.index(prompt) for prompt in inputs], device=self.device)
        return self._with_micro_conditions(EncodedText(*(tensor[rows] for tensor in self._encode(different))))

    def examples(self, count: int) -> list[str]:
        """Return the first of the attached prompts, else of some that ship with the package."""
        return list(dict.fromkeys(EXAMPLES if self.prompts is None else self.prompts.texts))[:count]

    def null_condition(self, batch_size: int) -> Condition:
        """Return the negative prompt's condition; it is encoded once."""
        if self._negative is None:
            self._negative = self._encode([self.settings.negative_prompt])
        rows = (tensor.to(self.device).expand(batch_size, *tensor.shape[1:]) for tensor in self._negative)
        return self._with_micro_conditions(EncodedText(*rows))

    def blank_condition(self, batch_size: int) -> Condition:
        """Return zeros for a prompt of CLIP's 77 tokens."""
        states, pooled = self.text_widths()
        text = EncodedText(
            *(torch.zeros(batch_size, *shape, device=self.device) for shape in ((77, states), (pooled,)))
        )
        return self._with_micro_conditions(text)

    @abstractmethod
    def text_widths(self) -> tuple[int, int]:
        """Return the channels of the text states and of the pooled vector."""

    def sample_condition(self, batch_size: int, key: Tensor) -> Condition:
        """Draw prompts uniformly from the attached ones.

        Raises:
            CheckpointError: none are attached.
        """
        if self.prompts is None:
            raise CheckpointError(f"prompts: kind {self.kind!r} needs some to train on, got none")
        return self._with_micro_conditions(self.prompts.rows(random_integers(key, batch_size, len(self.prompts))))

    def _encode(self, prompts: Sequence[str]) -> EncodedText:
        encoded = self._encoder().encode(prompts, device=self._encode_on or self.device)
        return EncodedText(*(tensor.to(self.device) for tensor in encoded))

    def _encoder(self) -> PromptEncoder:
        if self.encoder is None:
            raise CheckpointError("text_encoder: expected a folder with text_encoder and tokenizer, got none")
        return self.encoder

    def _with_micro_conditions(self, text: EncodedText) -> Condition:
        micro = torch.tensor(self.settings.micro_conditions, device=text.pooled.device)
        return {**text._asdict(), "micro_conditions": micro.expand(len(text.pooled), -1)}

    # --- files ---

    def network_config(self) -> dict[str, Any]:
        """Return the network's sizes and the settings."""
        settings = dataclasses.asdict(self.settings)
        settings["micro_conditions"] = list(self.settings.micro_conditions)
        return {"network": self.sizes(), **settings}

    @abstractmethod
    def sizes(self) -> dict[str, Any]:
        """Return the network's sizes under their published names."""

    def save_parts(self, folder: Path) -> None:
        """Copy the text encoder, so that the folder needs no other."""
        if self.encoder is not None:
            self.encoder.save(folder)

    def load_parts(self, folder: Path) -> None:
        """Take the folder's text encoder, if it has one."""
        if (folder / "text_encoder").is_dir():
            self.attach_encoder(folder)

    def load_released(
        self, folder: Path, tokenizer: str | os.PathLike | None, text_encoder: str | os.PathLike | None
    ) -> None:
        """Attach a released folder's image tokeniser and text encoder, or those given; it may have neither."""
        if tokenizer is not None or (folder / "vqvae").is_dir():
            self.attach(DiffusersTokenizer.from_original(folder if tokenizer is None else tokenizer))
        if text_encoder is not None or (folder / "text_encoder").is_dir():
            self.attach_encoder(folder if text_encoder is None else locate(text_encoder, _ENCODER))

    def frozen_parameters(self) -> list[str]:
        """The layers that ids go in and come out through, as in the official Di[M]O recipe."""
        return [
            name for name, _ in self.named_parameters() if name.startswith(("network.embed.", "network.mlm_layer."))
        ]
