# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast ls DIR`` and ``ckpt-fast prune DIR``: the checkpoints in a directory."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from ckpt_fast.cli import output

if TYPE_CHECKING:
    from ckpt_fast.tools.listing import Pruned


@click.command("ls")
@click.argument("directory")
@output.json_option
@output.exit_status
def ls(directory: str, as_json: bool) -> int:
    """List the checkpoints in DIRECTORY: complete? selected? to recover from? resumed from? size, age.

    A run resumes from the selected one. One that is not complete is of a save that is going on, or was
    interrupted; `ckpt-fast prune` removes what is old.
    """
    from ckpt_fast.tools.listing import list_directory

    found = list_directory(directory)
    if as_json:
        output.print_json(found)
        return output.DONE
    rows = [
        [
            os.path.relpath(each.path, directory) if "://" not in each.path else each.path,
            "?" if each.iteration is None else str(each.iteration),
            each.format or "",
            "yes" if each.is_complete else "no",
            "yes" if each.is_selected else "",
            "yes" if each.is_recovery else "",
            "" if each.resumed_from is None else str(each.resumed_from),
            "abandoned" if each.is_abandoned else "",
            output.size(each.nbytes),
            output.age(each.age_s),
        ]
        for each in found
    ]
    columns = [
        *(
            "name",
            "iteration",
            "format",
            "complete",
            "selected",
            "recovery",
            "resumed from",
            "branch",
            "size",
        ),
        "age",
    ]
    # Most runs were never interrupted.
    for title in ("branch", "resumed from"):
        number = columns.index(title)
        if not any(row[number] for row in rows):
            columns.pop(number)
            rows = [[*row[:number], *row[number + 1 :]] for row in rows]
    output.print_table(columns, rows, ("iteration", "resumed from", "size", "age"))
    for each in found:
        if each.damage is not None:
            output.line(f"{os.path.basename(each.path)}: {each.damage}", "yellow")
    return output.DONE


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _duration(text: str) -> float:
    """Seconds, or a number with one of the units of time."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no duration such as 90m, 12h or 7d")
    return float(match[1]) * _UNITS[match[2] or "s"]


def _size(text: str) -> int:
    """Bytes, or a number with one of the units of size, in powers of ten."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no size such as 800MB, 500GB or 2T")
    return int(float(match[1]) * _SIZES[match[2]])


def _parsed(parse: Callable[[str], Any]) -> Callable[..., Any]:
    return lambda context, option, value: None if value is None else parse(value)


@click.command()
@click.argument("directory")
@click.option("--keep", type=click.IntRange(min=0), help="Keep so many of the newest.")
@click.option("--keep-every", type=click.IntRange(min=0), help="Keep iterations that are multiples of this.")
@click.option("--keep-best", type=click.IntRange(min=0), help="Keep so many with the best --metric.")
@click.option("--metric", default="loss", show_default=True, help="What was saved with the checkpoints.")
@click.option("--highest", is_flag=True, help="The highest --metric is the best, not the lowest.")
@click.option("--keep-for", metavar="AGE", callback=_parsed(_duration), help="Keep younger ones: 12h, 7d.")
@click.option(
    "--max-size", metavar="SIZE", callback=_parsed(_size), help="Keep no more than that: 500GB, 2TB."
)
@click.option(
    "--abandoned", is_flag=True, help="Delete what abandoned branches have left, newer ones as well."
)
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@output.json_option
@output.exit_status
def prune(
    directory: str,
    keep: int | None,
    keep_every: int | None,
    keep_best: int | None,
    metric: str,
    highest: bool,
    keep_for: float | None,
    max_size: int | None,
    abandoned: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Delete old checkpoints in DIRECTORY, never the selected one, nor one that is newer.

    A checkpoint stays if one of the --keep options keeps it; with none of them, all stay that --max-size
    allows. Those that are not complete do not count, and are deleted if they are older than the selected one;
    so are those that an abandoned branch has left. A crash leaves nothing that passes for a whole checkpoint;
    call it again. Exit status: 0 done, 2 some could not be deleted.
    """
    from ckpt_fast.retention.policies import KeepBest, KeepEvery, KeepFor, KeepNewest, MaxBytes, Policy
    from ckpt_fast.tools.listing import prune as delete

    asked: tuple[Policy | None, ...] = (
        KeepNewest(keep) if keep is not None else None,
        KeepEvery(keep_every) if keep_every else None,
        KeepBest(keep_best, metric, highest) if keep_best is not None else None,
        KeepFor(keep_for) if keep_for is not None else None,
        MaxBytes(max_size) if max_size is not None else None,
    )
    policies = [each for each in asked if each is not None]
    if not policies and not abandoned:
        raise click.UsageError(
            "say what is to be kept: --keep, --keep-every, --keep-best, --keep-for, --max-size"
        )
    with output.progress_bar("deleting", in_bytes=False) as progress:
        found = delete(directory, policies, with_abandoned=abandoned, dry_run=dry_run, progress=progress)
    if as_json:
        output.print_json({**dataclasses.asdict(found), "dry_run": dry_run})
    else:
        _print_pruned(found, "would delete" if dry_run else "deleted")
    for failure in found.failures:
        output.fail(failure)
    return output.FAILED if found.failures else output.DONE


def _print_pruned(found: Pruned, verb: str) -> None:
    for path in found.removed:
        branch = " (abandoned branch)" if path in found.abandoned else ""
        output.line(f"{verb} {path}{branch}")
    for path in found.abandoned:
        if path not in found.removed:
            output.line(f"left by an abandoned branch: {path}", "yellow")
    size = output.size(found.nbytes)
    output.line(f"{verb} {len(found.removed)} ({size}), kept {len(found.kept)}", "bold")
