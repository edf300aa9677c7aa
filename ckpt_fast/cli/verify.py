# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast verify PATH...``: is a checkpoint what was written?"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict

import click

from ckpt_fast.cli import output
from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.verify import VerifyReport
from ckpt_fast.pipeline.load.verify import verify as check

_SOUND, _DAMAGED, _NOT_CHECKED = 0, 1, 2


@click.command("verify")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--deep", is_flag=True, help="Read every byte, and compare checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each checkpoint.")
@output.exit_status
def verify(paths: tuple[str, ...], deep: bool, as_json: bool) -> int:
    """Check that checkpoints are what was written: of ckpt_fast, Megatron-Core (torch_dist), torch DCP.

    PATH is a checkpoint, or a directory of checkpoints. Exit status: 0 all sound, 1 one is damaged, 2 one
    could not be checked.
    """
    return run(argparse.Namespace(paths=list(paths), deep=deep, json=as_json))


def run(options: argparse.Namespace) -> int:
    """0 if every checkpoint is sound, 1 if one is damaged, 2 if none is but one could not be checked."""
    statuses = [_verify(path, options) for given in options.paths for path in _checkpoints(given)]
    return _DAMAGED if _DAMAGED in statuses else max(statuses)


def _checkpoints(path: str) -> list[str]:
    """The checkpoints in a directory of checkpoints; otherwise the path itself."""
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, METADATA_FILE)):
        return [path]
    with os.scandir(path) as entries:
        below = sorted(entry.path for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [each for each in below if os.path.exists(os.path.join(each, METADATA_FILE))] or [path]


def _verify(path: str, options: argparse.Namespace) -> int:
    try:
        report = check(path, options.deep)
    except CheckpointError as error:
        return _not_checked(path, error, options)
    if options.json:
        _write_line(json.dumps({**asdict(report), "sound": report.is_sound}))
    else:
        _tell(report)
    return _SOUND if report.is_sound else _DAMAGED


def _tell(report: VerifyReport) -> None:
    for line in (*report.damages, *report.unchecked):
        sys.stderr.write(f"{line}\n")
    result = "ok" if report.is_sound else "damaged"
    if report.unchecked:
        result += f", {len(report.unchecked)} items could not be checked"
    elif report.is_sound and not report.deep:
        result += " (structure and lengths; --deep reads every byte)"
    _write_line(f"{report.path}: {result}")


def _not_checked(path: str, error: CheckpointError, options: argparse.Namespace) -> int:
    what = "no checkpoint" if isinstance(error, CheckpointNotFoundError) else "could not be checked"
    if options.json:
        _write_line(json.dumps({"path": path, "sound": None, "error": str(error)}))
    else:
        sys.stderr.write(f"{error}\n")
        _write_line(f"{path}: {what}")
    return _NOT_CHECKED


def _write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")
