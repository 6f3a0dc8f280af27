"""Typed, frozen configurations: every default lives here once; YAML files and command-line flags fill them.

The default of a new key is what was done before there was one: runs from that time go on with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dimo_ext

from .config_files import ConfigError as ConfigError
from .config_files import check as _check
from .config_files import from_dict as from_dict
from .config_files import load_config as load_config
from .config_files import to_dict as to_dict
from .schedules import MASK_SCHEDULES, TRAINING_ONLY


def _check_seed(seed: int) -> None:
    _check(0 <= seed < 2**32, "seed", "an integer in [0, 2^32)", seed)


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a teacher's transformer."""

    width: int = 64
    """Channels of the residual stream; a multiple of heads."""
    depth: int = 4
    """Transformer layers."""
    heads: int = 2
    """Attention heads."""
    mlp_width: int = 256
    """Hidden channels of the feed-forward layers."""
    dropout: float = 0.0
    """Dropout probability in training, in [0, 1)."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "mlp_width"):
            _check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        _check(self.width % self.heads == 0, "width", f"a multiple of heads ({self.heads})", self.width)
        _check(0.0 <= self.dropout < 1.0, "dropout", "a number in [0, 1)", self.dropout)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Adam when weight_decay is 0) with warm-up, decay and gradient clipping."""

    learning_rate: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = 1e-8
    """Added to the denominator; 1e-6 for bfloat16 training."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 20
    """Steps of linear warm-up from 0."""
    decay: Literal["constant", "cosine"] = "cosine"
    """What follows the warm-up."""
    final_fraction: float = 0.05
    """Learning rate at the end of a cosine decay, as a fraction of the peak."""
    clip_norm: float | None = None
    """Clip the gradient's global norm to this value; None = off."""

    def __post_init__(self) -> None:
        _check(0 < self.learning_rate < math.inf, "learning_rate", "a finite number > 0", self.learning_rate)
        _check(all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)", self.betas)
        _check(self.eps > 0, "eps", "a number > 0", self.eps)
        _check(self.weight_decay >= 0, "weight_decay", "a number >= 0", self.weight_decay)
        _check(self.warmup_steps >= 0, "warmup_steps", "an integer >= 0", self.warmup_steps)
        _check(0 <= self.final_fraction <= 1, "final_fraction", "a number in [0, 1]", self.final_fraction)
        _check(self.clip_norm is None or self.clip_norm > 0, "clip_norm", "None or a number > 0", self.clip_norm)


@dataclass(frozen=True)
class RunConfig:
    """The training loop: length, batch, seed, where results go and how often."""

    output: str
    """Folder of the run: checkpoint, log, pictures, results. The same command goes on from its checkpoint."""
    steps: int = 1000
    """Training steps."""
    batch_size: int = 64
    """Samples a forward pass."""
    accumulation_steps: int = 1
    """Batches whose gradients are averaged into one update: a step sees this many times batch_size samples."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """"bfloat16" evaluates the networks under autocast; trained weights, averages and optimisers stay float32."""
    compile: bool = False
    """Run the networks' layers through torch.compile: the first step takes longer, the others less time."""
    cuda_graph: bool = False
    """Record a distillation step on a GPU once and replay it: faster where launching kernels takes longer than running
    them, in small networks and batches. The step's memory stays taken."""
    activation_checkpointing: bool = False
    """Recompute the layers' activations in the backward pass: less memory for one more evaluation of the layers."""
    seed: int = 0
    """Seed of every random choice of the run."""
    ema_decay: float = 0.99
    """Decay d of the weights' exponential moving average, min(d, (1+n)/(10+n)) at step n."""
    log_every: int = 10
    """Steps between log lines; between them nothing synchronises with the device."""
    save_every: int = 100
    """Steps between checkpoints (one is also written on Ctrl-C and at the end)."""
    preview_every: int = 100
    """Steps between previews: sample images in TensorBoard and cheap metrics; 0 = none."""
    device: str = "auto"
    """"auto" (GPU when there is one), "cpu", "cuda" or "cuda:N"."""
    tensorboard: bool = True
    """Write TensorBoard scalars and images (needs the extra dimo-ext[train])."""

    def __post_init__(self) -> None:
        _check(bool(self.output.strip()), "output", "the path of a folder", self.output)
        for name in ("steps", "batch_size", "accumulation_steps", "log_every", "save_every"):
            _check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))
        _check(self.preview_every >= 0, "preview_every", "an integer >= 0", self.preview_every)
        _check_seed(self.seed)
        _check(0 <= self.ema_decay < 1, "ema_decay", "a number in [0, 1)", self.ema_decay)


def _check_schedule(name: str, *, sampling: bool = False) -> None:
    valid = [s for s in MASK_SCHEDULES if not (sampling and s in TRAINING_ONLY)]
    _check(name in valid, "mask_schedule", f"one of {', '.join(valid)}", name)


@dataclass(frozen=True)
class PretrainConfig:
    """`dimo pretrain`: train a masked diffusion teacher by masked-token prediction."""

    run: RunConfig
    kind: Literal["digits"] = "digits"
    """Which data and network: "digits" is the embedded UCI digits."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-3, clip_norm=1.0))
    mask_schedule: str = "arccos"
    """Distribution of the mask ratio: linear, square, cosine, arccos or mage."""
    condition_dropout: float = 0.1
    """Share of samples trained with the null condition, for classifier-free guidance."""
    label_smoothing: float = 0.0
    """Of the cross-entropy, in [0, 1)."""

    def __post_init__(self) -> None:
        _check(not self.run.cuda_graph, "run.cuda_graph", "false: pretraining seeds dropout anew each step", True)
        _check_schedule(self.mask_schedule)
        _check(0 <= self.condition_dropout < 1, "condition_dropout", "a number in [0, 1)", self.condition_dropout)
        _check(0 <= self.label_smoothing < 1, "label_smoothing", "a number in [0, 1)", self.label_smoothing)


@dataclass(frozen=True)
class TeacherConfig:
    """Which teacher."""

    kind: str = "digits"
    """Its kind; "digits" ships with the package."""
    path: str | None = None
    """A folder written by dimo or a checkpoint as its authors published it, or the Hugging Face id of one; None = the
    weights that ship with the package."""
    tokenizer: str | None = None
    """The published tokeniser, where it is a file of its own: path or Hugging Face id."""
    heads: int | None = None
    """Attention heads of a published checkpoint whose file does not tell; None = those of the published sizes."""
    seq_len: int | None = None
    """Length of the texts of a text model; None = its own."""
    grid_size: int | None = None
    """Tokens along a side of a text-to-image model's pictures; None = its own."""
    text_encoder: str | None = None
    """Folder or Hugging Face id with text_encoder and tokenizer, where they do not lie beside the transformer."""
    negative_prompt: str | None = None
    """What guidance leads away from; None = the empty prompt."""
    long_prompts: Literal["truncate", "error"] | None = None
    """Prompts of more tokens than the text encoder has positions: None = truncate them with a notice."""
    micro_conditions: tuple[float, float, float, float, float] | None = None
    """Width, height, crop top, crop left, aesthetic score; None = an uncropped picture of the model's size, score 6."""
    timestep: Literal["mask_ratio", "scaled_mask_ratio", "zero"] | None = None
    """What Meissonic gets as its time; zero is what Di[M]O's released one-step weights need. None = mask_ratio."""

    def __post_init__(self) -> None:
        for name in ("heads", "seq_len", "grid_size"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, "None or an integer >= 1", value)

    def options(self) -> dict[str, Any]:
        """Return what is set besides kind and path: arguments of :func:`dimo.load_teacher` by name."""
        return {k: v for k, v in to_dict(self).items() if k not in ("kind", "path") and v is not None}


@dataclass(frozen=True)
class PromptsConfig:
    """The prompts that a text-to-image student is trained on."""

    path: str | None = None
    """A text file (a prompt a line), a .csv or .jsonl file, or the folder or Hugging Face id of a data set."""
    column: str = "text"
    """Column of a .csv, .jsonl or data set."""
    split: str = "train"
    """Split of a data set."""
    limit: int | None = None
    """Use the first so many; None = all."""
    cache: str | None = None
    """Folder of the encoded prompts, each encoded once; None = ~/.cache/dimo/prompts."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of the encoded prompts on disk: 155 KiB a prompt in half precision for 77 tokens of 1,024 channels."""

    def __post_init__(self) -> None:
        _check(self.limit is None or self.limit >= 1, "limit", "None or an integer >= 1", self.limit)


@dataclass(frozen=True)
class SamplingConfig:
    """How a one-step student samples: all that it needs besides its weights."""

    r_init: float = 0.85
    """Share of [MASK] in the student's input, the rest are uniform random tokens; in [0, 1]."""
    embedding_noise: float = 0.1
    """Sigma of the noise on the student's token embeddings, in [0, 1]."""
    embedding_noise_scale: Literal["unit", "rms"] = "rms"
    """Standard deviation of that noise: 1 (official code) or the RMS of the embedding table."""
    student_temperature: float = 1.0
    """Divides the student's logits when its tokens are drawn; > 0 in training, 0 takes the most probable token."""

    def __post_init__(self) -> None:
        _check(0 <= self.r_init <= 1, "r_init", "a number in [0, 1]", self.r_init)
        _check(0 <= self.embedding_noise <= 1, "embedding_noise", "a number in [0, 1]", self.embedding_noise)
        usable = 0 <= self.student_temperature < math.inf
        _check(usable, "student_temperature", "a finite number >= 0", self.student_temperature)


@dataclass(frozen=True)
class MethodConfig(SamplingConfig):
    """Di[M]O's own settings (arXiv 2503.15457); defaults are those of the digits."""

    mask_schedule: str = "arccos"
    """Distribution of the mask ratio at which teacher and auxiliary are compared."""
    divergence: str = "forward_kl"
    """Token-level f-divergence D(teacher ‖ auxiliary), e.g. jeffreys:-0.2, jensen_shannon, alpha:0.5."""
    guidance_scale: float = 1.05
    """Classifier-free guidance of the teacher, uncond + s·(cond - uncond); 1 = off."""
    teacher_temperature: float = 1.0
    """Divides the teacher's logits in the divergence."""
    num_auxiliary_steps: int = 2
    """Auxiliary updates a student update."""
    fresh_auxiliary_batch: bool = False
    """Draw a new student batch for every auxiliary update; off: they all train on the student update's batch, the first
    with its mask and the logits that are there already, the others masked anew: a quarter less time a step."""
    label_smoothing: float = 0.0
    """Of the auxiliary's cross-entropy, in [0, 1)."""
    freeze: Literal["none", "recipe"] = "none"
    """"recipe" keeps the student's parameters fixed that the teacher's published recipe names (embeddings)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_schedule(self.mask_schedule)
        try:
            dimo_ext.parse_divergence(self.divergence)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        _check(0 <= self.guidance_scale < math.inf, "guidance_scale", "a finite number >= 0", self.guidance_scale)
        for name in ("teacher_temperature", "student_temperature"):
            _check(0 < getattr(self, name) < math.inf, name, "a finite number > 0", getattr(self, name))
        _check(self.num_auxiliary_steps >= 1, "num_auxiliary_steps", "an integer >= 1", self.num_auxiliary_steps)
        _check(0 <= self.label_smoothing < 1, "label_smoothing", "a number in [0, 1)", self.label_smoothing)


@dataclass(frozen=True)
class ReportConfig:
    """What is measured and drawn at the end of a run."""

    teacher_steps: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Sampling steps of the teacher's rows in the table."""
    teacher_seeds: int = 1
    """Sampling seeds of each of the teacher's rows; every seed samples anew, and many steps are slow."""
    few_steps: tuple[int, ...] = (2, 4)
    """Steps of the student's further rows, beside its one step; may be empty."""
    sampling_seeds: int = 5
    """Sampling seeds of each of the student's rows; the table gives their mean and its 95 % interval."""
    reference: Literal["validation", "test"] = "test"
    """Split that the metrics compare with; tune on validation, report on test."""

    def __post_init__(self) -> None:
        _check(bool(self.teacher_steps), "teacher_steps", "at least one integer", self.teacher_steps)
        _check(all(s >= 1 for s in self.teacher_steps), "teacher_steps", "integers >= 1", self.teacher_steps)
        _check(all(s >= 2 for s in self.few_steps), "few_steps", "integers >= 2", self.few_steps)
        for name in ("teacher_seeds", "sampling_seeds"):
            _check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))


@dataclass(frozen=True)
class DistillConfig:
    """`dimo distill`: distil a teacher into a one-step generator."""

    run: RunConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    student: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=5e-4, betas=(0.5, 0.99)))
    auxiliary: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=1.5e-3, betas=(0.5, 0.99)))
    report: ReportConfig = field(default_factory=ReportConfig)


@dataclass(frozen=True)
class ConvertConfig:
    """`dimo convert`: write a published checkpoint as a folder of safetensors and config.json."""

    output: str
    """The folder to write."""
    teacher: TeacherConfig
    """The checkpoint: kind, path, tokeniser."""
    student: bool = False
    """The weights are a one-step generator's: write them as a student, with the settings below."""
    sampling: SamplingConfig = field(
        default_factory=lambda: SamplingConfig(r_init=0.6, embedding_noise=0.1, embedding_noise_scale="unit")
    )
    """How the student samples; these are the settings of Di[M]O's released MaskGIT generator."""

    def __post_init__(self) -> None:
        _check(bool(self.output.strip()), "output", "the path of a folder", self.output)
        _check(self.teacher.path is not None, "teacher.path", "a published checkpoint", self.teacher.path)


@dataclass(frozen=True)
class SamplerConfig:
    """A model and how it samples: what `dimo sample` and `dimo evaluate` share."""

    model: str = "digits"
    """Folder or Hugging Face id of a student or teacher (model.safetensors, config.json), or "digits" for the shipped
    teacher."""
    sampler: Literal["ancestral", "confident", "halton", "amused", "mdlm"] = "ancestral"
    """How a teacher reveals tokens: at random, the most confident first, along a Halton sequence, most confident first
    with the numbers of aMUSEd and Meissonic, or as MDLM (at random, in few evaluations)."""
    steps: int | None = None
    """Sampling steps; None = 16 for a teacher, 1 for a student. A student masks again and re-draws in further steps."""
    mask_schedule: str = "arccos"
    """Mask ratios at the steps: linear, square, cosine or arccos."""
    guidance_scale: float = 1.0
    """Classifier-free guidance of a teacher; 1 = off."""
    temperature: float | None = None
    """Divides the logits; 0 = the most probable token; None = the student's own, 1 for a teacher."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "auto"
    """"auto", "cpu", "cuda" or "cuda:N"."""

    def __post_init__(self) -> None:
        _check(self.steps is None or self.steps >= 1, "steps", "None or an integer >= 1", self.steps)
        _check_schedule(self.mask_schedule, sampling=True)
        _check(0 <= self.guidance_scale < math.inf, "guidance_scale", "a finite number >= 0", self.guidance_scale)
        usable = self.temperature is None or 0 <= self.temperature < math.inf
        _check(usable, "temperature", "None or a finite number >= 0", self.temperature)
        greedy = self.sampler in ("confident", "amused") and self.temperature == 0
        _check(not greedy, "temperature", f"a number > 0 for the {self.sampler} sampler", self.temperature)
        _check_seed(self.seed)


@dataclass(frozen=True)
class SweepConfig:
    """Settings to try: every combination is a row of the grid, with the same seeds."""

    guidance_scale: tuple[float, ...] = ()
    """Guidance of a teacher."""
    temperature: tuple[float, ...] = ()
    """Temperatures."""
    steps: tuple[int, ...] = ()
    """Sampling steps."""


@dataclass(frozen=True)
class SampleConfig(SamplerConfig):
    """`dimo sample`: draw samples from a teacher or a one-step student."""

    output: str = "samples.png"
    """A .png: one grid, a row a class or prompt; else a folder, a .png a sample, named by seed and class or prompt. For
    texts a .jsonl or a folder."""
    prompts: tuple[str, ...] = ()
    """Prompts of a text-to-image model; none, and no file of them: ten examples."""
    prompts_file: str | None = None
    """A file of prompts: text, a prompt a line, or a .csv or .jsonl with a column "text"."""
    classes: tuple[int, ...] = ()
    """Class numbers; none = every class, or ten spread over more."""
    per_class: int = 16
    """Samples a class or prompt, or texts; the n-th of all is drawn with seed + n."""
    batch_size: int = 64
    """Samples at a time; it changes none of them."""
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        other = Path(self.output).suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
        _check(bool(self.output.strip()) and not other, "output", "a path that ends in .png, or a folder", self.output)
        for name in ("per_class", "batch_size"):
            _check(getattr(self, name) >= 1, name, "an integer >= 1", getattr(self, name))


@dataclass(frozen=True)
class EvaluateConfig(SamplerConfig):
    """`dimo evaluate`: measure a teacher or a one-step student of the digits against real images."""

    output: str = "metrics.json"
    """Where the numbers go, with their recipes and versions."""
    reference: Literal["validation", "test"] = "test"
    """Split that the metrics compare with; tune on validation, report on test."""
    seeds: int = 5
    """Sampling seeds, from `seed` on; the table gives the metrics' mean and its 95 % interval."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.output.endswith(".json"), "output", "a path that ends in .json", self.output)
        _check(self.seeds >= 1, "seeds", "an integer >= 1", self.seeds)
