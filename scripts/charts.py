# SPDX-License-Identifier: Apache-2.0
"""Draw the charts of the documentation from the reports in ``benchmarks/results``.

    python scripts/charts.py

``timeline.jsonl`` there has the events of one save, from a file that ``CKPT_FAST_TRACE`` named.

They are SVG with text as text, and follow the reader's light or dark theme. The same numbers give the same
files, which ``tests/repository/documents/test_charts.py`` compares.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"

# Narrow enough to be read on a telephone.
_WIDTH, _LABELS, _VALUES = 560, 176, 72
_ROW, _BAR, _HEAD, _GAP = 24, 15, 28, 18
_WHOLE, _SHORTEST_MS = ("save_checkpoint", "save"), 0.5
_STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600 } .quiet { fill: #59636e } .ground { fill: #ffffff }
.ours { fill: #1a7f37 } .ours.more { fill: #7cc492 }
.rival { fill: #4a6fa5 } .rival.more { fill: #a9bfdf } .limit { fill: #8c959f }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .quiet { fill: #9198a1 } .ground { fill: #0d1117 }
.ours { fill: #3fb950 } .ours.more { fill: #1f6f34 }
.rival { fill: #6b93cf } .rival.more { fill: #34507d } .limit { fill: #6e7681 }
}
"""


@dataclass(frozen=True)
class Bar:
    """A row: its name, and what the parts of its bar are long."""

    name: str
    values: Sequence[float]

    @property
    def kind(self) -> str:
        """What colours it: a limit of the hardware, ckpt_fast, or another library."""
        first = self.name.partition(" ")[0].rstrip(":,")
        return {"limit": "limit", "ckpt_fast": "ours"}.get(first, "rival")


@dataclass
class Chart:
    """Bars under a title, on one scale."""

    title: str
    unit: str
    bars: list[Bar] = field(default_factory=list)
    parts: Sequence[str] = ()

    @property
    def height(self) -> int:
        return _HEAD + _ROW * (len(self.bars) + bool(self.parts)) + _GAP

    def draw(self, top: int) -> list[str]:
        """The elements of the chart, whose first line is at ``top``."""
        scale = (_WIDTH - _LABELS - _VALUES) / max(sum(bar.values) for bar in self.bars)
        drawn = [_text(0, top + 14, f"{self.title}, {self.unit}", "title")]
        line = top + _HEAD
        if self.parts:
            drawn += self._legend(line)
            line += _ROW
        for bar in self.bars:
            drawn.append(_text(_LABELS - 8, line + 12, bar.name, anchor="end"))
            left = float(_LABELS)
            for number, value in enumerate(bar.values):
                length = max(value * scale, 1.0)
                kind = f"{bar.kind} more" if number else bar.kind
                drawn.append(_box(left, line, length, kind))
                left += length
            drawn.append(_text(left + 6, line + 12, _number(sum(bar.values)), "quiet"))
            line += _ROW
        return drawn

    def _legend(self, line: int) -> list[str]:
        drawn, left = [], float(_LABELS)
        for number, part in enumerate(self.parts):
            for kind in ("ours", "rival"):
                drawn.append(_box(left, line, 10, f"{kind} more" if number else kind))
                left += 12
            drawn.append(_text(left + 4, line + 12, part, "quiet"))
            left += 24 + 6.6 * len(part)
        return drawn


@dataclass(frozen=True)
class Span:
    """What a thread did, between two times in milliseconds."""

    name: str
    thread: str
    begin: float
    end: float


@dataclass
class Waterfall:
    """What happened when: a row for each span, in the order in which they begin."""

    title: str
    spans: Sequence[Span]

    @property
    def height(self) -> int:
        return _HEAD + _ROW * (len(self.spans) + 1) + _GAP

    def draw(self, top: int) -> list[str]:
        """The elements of the chart, whose first line is at ``top``."""
        begin = min(span.begin for span in self.spans)
        scale = (_WIDTH - _LABELS - _VALUES) / (max(span.end for span in self.spans) - begin)
        drawn = [_text(0, top + 14, self.title, "title")]
        line = top + _HEAD
        for number, (kind, text) in enumerate((("ours", "training waits"), ("rival", "beside training"))):
            left = _LABELS + 130 * number
            drawn += [_box(left, line, 10, kind), _text(left + 16, line + 12, text, "quiet")]
        for span in self.spans:
            line += _ROW
            left, length = _LABELS + (span.begin - begin) * scale, max((span.end - span.begin) * scale, 1.5)
            kind = "ours" if span.thread == "MainThread" else "rival"
            drawn += [
                _text(_LABELS - 8, line + 12, span.name, anchor="end"),
                _box(left, line, length, kind),
                _text(left + length + 6, line + 12, f"{span.end - span.begin:.1f} ms", "quiet"),
            ]
        return drawn


def spans_of(lines: Sequence[str]) -> list[Span]:
    """The steps in a trace, by when they begin; without the call as a whole, and the shortest."""
    threads: dict[int, str] = {}
    open_spans: dict[int, list[tuple[str, float]]] = {}
    found: list[Span] = []
    for event in map(json.loads, lines):
        row = event["tid"]
        if event["ph"] == "M" and event["name"] == "thread_name":
            threads[row] = event["args"]["name"]
        elif event["ph"] == "B":
            open_spans.setdefault(row, []).append((event["name"], event["ts"] / 1e3))
        elif event["ph"] == "E":
            name, begin = open_spans[row].pop()
            found.append(Span(name, threads[row], begin, event["ts"] / 1e3))
    shown = [span for span in found if span.name not in _WHOLE and span.end - span.begin >= _SHORTEST_MS]
    return sorted(shown, key=lambda span: span.begin)


def svg(charts: Sequence[Chart | Waterfall], description: str) -> str:
    """A picture of charts below each other.

    Args:
        charts: at least one.
        description: for those who cannot see it.
    """
    height = sum(chart.height for chart in charts)
    drawn, top = [], 8
    for chart in charts:
        drawn += chart.draw(top)
        top += chart.height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="-12 0 {_WIDTH + 24} {height}" role="img">'
    ground = f'<rect class="ground" x="-12" width="{_WIDTH + 24}" height="{height}" rx="6"/>'
    return "\n".join(
        [
            head,
            f"<title>{escape(description)}</title>",
            f"<style>{_STYLE}</style>",
            ground,
            *drawn,
            "</svg>",
            "",
        ]
    )


def report(name: str) -> list[dict[str, Any]]:
    """The tables of a report in ``benchmarks/results``."""
    tables: list[dict[str, Any]] = json.loads((RESULTS / f"{name}.json").read_text())["tables"]
    return tables


def milliseconds(table: dict[str, Any]) -> dict[str, float]:
    """The median of each row of a table."""
    return {name: median(seconds) * 1e3 for name, seconds in table["seconds"].items()}


def stall() -> Chart:
    """What a save costs training: the wait in the call, and what the next step takes longer than without."""
    held_up, next_step = (milliseconds(table) for table in report("stall")[:2])
    undisturbed = next_step["limit: no save"]
    costs = {
        name: (held_up[name], max(0.0, next_step[name] - undisturbed))
        for name in held_up
        if not name.startswith("limit")
    }
    bars = [Bar(name, costs[name]) for name in sorted(costs, key=lambda name: sum(costs[name]))]
    return Chart("What one save costs training", "ms", bars, ("the call", "the next step, beyond usual"))


def ranking(table: dict[str, Any], title: str) -> Chart:
    """The rows of a table, the fastest first."""
    medians = milliseconds(table)
    return Chart(
        title, "ms", [Bar(name, [medians[name]]) for name in sorted(medians, key=lambda name: medians[name])]
    )


def pictures() -> dict[str, str]:
    """The content of each file in ``docs/images`` that comes from here."""
    warm, cold = report("load")
    timeline = (RESULTS / "timeline.jsonl").read_text().splitlines()
    return {
        "timeline.svg": svg(
            [Waterfall("One background save", spans_of(timeline))],
            "The steps of one background save: which training waits for, and which go on beside it",
        ),
        "stall.svg": svg([stall()], "What one save of 1.05 GB costs training, by library"),
        "save.svg": svg(
            [
                ranking(report("save")[0], "Durable save on ext4"),
                ranking(report("save-memory")[0], "Save to memory (tmpfs)"),
            ],
            "How long a save of 1.05 GB takes, by library",
        ),
        "load.svg": svg(
            [ranking(warm, "Load, warm page cache"), ranking(cold, "Load, cold page cache")],
            "How long a load of 1.05 GB takes, by library",
        ),
    }


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    for name, content in pictures().items():
        (IMAGES / name).write_text(content)


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "") -> str:
    attributes = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:.1f}" y="{y}"{attributes}>{escape(text)}</text>'


def _box(x: float, y: float, length: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y}" width="{length:.1f}" height="{_BAR}" rx="2"/>'


def _number(value: float) -> str:
    return f"{value:,.0f}".replace(",", " ")


if __name__ == "__main__":
    main()
