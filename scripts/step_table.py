"""The README's table of a whole training step, from the CSV files of benchmarks/step_time.py: `make step-table`."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from dimo.files import write_text

ROOT = Path(__file__).parents[1]
PRESETS = ("digits", "maskgit-imagenet256", "meissonic-shape", "mdlm-owt")
TIMES = "\u00d7"
OWN_PART = ("draws", "masking", "loss")  # what is neither a network nor an optimiser
_BLOCK = re.compile(r"(<!-- step table: make step-table -->\n).*?(\n<!-- end of the step table -->)", re.DOTALL)
_HEADER = """| step, ms | plain eager | compiled | ours, eager | compiled | as CUDA graph | batch re-used | products alone | draws, masking, loss |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""  # noqa: E501


def row(path: Path) -> str:
    """One line of the table: medians, in brackets how many times as fast as the plain eager step."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    whole = {r["candidate"]: float(r["ms"]) for r in rows if r["phase"] == "whole step"}
    base = whole["plain eager"]

    def fastest(*names: str) -> str:
        times = [whole[name] for name in names if whole.get(name, 0.0) > 0.0]
        return f"{min(times):,.3g} ({base / min(times):.2f}{TIMES})" if times else ""

    own = sum(float(r["ms"]) for r in rows if r["candidate"] == "ours eager" and r["phase"] in OWN_PART)
    floor = next(float(r["floor_ms"]) for r in rows if r["floor_ms"])
    facts = rows[0]
    where = (
        f"{facts['preset']}, {facts['layers']} {TIMES} {facts['width']}, batch {facts['batch_size']}, {facts['device']}"
    )
    reused = [name for name in whole if name.endswith("re-used")]
    cells = [
        where, f"{base:,.3g}", fastest("plain compiled"), fastest("ours eager"), fastest("ours compiled"),
        fastest("ours CUDA graph", "ours compiled CUDA graph"), fastest(*reused), f"{floor:,.3g}",
        f"{own:,.3g} ({own / whole['ours eager']:.1%})",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Put the table between its marks in the README."""
    results = ROOT / "benchmarks" / "results"
    paths = [folder / f"step_time_{name}.csv" for folder in (results / "h100", results) for name in PRESETS]
    table = "\n".join([_HEADER, *(row(path) for path in paths if path.exists())])
    readme = ROOT / "README.md"
    write_text(readme, _BLOCK.sub(lambda match: f"{match[1]}{table}{match[2]}", readme.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
