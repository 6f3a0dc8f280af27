"""`report.html`: a run on one page that needs nothing else, for a reader who sees only this page.

Everything shown is read from the run's folder: metrics.json, log.jsonl and the checkpoint's header. What is missing
there is announced as still to come, so a run in progress has a page too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..checkpoint import versions
from ..files import write_text
from . import measured, training
from .results import Contrast, contrast
from .run import Run, read_run

PAGE = "report.html"


def write_page(folder: str | os.PathLike[str]) -> Path:
    """Write the page of a run, finished or not, into its folder and return its path.

    Raises:
        ConfigError: `folder` is not the folder of a run.
        CheckpointError: a file there is broken or of another kind; the message names it.
    """
    path = Path(folder) / PAGE
    write_text(path, render(read_run(folder)))
    return path


def render(run: Run) -> str:
    """Return the page as HTML: style, pictures and charts inside, no scripts, nothing to be loaded."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    name, version = escape(run.folder.name), escape(versions()["dimo-ext"])
    body = "\n".join(_parts(run))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>dimo: {name}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<footer>Run folder {name}. Page made by dimo-ext {version}.</footer>
</body>
</html>
"""


def _parts(run: Run) -> Iterator[str]:
    results = run.results
    compared = contrast(results) if results else None
    yield f"<header>\n{_header(run, compared)}\n{training.warnings(run)}</header>"
    if results:
        yield _section("What they draw", measured.grids(results))
        yield _section("Quality against sampling steps", measured.quality(results))
        yield _section("Speed at equal quality", measured.speed(compared) if compared else "")
        yield _section("How the teacher samples", measured.reveal(results))
    yield _section("What they draw", training.pictures(run))
    yield _section("Training", training.curves(run))
    yield _section("Time of a training step", training.phases(run))
    if results:
        yield _section("All metrics", measured.table(results))
    yield _section("Configuration and versions", training.provenance(run))


def _header(run: Run, compared: Contrast | None) -> str:
    if run.results is None:
        return training.header(run)
    return measured.header(run.results, compared) if compared else measured.plain_header(run.results)


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}\n</section>" if content else ""
