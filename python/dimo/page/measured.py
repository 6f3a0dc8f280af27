"""The sections of a measured run: headline, samples, quality and speed against the teacher, all metrics."""

from __future__ import annotations

from html import escape

from ..evaluation import METRICS
from ..metrics import Interval
from ..report import MASK, inline_png
from .charts import Chart, Point, Series, figures
from .results import HEADLINE_METRIC, Contrast, Results, Row, verdict

MAIN_METRICS = (HEADLINE_METRIC, "frechet_feature", "recall", "precision", "coverage", "two_sample_accuracy")
"""The metrics that have a chart against the sampling steps."""

_DASH = "&ndash;"


def header(results: Results, compared: Contrast) -> str:
    """Return the headline, the numbers behind it, and the rule that it follows."""
    parts = [
        f"<h1>{headline(compared)}</h1>",
        f'<p class="lead">{_lead(compared)}</p>',
        _context(results, compared),
        _other_metrics(compared),
        _tiles(compared),
        f'<p class="note">{_rule(results, compared)}</p>',
    ]
    return "\n".join(part for part in parts if part)


def plain_header(results: Results) -> str:
    """Return a title for a table without a teacher to contrast the student with."""
    names = ", ".join(escape(row.name) for row in results.rows if row.kind != "real") or "real images"
    return f'<h1>Measured: {names}</h1>\n<p class="lead">{_counts(results)}</p>'


def headline(compared: Contrast) -> str:
    """Return the sentence that the numbers allow; see :func:`dimo.page.results.contrast` for the rule."""
    if compared.matched is None:
        return f"One network evaluation does not reach {_teacher(compared.missed)} by Fréchet distance"
    verb = {"better": "beats", "equal": "matches"}[verdict(HEADLINE_METRIC, compared.student, compared.matched)]
    return f"One network evaluation {verb} {_teacher(compared.matched)} by Fréchet distance"


def _teacher(row: Row) -> str:
    guided = "guided " if row.network_evaluations > row.steps else ""
    steps = f"{row.steps} {guided}step{'s' if row.steps > 1 else ''}"
    return f"the teacher's {steps} ({_evaluations(row, 'evaluation')})"


def _evaluations(row: Row, noun: str = "network evaluation") -> str:
    return f"{row.network_evaluations} {noun}{'s' if row.network_evaluations > 1 else ''}"


def _lead(compared: Contrast) -> str:
    student, matched, missed = compared
    other = matched or missed
    values = [_in_words(row.metrics[HEADLINE_METRIC]) for row in (student, other)]
    text = f"{METRICS[HEADLINE_METRIC].title}: <strong>{values[0]}</strong> against <strong>{values[1]}</strong>"
    if student.images_per_second and other.images_per_second:
        text += f", at {student.images_per_second / other.images_per_second:.3g} times the images a second"
    return f"{text}."


def _context(results: Results, compared: Contrast) -> str:
    """The next teacher, the teacher's first step and real images on the same scale."""
    _, matched, missed = compared
    teachers = [row for row in results.of_kind("teacher") if HEADLINE_METRIC in row.metrics]
    real = [row.metrics[HEADLINE_METRIC] for row in results.of_kind("real") if HEADLINE_METRIC in row.metrics]
    texts = []
    if matched and missed:
        texts.append(f"It does not reach {_teacher(missed)}: {_in_words(missed.metrics[HEADLINE_METRIC])}.")
    if matched and matched is not teachers[0]:
        value = _in_words(teachers[0].metrics[HEADLINE_METRIC])
        texts.append(f"For {_teacher(teachers[0])} the distance is {value}.")
    texts += [f"Real images score {_in_words(real[0])}."] if real else []
    return f"<p>{' '.join(texts)}</p>" if texts else ""


def _other_metrics(compared: Contrast) -> str:
    """Where the student is better and worse than the teacher that it matches: one metric does not tell all."""
    student, matched, _ = compared
    shared = [m for m in MAIN_METRICS[1:] if m in student.metrics and matched and m in matched.metrics]
    texts = []
    for outcome, words in (("better", "better in"), ("equal", "equal within intervals in"), ("worse", "worse in")):
        values = [
            f"{METRICS[m].title} {student.metrics[m].mean:.3f} : {matched.metrics[m].mean:.3f}"
            for m in shared
            if verdict(m, student, matched) == outcome
        ]
        texts += [f"{words} {', '.join(values)}"] if values else []
    return f"<p>At this quality the student is {'; '.join(texts)} (student : teacher).</p>" if texts else ""


def _tiles(compared: Contrast) -> str:
    student, other = compared.student, compared.matched or compared.missed
    tiles = {
        "network evaluations an image": [str(row.network_evaluations) for row in (student, other)],
        METRICS[HEADLINE_METRIC].header: [f"{row.metrics[HEADLINE_METRIC].mean:.3f}" for row in (student, other)],
    }
    if student.images_per_second and other.images_per_second:
        tiles["images a second"] = [_rate(student), _rate(other)]
    cells = "\n".join(
        f'<div><dt>{label}, student</dt><dd><span class="value">{value}</span>'
        f"against {reference} for {escape(other.name)}</dd></div>"
        for label, (value, reference) in tiles.items()
    )
    return f'<dl class="tiles">\n{cells}\n</dl>'


def _rule(results: Results, compared: Contrast) -> str:
    bounded = [row.metrics[HEADLINE_METRIC].low is not None for row in compared if row]
    rule = "its value is the lower one; with one seed there are no intervals, and small differences mean nothing"
    if any(bounded):
        rule = "its interval over seeds lies below (beats), or overlaps with a mean at most a tenth worse (matches)"
        rule += "" if all(bounded) else "; a row of one seed has no interval and counts as its value"
    return (
        f"The number of teacher steps named is the largest at which, and at every smaller one measured, the student "
        f"holds by {METRICS[HEADLINE_METRIC].title}: {rule}. {_counts(results)}"
    )


def _counts(results: Results) -> str:
    return f"{results.sample_count:,} samples a seed, compared with the {escape(results.reference)} images."


def grids(results: Results) -> str:
    """Return every sampler's digits side by side."""
    order = [row for kind in ("real", "student", "teacher", "student_before") for row in results.of_kind(kind)]
    pictures = "\n".join(_grid(row, results.reference) for row in order if row.samples is not None)
    text = "<p>Each row of a picture is the class that was asked for, 0 to 9.</p>"
    return f'{text}\n<div class="grids">\n{pictures}\n</div>' if pictures else ""


def _grid(row: Row, reference: str) -> str:
    name, note = escape(row.name), _evaluations(row) if row.network_evaluations else f"{escape(reference)} split"
    return (
        f'<figure class="{row.kind}"><figcaption><strong>{name}</strong>{note}</figcaption>'
        f'<img src="{inline_png(row.samples)}" alt="{name}: {row.samples.shape[1]} digits of each class"></figure>'
    )


def quality(results: Results) -> str:
    """Return a chart of each main metric against sampling steps: teacher, student, real images."""
    charts = [chart for metric in MAIN_METRICS if (chart := _metric_chart(results, metric))]
    names = {"teacher": "teacher", "student": "student", "level": "real images"}
    legend = "".join(f'<li class="{style}">{name}</li>' for style, name in names.items())
    text = "A guided teacher evaluates its network twice a step, the student once. Vertical bars: intervals over seeds."
    return f'<p>{text}</p>\n<ul class="legend">{legend}</ul>\n{figures(charts)}' if charts else ""


def _metric_chart(results: Results, metric: str) -> Chart | None:
    series = [
        Series(kind, [Point(row.steps, *row.metrics[metric]) for row in rows], kind, markers=True)
        for kind in ("teacher", "student")
        if (rows := [row for row in results.of_kind(kind) if metric in row.metrics])
    ]
    real = [row.metrics[metric].mean for row in results.of_kind("real") if metric in row.metrics]
    level = ("real images", real[0]) if real else None
    return Chart(METRICS[metric].header, "sampling steps", series, level, log2_x=True) if series else None


def speed(compared: Contrast) -> str:
    """Return the student's speed beside that of the teacher it matches, and of the next one."""
    rows = [row for row in compared if row and row.images_per_second]
    if compared.matched not in rows or compared.student not in rows:
        return ""
    head = ["", "network evaluations", "images/s", "ms an image", METRICS[HEADLINE_METRIC].header]
    cells = [
        [row.name, str(row.network_evaluations), _rate(row), f"{1e3 / row.images_per_second:.3g}",
         _cell(row.metrics[HEADLINE_METRIC])]
        for row in rows
    ]  # fmt: skip
    note = "<p>Sampled in batches on one device; ms an image is the reciprocal of images/s.</p>"
    return f"{note}\n{_html_table(head, cells, [row.kind for row in rows])}"


def reveal(results: Results) -> str:
    """Return the states of a sampling of the teacher as a strip."""
    if results.reveal is None:
        return ""
    shares = ", ".join(f"{share:.0%}" for share in (results.reveal == MASK).mean(axis=(0, 2)))
    text = (
        f"From left to right {results.reveal.shape[1] - 1} steps of the teacher. Every image starts as masks, drawn "
        "blue; each step reveals some of them for good. The student draws all tokens at once."
    )
    alt = "States of the teacher's sampling: one row a class, one column a step, from all masked to none"
    picture = f'<img src="{inline_png(results.reveal)}" alt="{alt}">'
    strip = f'<div class="scroll box" role="region" aria-label="sampling strip" tabindex="0">{picture}</div>'
    return f'<p>{text}</p>\n{strip}\n<p class="note">Masked before the first step and after each: {shares}.</p>'


def table(results: Results) -> str:
    """Return every row and metric, and below them how each metric is computed."""
    keys = [*METRICS, *sorted({key for row in results.rows for key in row.metrics} - set(METRICS))]
    keys = [key for key in keys if any(key in row.metrics for row in results.rows)]
    titles = {key: METRICS[key].header if key in METRICS else key for key in keys}
    cells = [
        [row.name, str(row.network_evaluations or _DASH), _rate(row), *(_cell(row.metrics.get(k)) for k in keys)]
        for row in results.rows
    ]
    rows = _html_table(["sampler", "network evaluations", "images/s", *titles.values()], cells, results.kinds)
    recipes = "\n".join(
        f"<div><dt>{escape(titles[key])}:</dt> <dd>{escape(results.recipes[key])}</dd></div>"
        for key in keys
        if key in results.recipes
    )
    return f'<p>{_counts(results)}</p>\n{rows}\n<dl class="recipes">\n{recipes}\n</dl>'


def _html_table(head: list[str], rows: list[list[str]], kinds: list[str]) -> str:
    """Each of `rows` starts with plain text, its other cells are HTML."""
    header = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "\n".join(
        f'<tr class="{kind}"><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for (name, *cells), kind in zip(rows, kinds, strict=True)
    )
    whole = f"<table><thead><tr>{header}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll box" role="region" aria-label="table" tabindex="0">{whole}</div>'


def _in_words(value: Interval) -> str:
    return f"{value.mean:.3f}" + ("" if value.low is None else f" ({value.low:.3f} to {value.high:.3f})")


def _cell(value: Interval | None) -> str:
    if value is None:
        return _DASH
    return f"{value.mean:.3f}" + ("" if value.low is None else f"<small>{value.low:.3f} to {value.high:.3f}</small>")


def _rate(row: Row) -> str:
    return f"{row.images_per_second:,.0f}" if row.images_per_second else _DASH
