# SPDX-License-Identifier: Apache-2.0
"""Draw the reports of a directory.

    python benchmarks/plot.py benchmarks/results

``throughput.svg`` has gigabytes per second of every contestant, with the limit marked, from tables that have
a limit: whole saves and loads. ``growth.svg`` has the report of bench_growth: milliseconds by the number of
tensors, without those of the memcpy. ``scale.svg`` has the growth that bench_plan measures.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import matplotlib

matplotlib.use("svg")
# Text stays text, and no random ids: the same numbers give the same file.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ckpt_fast", "font.size": 9})
from matplotlib import pyplot  # noqa: E402

SIZES = "ranks x tensors"
OURS, LIMIT, RIVAL = "#2a7f4f", "#555555", "#b8c4ce"


def tables(results: Path) -> list[dict[str, Any]]:
    """Return the tables of all reports, in the order of their file names."""
    reports = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    return [table for report in reports for table in report["tables"]]


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


def draw_growth(axes: Any, drawn: list[dict[str, Any]]) -> None:
    """Draw tables whose names are numbers as lines of what they take beyond the limit, with their slopes."""
    (limit,) = (table["seconds"] for table in drawn if table["figure"].startswith("limit"))
    for table in drawn:
        if table["seconds"] is limit:
            continue
        beyond = {
            int(count): [(value - median(limit[count])) * 1e3 for value in seconds]
            for count, seconds in table["seconds"].items()
        }
        counts, middles = list(beyond), [median(values) for values in beyond.values()]
        spread = [
            [middle - min(values) for middle, values in zip(middles, beyond.values(), strict=True)],
            [max(values) - middle for middle, values in zip(middles, beyond.values(), strict=True)],
        ]
        slope = linear_regression(counts, middles).slope
        name = f"{table['figure']}: {slope * 1e3:.1f} µs per tensor"
        axes.errorbar(counts, middles, spread, label=name, marker="o", capsize=3)
    axes.set_title(f"{drawn[0]['title']}, beyond a memcpy", loc="left", fontsize=10)
    axes.set_xlabel(drawn[0]["by"])
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def draw_scale(axes: Any, drawn: list[dict[str, Any]]) -> None:
    """Draw tables whose names are "ranks x tensors": a point for each size, by the number of shards."""
    times = {table["figure"]: table["seconds"] for table in drawn}
    lines = {
        "first save, coordinator": ("join", "check and write", "frame"),
        "later saves, coordinator": ("known",),
        "first save, gather (model)": ("gather",),
        "load, broadcast (model)": ("broadcast",),
        "load, each rank": ("load",),
    }
    for (name, phases), marker in zip(lines.items(), "os^vD", strict=True):
        points = sorted(
            (_shards(size), sum(times[phase][size][0] for phase in phases) * 1e3) for size in times["join"]
        )
        axes.loglog(*zip(*points, strict=True), marker, label=name, markersize=4)
    axes.set_title(drawn[0]["title"].partition(":")[0], loc="left", fontsize=10)
    axes.set_xlabel("shards")
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _shards(size: str) -> int:
    ranks, count = size.split(" x ")
    return int(ranks) * int(count)


def draw_throughput(drawn: list[dict[str, Any]]) -> Any:
    """Return a figure with one chart for each table."""
    heights = [0.3 * len(table["seconds"]) + 0.9 for table in drawn]
    figure, rows = pyplot.subplots(
        len(drawn), 1, figsize=(8, sum(heights)), height_ratios=heights, squeeze=False, layout="constrained"
    )
    for axes, table in zip(rows[:, 0], drawn, strict=True):
        draw(axes, table)
    return figure


def main() -> None:
    results = Path(sys.argv[1])
    everything = tables(results)
    bars = [table for table in everything if table["limit"]]
    lines = [table for table in everything if table.get("by") == "tensors"]
    sizes = [table for table in everything if table.get("by") == SIZES]
    if not bars and not lines and not sizes:
        sys.exit(f"{results} has no reports to draw; run python -m benchmarks {results}")
    figures = {}
    if bars:
        figures["throughput.svg"] = draw_throughput(bars)
    if lines:
        figures["growth.svg"], axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        draw_growth(axes, lines)
    if sizes:
        figures["scale.svg"], axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        draw_scale(axes, sizes)
    for name, figure in figures.items():
        figure.savefig(results / name, metadata={"Date": None})


if __name__ == "__main__":
    main()
