# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast top FILE``: the saves of a run."""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Sequence

import click

from ckpt_fast.cli import output
from ckpt_fast.tools.saves import LoggedSave, SavesLog, read_saves


@click.command()
@click.argument("file")
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Show so many saves.")
@output.json_option
@output.exit_status
def top(file: str, last: int, as_json: bool) -> int:
    """Show a run's saves from FILE, the JSON lines that CKPT_FAST_METRICS names.

    How long each held training up, the seconds from the call until its bytes were durable, GB/s until then,
    and whether it failed. Values of several ranks: the longest times, the sum of the bytes.
    """
    log = read_saves(file)
    if as_json:
        saves = [{**dataclasses.asdict(each), "gb_per_s": each.gb_per_s} for each in log.saves]
        output.print_json({"saves": saves, "unreadable": log.unreadable})
        return output.DONE
    _print(log, log.saves[-last:])
    return output.DONE


def _print(log: SavesLog, shown: Sequence[LoggedSave]) -> None:
    most = max((each.held_up_s for each in shown), default=0.0)
    rows = [
        [
            time.strftime("%m-%d %H:%M:%S", time.localtime(each.time)),
            os.path.basename(each.directory.rstrip("/")),
            str(len(each.ranks)),
            output.size(each.nbytes),
            f"{each.held_up_s:.3f}",
            f"{each.durable_s:.3f}",
            f"{each.gb_per_s:.2f}",
            f"failed: {each.error}" if each.error else output.bar(each.held_up_s, most, 20),
        ]
        for each in shown
    ]
    columns = ("ended", "checkpoint", "ranks", "size", "held up s", "durable s", "GB/s", "held up")
    output.print_table(columns, rows, columns[2:7])
    whole = [each for each in log.saves if each.error is None]
    if whole:
        median = statistics.median(each.held_up_s for each in whole)
        rate = statistics.median(each.gb_per_s for each in whole)
        output.line(
            f"{len(log.saves)} saves, {len(log.saves) - len(whole)} failed; median: held up {median:.3f} s, "
            f"{rate:.2f} GB/s",
            "bold",
        )
        output.line(f"held up, all: {output.sparkline([each.held_up_s for each in log.saves[-80:]])}")
    if log.unreadable:
        output.line(f"{log.unreadable} lines are not of a save", "yellow")
