# SPDX-License-Identifier: Apache-2.0
"""Interleaved rounds: every contestant runs once per round, in a new order, so that noise affects all alike.

A ratio is taken within a round and the median of the ratios is reported, so contestants can be compared even
on a busy machine, as long as the load is steady.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from hardware import machine

TOTAL = "total"
Times = dict[str, dict[str, list[float]]]


def _nothing() -> None: ...


@dataclass(frozen=True)
class Contestant:
    """One thing to measure.

    Attributes:
        name: its row in the table.
        run: what is timed. It may return seconds by figure if one number is not enough, or several of each
            figure if it does several things.
        before: untimed preparation of every round.
        after: untimed clean-up of every round.
        check: raises if ``run`` did not do its job; called after warm-up rounds.
        nbytes: bytes that one run moves, if different from the table's.
    """

    name: str
    run: Callable[[], Mapping[str, float | Sequence[float]] | None]
    before: Callable[[], None] = _nothing
    after: Callable[[], None] = _nothing
    check: Callable[[], None] = _nothing
    nbytes: int | None = None


def measure(contestants: Sequence[Contestant], rounds: int, seed: int = 0, warm_ups: int = 1) -> Times:
    """Run ``rounds`` rounds after ``warm_ups`` others.

    Returns:
        Seconds by figure (``TOTAL`` is the whole run), contestant and round.
    """
    times: Times = defaultdict(lambda: defaultdict(list))
    order, shuffle = list(contestants), random.Random(seed).shuffle
    # Freeze everything imported so far, so that no collection walks it again.
    gc.collect()
    gc.freeze()
    for number in range(1 - warm_ups, rounds + 1):
        shuffle(order)
        for contestant in order:
            figures = _run_once(contestant, is_warm_up=number <= 0)
            if number > 0:
                for figure, seconds in figures.items():
                    many = seconds if isinstance(seconds, Sequence) else [seconds]
                    times[figure][contestant.name] += many
        _progress(f"round {max(number, 0)} of {rounds}")
    gc.unfreeze()
    return times


def _run_once(contestant: Contestant, is_warm_up: bool) -> dict[str, float | Sequence[float]]:
    contestant.before()
    # Garbage of one contestant must not be collected in the time of the next.
    gc.collect()
    begin = time.perf_counter()
    figures = contestant.run()
    seconds = time.perf_counter() - begin
    try:
        if is_warm_up:
            contestant.check()
    finally:
        contestant.after()
    return {TOTAL: seconds, **(figures or {})}


def table(
    title: str,
    times: Mapping[str, Sequence[float]],
    contestants: Sequence[Contestant],
    nbytes: int,
    reference: str | None = None,
    limit: str | None = None,
) -> Table:
    """Return a table, fastest first.

    Args:
        title: what one run does.
        times: seconds by contestant and round, one figure of ``measure``.
        contestants: those measured.
        nbytes: bytes that one run moves.
        reference: how many times faster than this one, as the median of the rounds' ratios.
        limit: how much of this one's rate, likewise.
    """
    sizes = {c.name: c.nbytes or nbytes for c in contestants}
    columns = ["", "median ms", "min-max ms", "GB/s"]
    columns += [f"faster than {reference}"] if reference in times else []
    columns += ["of the limit"] if limit in times else []
    rows = [columns]
    for name in sorted(times, key=lambda name: median(times[name])):
        mine = times[name]
        row = [name, f"{median(mine) * 1e3:.1f}", f"{min(mine) * 1e3:.1f}-{max(mine) * 1e3:.1f}"]
        row.append(f"{_ratio(sizes[name], median(mine)) / 1e9:.2f}")
        if reference in times:
            ratios = [_ratio(r, m) for r, m in zip(times[reference], mine, strict=True)]
            row.append(f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
        if limit in times:
            scale = sizes[name] / sizes[limit]
            row.append(f"{median(scale * _ratio(x, m) for x, m in zip(times[limit], mine, strict=True)):.2f}")
        rows.append(row)
    return Table(title, {name: sizes[name] for name in times}, times, reference, limit, _aligned(rows))


def _ratio(one: float, other: float) -> float:
    """The quotient; steps that took no longer than without a save give a time of zero."""
    return one / other if other else math.inf


class Table(NamedTuple):
    """What ``table`` returns: the measurements, and how they are printed.

    ``nbytes`` and ``seconds`` are by contestant; ``reference`` and ``limit`` are names of contestants.
    ``figure`` is what was measured, if the title does not say it. ``by`` is what the names in ``seconds``
    count, if they are numbers.
    """

    title: str
    nbytes: dict[str, int]
    seconds: Mapping[str, Sequence[float]]
    reference: str | None
    limit: str | None
    rows: list[str]
    figure: str = ""
    by: str = ""


def side_by_side(
    title: str,
    times: Mapping[str, Mapping[str, Sequence[float]]],
    names: Sequence[str],
    nbytes: int,
    reference: tuple[str, str] | None = None,
    by: str = "",
) -> tuple[list[str], list[Table]]:
    """Return one printed table of several figures, in milliseconds, and the measurements of each.

    Args:
        title: what one run does.
        times: seconds by figure, contestant and round, as ``measure`` returns them; a column for each figure.
        names: the contestants, in the order of the rows. One that lacks a figure has a dash there.
        nbytes: bytes that one run moves.
        reference: a figure and a contestant: a last column says how many times less of it the others take.
        by: what the names count, if they are numbers.
    """
    rows = [[by, *(f"{figure}, ms" for figure in times)]]
    rows[0] += [f"faster than {reference[1]}"] if reference else []
    for name in names:
        row = [name, *(_spread(seconds.get(name)) for seconds in times.values())]
        if reference:
            figure, other = reference
            theirs, mine = times[figure].get(other), times[figure].get(name)
            row.append("-" if not theirs or not mine else f"{_median_ratio(theirs, mine):.1f}x")
        rows.append(row)
    tables = [
        Table(title, dict.fromkeys(seconds, nbytes), seconds, None, None, [], figure, by)
        for figure, seconds in times.items()
    ]
    return [title, *_aligned(rows)], tables


def _spread(seconds: Sequence[float] | None) -> str:
    if not seconds:
        return "-"
    middle, least, most = map(_milliseconds, (median(seconds), min(seconds), max(seconds)))
    return f"{middle} ({least} to {most})"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{int(abs(seconds) < 0.01)}f}"


def _median_ratio(theirs: Sequence[float], mine: Sequence[float]) -> float:
    return median(_ratio(t, m) for t, m in zip(theirs, mine, strict=True))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    first, *rest = widths
    lines = []
    for name, *cells in rows:
        line = [name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, rest, strict=True))]
        lines.append("  " + "  ".join(line))
    return lines


class Report:
    """Collects a benchmark's tables; prints them and writes them to ``--output``, with machine facts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._path, self._output = options.path, options.output
        self._load_at_begin = machine.load_average()
        self._lines: list[str] = []
        self._tables: list[Table] = []

    def add(self, part: Table | Sequence[str]) -> None:
        """Append a table, or any other lines."""
        if isinstance(part, Table):
            self._tables.append(part)
            part = [part.title, *part.rows]
        self._lines += ["", *part]

    def record(self, tables: Sequence[Table]) -> None:
        """Write these measurements to ``--output``, without printing them."""
        self._tables += tables

    def finish(self) -> None:
        """Print everything and, if ``--output`` is given, write it there, with a JSON file of all times."""
        load = f"load average {self._load_at_begin} at the beginning, {machine.load_average()} at the end"
        about = [_command(), *machine.facts(self._path), load]
        text = "\n".join([*about, *self._lines, ""])
        print(text)
        if self._output:
            tables = [{k: v for k, v in part._asdict().items() if k != "rows"} for part in self._tables]
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text(text)
            self._output.with_suffix(".json").write_text(
                json.dumps({"about": about, "tables": tables}, indent=1) + "\n"
            )


def _command() -> str:
    """Return the command line without what is of this machine alone."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    for option in ("--output", "--path"):
        if option in words:
            at = words.index(option)
            del words[at : at + 2]
    return "python benchmarks/" + " ".join(words)


def parse_arguments(
    description: str | None,
    more: Callable[[argparse.ArgumentParser], None] = lambda _: None,
    **defaults: object,
) -> argparse.Namespace:
    """Parse the options that all benchmarks share, and those that ``more`` adds.

    ``defaults`` overrides their defaults. ``path`` becomes a temporary directory below the given one, removed
    when the process exits.
    """
    parser = argparse.ArgumentParser(description=description and description.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the state (1)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds counted (5)")
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()), help="where to write files")
    parser.add_argument(
        "--only", default="", help="contestants whose names contain one of these words, by comma"
    )
    parser.add_argument("--many", action="store_true", help="10 000 tensors of 27 KB instead of a Llama")
    parser.add_argument("--page-cache", action="store_true", help="saves are not synced")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the state is (cpu)")
    parser.add_argument("--output", type=Path, help="write the report to this file as well")
    more(parser)
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    options.path.mkdir(parents=True, exist_ok=True)
    options.path = Path(tempfile.mkdtemp(prefix="ckpt_fast-bench-", dir=options.path))
    atexit.register(shutil.rmtree, options.path, ignore_errors=True)
    return options


def selected(contestants: Sequence[Contestant], only: str) -> list[Contestant]:
    """Return the contestants that ``--only`` names; limits are always measured."""
    words = [word for word in only.split(",") if word]
    return [
        c
        for c in contestants
        if not words or c.name.startswith("limit") or any(word in c.name for word in words)
    ]


@contextmanager
def quiet(keep: Path) -> Iterator[None]:
    """Write what is printed meanwhile, by whatever thread or child process, to the file ``keep`` instead.

    If an exception ends it, all that is printed after all. Progress is shown as before.
    """
    global _terminal
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with keep.open("wb") as file, os.fdopen(os.dup(2), "w") as _terminal:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        except BaseException:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(saved[1], keep.read_bytes())
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in enumerate(saved, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)
            _terminal = sys.stderr


_terminal = sys.stderr


def _progress(text: str) -> None:
    with suppress(OSError):
        if _terminal.isatty():
            print(text, end="\r", file=_terminal, flush=True)
