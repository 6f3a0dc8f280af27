"""What a run shows: a comparison picture, loss curves, tables. Files are replaced atomically.

A run's web page is made in page/.

matplotlib is imported on first use and driven through its objects, so no window, backend or global figure is touched.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from .data.digits import GRID_SIZE, NUM_CLASSES, VOCAB_SIZE, decode
from .evaluation import METRICS
from .files import atomic_path, import_extra
from .metrics import Interval
from .runlog import read_log

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES: dict[str, str] = {
    "loss": "loss",
    "validation_loss": "validation loss",
    "student_divergence": "student divergence",
    "auxiliary_loss": "auxiliary loss",
    "token_entropy": "token entropy (nats)",
    "gradient_norm": "gradient norm",
    "auxiliary_gradient_norm": "auxiliary's gradient norm",
    "frechet_pixel": "Fréchet distance (pixels)",
    "frechet_feature": "Fréchet distance (features)",
}
"""The keys of the training log that `loss_curves` draws, with their panel titles."""

_LEADING_COLUMNS = {"network_evaluations": "network evaluations", "images_per_second": "images/s"}
_BACKGROUND, _INK, _MUTED, _ACCENT = "#0d1117", "#f4f5f7", "#9198a1", "#3b6fd4"
COMPARISON = "comparison.png"
"""The picture of teacher and student in a run's folder."""
MASK = VOCAB_SIZE  # the id of [MASK]
_MASK_COLOR = (86, 110, 190)
_GAP = 2  # pixels between the images of a grid
_INLINE_SCALE = 5  # device pixels a pixel of a digit


def comparison_figure(columns: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Draw digit samples of several samplers side by side, one panel each, one row a class.

    `columns` maps a panel's title to tokens int [10, n, 64], the same n for all, in the order of classes. The first
    line of a title is printed large, a second one ("1 network evaluation") small below it. Raises ValueError for
    another shape.
    """
    canvases = [_tile(_digit_images(tokens, title)) for title, tokens in columns.items()]
    if len({canvas.shape for canvas in canvases}) != 1:
        raise ValueError(f"columns must hold one or more panels of equal shape, not {[c.shape for c in canvases]}")
    rows, cols = canvases[0].shape
    scale, left, gap, top, bottom = 0.05, 0.6, 0.5, 1.0, 0.25  # inches; scale per pixel
    width = left + len(canvases) * (cols * scale + gap) - gap + bottom
    height = top + rows * scale + bottom
    figure = _new_figure(width, height, _BACKGROUND)
    for i, (title, canvas) in enumerate(zip(columns, canvases, strict=True)):
        x = left + i * (cols * scale + gap)
        axes = figure.add_axes((x / width, bottom / height, cols * scale / width, rows * scale / height))
        _show(axes, canvas)
        _panel_title(axes, title, cols * scale)
        if i == 0:
            _label_rows(axes, [str(c) for c in range(NUM_CLASSES)], GRID_SIZE, fontsize=18)
    _save(figure, path)


def inline_png(tokens: ArrayLike) -> str:
    """Digits as a PNG in a data URI: `tokens` int [rows, cols, 64] in 0..16, or 17 for [MASK], which is drawn blue.

    Between the digits the picture is transparent.
    """
    tokens = np.asarray(tokens)
    rows, cols = tokens.shape[:2]
    images = _palette()[tokens].reshape(rows, cols, GRID_SIZE, GRID_SIZE, 4)
    padded = np.pad(images, ((0, 0), (0, 0), (0, 1), (0, 1), (0, 0)))
    size = GRID_SIZE + 1
    canvas = padded.transpose(0, 2, 1, 3, 4).reshape(rows * size, cols * size, 4)[:-1, :-1]
    buffer = io.BytesIO()
    scaled = canvas.repeat(_INLINE_SCALE, 0).repeat(_INLINE_SCALE, 1)
    import_extra("matplotlib.image", "a picture").imsave(buffer, scaled, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def metrics_table(
    rows: Mapping[str, Mapping[str, float | Interval]],
    style: Literal["markdown", "plain"] = "markdown",
    row_title: str = "sampler",
) -> str:
    """A table of metrics, aligned to be read as text: Markdown with pipes, or "plain" for a terminal.

    `rows` maps a sampler's name to its values: `network_evaluations`, `images_per_second` and the keys of
    `dimo.evaluation.METRICS`. Columns that no row has are left out, a value that one row lacks is shown as a dash.
    Raises ValueError for an unknown key or style.
    """
    if style not in ("markdown", "plain"):
        raise ValueError(f"unknown style {style!r}; the styles are markdown, plain")
    headers = _LEADING_COLUMNS | {key: metric.header for key, metric in METRICS.items()}
    unknown = {key for values in rows.values() for key in values} - set(headers)
    if unknown:
        raise ValueError(f"unknown metrics {sorted(unknown)}; the metrics are {', '.join(headers)}")
    keys = [key for key in headers if any(key in values for values in rows.values())]
    cells = [[row_title, *(headers[key] for key in keys)]]
    cells += [[name, *(_format(key, values.get(key)) for key in keys)] for name, values in rows.items()]
    return _align(cells, style)


def loss_curves(log: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
    """Draw the training log `log` (JSON lines of `step` and scalars) as one PNG, a panel for each key of `CURVES`.

    Keys that the log lacks have no panel. Raises ValueError if nothing is left to draw, and for a broken log.
    """
    records = read_log(log)
    series = {key: [(s, r[key]) for s, r in records.items() if r.get(key) is not None] for key in CURVES}
    series = {key: points for key, points in series.items() if points}
    if not series:
        raise ValueError(f"{os.fspath(log)} holds none of {', '.join(CURVES)}")
    cols = min(len(series), 3)
    rows = -(-len(series) // cols)
    figure = _new_figure(4.2 * cols, 2.9 * rows, "white")
    for i, (key, points) in enumerate(series.items()):
        steps, values = np.array(points, dtype=np.float64).T
        _draw_curve(figure.add_subplot(rows, cols, i + 1), CURVES[key], steps, values)
    figure.tight_layout()
    _save(figure, path)


def _digit_images(tokens: Tensor, title: str) -> np.ndarray:
    if tokens.ndim != 3 or tokens.shape[0] != NUM_CLASSES:
        raise ValueError(f"columns[{title!r}] must have shape [{NUM_CLASSES}, n, 64], not {list(tokens.shape)}")
    images = decode(tokens.flatten(0, 1).cpu())
    return images.reshape(*tokens.shape[:2], GRID_SIZE, GRID_SIZE).numpy()


def _palette() -> np.ndarray:
    """RGBA of each token, uint8 [18, 4]: the background's colour to white, then [MASK]."""
    dark = np.array([int(_BACKGROUND[i : i + 2], 16) for i in (1, 3, 5)])
    share = np.linspace(0, 1, VOCAB_SIZE)[:, None]
    colors = np.vstack([dark + share * (255 - dark), _MASK_COLOR])
    return np.hstack([colors.round(), np.full((VOCAB_SIZE + 1, 1), 255)]).astype(np.uint8)


def _tile(images: np.ndarray) -> np.ndarray:
    """Images [rows, cols, H, W] → one image [rows·(H + gap) − gap, cols·(W + gap) − gap], the gaps 0."""
    padded = np.pad(images, ((0, 0), (0, 0), (0, _GAP), (0, _GAP)))
    rows, cols, height, width = padded.shape
    return padded.transpose(0, 2, 1, 3).reshape(rows * height, cols * width)[:-_GAP, :-_GAP]


def _new_figure(width: float, height: float, color: str) -> Figure:
    figure = import_extra("matplotlib.figure", "a picture").Figure(figsize=(width, height), facecolor=color)
    import_extra("matplotlib.backends.backend_agg", "a picture").FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | os.PathLike[str], dpi: int = 120) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, facecolor=figure.get_facecolor())


def _show(axes: Axes, canvas: np.ndarray) -> None:
    """Show `canvas` in [0, 1] from the figure's background colour to white, so that images have no frames."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("ink", [_BACKGROUND, "#ffffff"])
    axes.imshow(canvas, cmap=colors, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    axes.set_axis_off()


def _label_rows(axes: Axes, labels: Sequence[str], height: int, fontsize: float = 13) -> None:
    for i, label in enumerate(labels):
        y = i * (height + _GAP) + (height - 1) / 2
        axes.text(-4, y, label, color=_MUTED, fontsize=fontsize, ha="right", va="center")


def _panel_title(axes: Axes, title: str, width: float) -> None:
    """Two lines above the panel, in a size that fits its `width` in inches."""
    name, _, note = title.partition("\n")
    size = min(24.0, 6 * width)
    lines = ((name, 1.6, size, _INK), (note, 0.45, 0.68 * size, _MUTED))
    for text, offset, fontsize, color in lines:
        position = {"xytext": (0, offset * 0.68 * size), "textcoords": "offset points"}
        axes.annotate(text, (0.5, 1), xycoords="axes fraction", ha="center", color=color, fontsize=fontsize, **position)


def _draw_curve(axes: Axes, title: str, steps: np.ndarray, values: np.ndarray) -> None:
    """The values and, where they are many, a centred running mean over a twentieth of them."""
    window = len(values) // 20
    axes.plot(steps, values, color=_ACCENT, linewidth=1.0, alpha=0.35 if window > 1 else 1.0)
    if window > 1:
        mean = np.convolve(values, np.ones(window) / window, mode="valid")
        axes.plot(steps[window // 2 :][: len(mean)], mean, color=_ACCENT, linewidth=1.8)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _format(key: str, value: float | Interval | None) -> str:
    if value is None:
        return "-"
    if key == "network_evaluations":
        return str(int(value))
    return f"{value:,.0f}" if key == "images_per_second" else f"{value:.3f}"


def _align(cells: list[list[str]], style: str) -> str:
    """Pad the columns to equal width, the first one left, the others right."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in cells
    ]
    if style == "plain":
        rule = ["-" * width for width in widths]
        return "\n".join("  ".join(row) for row in [padded[0], rule, *padded[1:]])
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [padded[0], rule, *padded[1:]])
