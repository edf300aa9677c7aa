# SPDX-License-Identifier: Apache-2.0
"""``ckpt-fast verify PATH...``: is what is stored what was written?"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import click

from ckpt_fast.cli import output
from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError
from ckpt_fast.verification.report import Verdict, VerifyReport, lines_of
from ckpt_fast.verification.verify import verify as check

_SOUND, _DAMAGED, _NOT_CHECKED = 0, 1, 2
_STATUS = {Verdict.SOUND: _SOUND, Verdict.DAMAGED: _DAMAGED}


@click.command("verify")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option("--deep", is_flag=True, help="Read every byte, and compare checksums.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object for each path.")
@output.exit_status
def verify(paths: tuple[str, ...], deep: bool, as_json: bool) -> int:
    """Check that checkpoints are what was written, whoever wrote them: ckpt_fast, Megatron-Core, Megatron
    Bridge, torch DCP, nvidia-resiliency-ext.

    PATH is a checkpoint, the directory of a run, or an msc:// URL. Exit status: 0 all sound, 1 one is
    damaged, 2 none is but one could not be checked, or is no checkpoint.
    """
    return run(argparse.Namespace(paths=list(paths), deep=deep, json=as_json))


def run(options: argparse.Namespace) -> int:
    """0 if every checkpoint is sound, 1 if one is damaged, 2 if none is but one could not be checked."""
    statuses = [_verify(path, options) for path in options.paths]
    return _DAMAGED if _DAMAGED in statuses else max(statuses)


def _verify(path: str, options: argparse.Namespace) -> int:
    try:
        if path.startswith("msc://"):
            # Programs switch it on for themselves; who names such a path here means it.
            from ckpt_fast.storage.objects.client import enable_object_storage

            enable_object_storage()
        report = check(path, options.deep)
    except (CheckpointError, ImportError) as error:  # object storage may need what is not installed
        if options.json:
            _write_line({"path": path, "verdict": "unchecked", "sound": None, "error": str(error)})
        else:
            sys.stderr.write(f"{error}\n")
            is_there = not isinstance(error, CheckpointNotFoundError)
            sys.stdout.write(f"{path}: {'could not be checked' if is_there else 'no checkpoint'}\n")
        return _NOT_CHECKED
    if options.json:
        _write_line(report.as_dict())
    else:
        _tell(report)
    return _STATUS.get(report.verdict, _NOT_CHECKED)


def _tell(report: VerifyReport) -> None:
    for line in (*report.damages, *report.unchecked):
        sys.stderr.write(f"{line}\n")
    for line in lines_of(report):
        sys.stdout.write(f"{line}\n")


def _write_line(document: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(document)}\n")
