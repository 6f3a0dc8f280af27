"""The README's table of the digits from runs that differ in the training seed: `make table`.

Usage: python scripts/digits_table.py FOLDER [FOLDER ...]

Every folder holds a run's metrics.json. Student rows are the mean over all seeds, with the interval of the training
runs' means; the other rows come from the first folder. Writes docs/digits.md, all columns with recipes, and the
README's shorter table.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

from dimo.comparison import table
from dimo.files import write_text
from dimo.metrics import Interval, mean_and_interval
from dimo.report import metrics_table

ROOT = Path(__file__).parents[1]
README_COLUMNS = (
    "frechet_feature", "frechet_pixel", "precision", "recall", "coverage", "two_sample_accuracy", "diversity",
)  # fmt: skip
_BLOCK = re.compile(r"(<!-- digits table: make table -->\n).*?(\n<!-- end of the digits table -->)", re.DOTALL)


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first document with its student rows over all documents: values ``[runs, sampling seeds]``."""
    result = copy.deepcopy(documents[0])
    for row in result["rows"]:
        row["images_per_second"] = None  # a run's own report has it; here it would mix runs under different load
        if row["kind"] != "student":
            continue
        twins = [next(r for r in d["rows"] if r["name"] == row["name"]) for d in documents]
        for key, metric in row["metrics"].items():
            values = [twin["metrics"][key]["values"] for twin in twins]
            metric |= mean_and_interval(values)._asdict() | {"values": values}
    return result


def readme_table(document: dict[str, Any]) -> str:
    """Return the columns that a reader compares first."""
    cells = {}
    for row in document["rows"]:
        count = {"network_evaluations": row["network_evaluations"]} if row["kind"] != "real" else {}
        metrics = {key: row["metrics"][key] for key in README_COLUMNS}
        cells[row["name"]] = count | {k: Interval(m["mean"], m["low"], m["high"]) for k, m in metrics.items()}
    return metrics_table(cells, "markdown")


def main(folders: list[str]) -> None:
    """Merge the runs and write both tables."""
    document = merged([json.loads((Path(f) / "metrics.json").read_text(encoding="utf-8")) for f in folders])
    runs = f"{len(folders)} training run{'s' if len(folders) > 1 else ''}"
    note = f"Student rows: {runs}; ± is half of the 95 % Student-t interval of the runs' means.\n"
    write_text(ROOT / "docs" / "digits.md", f"# The digits, every metric\n\n{note}\n{table(document, 'markdown')}\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    if not _BLOCK.search(readme):
        raise SystemExit("README.md: the markers of the digits table are missing")
    block = _BLOCK.sub(lambda m: f"{m[1]}{readme_table(document)}{m[2]}", readme)
    write_text(ROOT / "README.md", block)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    main(sys.argv[1:])
