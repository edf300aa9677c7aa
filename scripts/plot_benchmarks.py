# SPDX-License-Identifier: Apache-2.0
"""Draw the reports of a directory: gigabytes per second of every contestant, with the limit marked.

    python scripts/plot_benchmarks.py benchmarks/results

Only tables of whole saves and loads are drawn, which have a limit; the picture is ``throughput.svg``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("svg")
# Text stays text, and no random ids: the same numbers give the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ckpt_fast", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

OURS, LIMIT, RIVAL = "#2a7f4f", "#555555", "#b8c4ce"


def tables(results: Path) -> list[dict[str, Any]]:
    """Return the tables to draw, in the order of their file names."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return [table for report in reports for table in report["tables"] if table["limit"]]


def draw(axes: Any, table: dict[str, Any]) -> None:
    """Draw one table as horizontal bars, fastest first."""
    rates = {
        name: table["nbytes"][name] / median(seconds) / 1e9
        for name, seconds in table["seconds"].items()
        if table["nbytes"][name]
    }
    names = sorted(rates, key=lambda name: rates[name])
    colors = [
        LIMIT if name.startswith("limit") else OURS if name.startswith("ckpt_fast") else RIVAL
        for name in names
    ]
    bars = axes.barh(names, [rates[name] for name in names], color=colors)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_title(table["title"], loc="left", fontsize=10)
    axes.set_xlabel("GB/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)


def main() -> None:
    results = Path(sys.argv[1])
    drawn = tables(results)
    if not drawn:
        sys.exit(f"{results} has no reports to draw; run python -m benchmarks {results}")
    heights = [0.3 * len(table["seconds"]) + 0.9 for table in drawn]
    figure, rows = pyplot.subplots(
        len(drawn), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, table in zip(rows[:, 0], drawn, strict=True):
        draw(axes, table)
    figure.savefig(results / "throughput.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
