# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast ls DIR`` and ``ckpt-fast prune DIR``: the checkpoints in a directory."""

from __future__ import annotations

import dataclasses
import os

import click

from ckpt_fast.cli import output


@click.command("ls")
@click.argument("directory")
@output.json_option
@output.exit_status
def ls(directory: str, as_json: bool) -> int:
    """List the checkpoints in DIRECTORY: complete? selected? to recover from? size, age.

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
            output.size(each.nbytes),
            output.age(each.age_s),
        ]
        for each in found
    ]
    columns = ("name", "iteration", "format", "complete", "selected", "recovery", "size", "age")
    output.print_table(columns, rows, ("iteration", "size", "age"))
    for each in found:
        if each.damage is not None:
            output.line(f"{os.path.basename(each.path)}: {each.damage}", "yellow")
    return output.DONE


@click.command()
@click.argument("directory")
@click.option("--keep", type=click.IntRange(min=0), required=True, help="Keep so many of the newest.")
@click.option("--keep-every", type=click.IntRange(min=0), default=0, help="Keep multiples of this, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@output.json_option
@output.exit_status
def prune(directory: str, keep: int, keep_every: int, dry_run: bool, as_json: bool) -> int:
    """Delete old checkpoints in DIRECTORY, never the selected one, nor one that is newer.

    Those that are not complete do not count, and are deleted if they are older than the selected one. A
    crash leaves nothing that passes for a whole checkpoint; call it again. Exit status: 0 done, 2 some
    could not be deleted.
    """
    from ckpt_fast.tools.listing import prune as delete

    with output.progress_bar("deleting", in_bytes=False) as progress:
        found = delete(directory, keep, keep_every, dry_run=dry_run, progress=progress)
    if as_json:
        output.print_json({**dataclasses.asdict(found), "dry_run": dry_run})
    else:
        verb = "would delete" if dry_run else "deleted"
        for path in found.removed:
            output.line(f"{verb} {path}")
        size = output.size(found.nbytes)
        output.line(f"{verb} {len(found.removed)} ({size}), kept {len(found.kept)}", "bold")
    for failure in found.failures:
        output.fail(failure)
    return output.FAILED if found.failures else output.DONE
