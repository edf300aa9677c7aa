# SPDX-License-Identifier: Apache-2.0
"""How commands print: rich on a terminal, plain lines in a pipe, JSON if it is asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from ckpt_fast.jobs.progress import hidden

DONE, DAMAGED, FAILED = 0, 1, 2

# What is over sooner needs no bar.
_PATIENCE_S = 1.0
_BARS = " ▁▂▃▄▅▆▇█"

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """The option that all commands have."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def exit_status(function: Callable[..., int]) -> Callable[..., int]:
    """Let a command report errors in a line each, without a traceback.

    1 if a checkpoint is damaged; 2 if something could not be read, written or understood.
    """

    @functools.wraps(function)
    def run(*args: Any, **named: Any) -> int:
        try:
            return function(*args, **named)
        except CheckpointCorruptError as error:
            fail(error)
            return DAMAGED
        except (CheckpointError, OSError, ValueError, ImportError) as error:
            fail(error)
            return FAILED

    return run


def fail(error: object) -> None:
    """Print an error."""
    sys.stderr.write(f"ckpt-fast: {error}\n")


def is_terminal() -> bool:
    """Whether somebody looks at what is printed."""
    return sys.stdout.isatty()


def console() -> Console:
    """Of the standard output, which is a terminal."""
    return Console(file=sys.stdout, highlight=False)


def line(text: str = "", style: str = "") -> None:
    """Print a line; ``style`` is for terminals."""
    if is_terminal():
        console().print(escape(text), style=style or None, soft_wrap=True)
    else:
        sys.stdout.write(f"{text}\n")


def print_json(value: Any) -> None:
    """Print a value of dataclasses, containers and numbers as one JSON document."""
    sys.stdout.write(json.dumps(_plain(value), indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print a table; in a pipe with a line for each row, and aligned.

    Args:
        columns: titles.
        rows: cells; a line break in one is a space.
        right: titles of the columns that are aligned to the right.
    """
    cells = [[" ".join(cell.split()) for cell in row] for row in rows]
    if is_terminal():
        table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
        for title in columns:
            table.add_column(title, justify="right" if title in right else "left", overflow="fold")
        for row in cells:
            table.add_row(*map(escape, row))
        console().print(table)
        return
    lines = [list(columns), *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        parts = [
            cell.rjust(width) if title in right else cell.ljust(width)
            for cell, width, title in zip(row, widths, columns, strict=True)
        ]
        sys.stdout.write("  ".join(parts).rstrip() + "\n")


@contextlib.contextmanager
def progress_bar(what: str, *, in_bytes: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and what there is; draws a bar where standard error is a terminal.

    The bar appears after a second.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    columns = [TextColumn(what), BarColumn()]
    columns += [DownloadColumn()] if in_bytes else [TextColumn("{task.completed:.0f} of {task.total:.0f}")]
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(what)
    begin, is_shown = time.monotonic(), False

    def advance(done: int, total: int) -> None:
        nonlocal is_shown
        bar.update(task, completed=done, total=total)
        if not is_shown and time.monotonic() - begin > _PATIENCE_S:
            is_shown = True
            bar.start()

    try:
        with hidden():
            yield advance
    finally:
        bar.stop()


def size(nbytes: int) -> str:
    """A number of bytes for people, in powers of ten."""
    if nbytes < 1000:
        return f"{nbytes} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000  # type: ignore[assignment]
        if nbytes < 999.5 or unit == "TB":
            break
    return f"{nbytes:.3g} {unit}"


def age(seconds: float | None) -> str:
    """How long ago something was, for people."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(value: float) -> str:
    """A number with as many digits as are of use."""
    return f"{value:.6g}"


def bar(value: float, most: float, width: int = 30) -> str:
    """A horizontal bar for a value between 0 and ``most``."""
    return "█" * max(1, round(width * value / most)) if most > 0 and value > 0 else ""


def sparkline(values: Sequence[float]) -> str:
    """Values from 0 up, as a character each."""
    most = max(values, default=0.0)
    if most <= 0:
        return _BARS[1] * len(values)
    return "".join(_BARS[max(1, round(value / most * (len(_BARS) - 1)))] for value in values)


def _plain(value: Any) -> Any:
    """A value that JSON can express: it has no infinity, and no NaN."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_plain, value))
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
