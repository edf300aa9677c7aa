# SPDX-License-Identifier: Apache-2.0
"""The last step of every save: the checkpoint is sealed, and its report goes to those who want it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch

from ckpt_fast import native
from ckpt_fast.format.manifest import Manifest, append_manifest
from ckpt_fast.format.names import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.jobs import metrics, untold
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.storage.files import Files
from ckpt_fast.version import version

logger = logging.getLogger(__name__)

_last_report: SaveReport | None = None


def last_report() -> SaveReport | None:
    """The report of the newest save of this process that became durable; None before the first."""
    return _last_report


def seal(
    files: Files,
    metadata: bytes,
    manifest: Manifest | None,
    seal_files: Mapping[str, bytes] | None = None,
    *,
    name: str = METADATA_FILE,
    progress: native.Progress | None = None,
) -> None:
    """Local. Make the files that are there a checkpoint: ``.metadata`` with manifest, then the seal files.

    All other files of the checkpoint are durable.

    Args:
        files: the checkpoint.
        metadata: the pickle.
        manifest: what binds the files to their save; None where that is not known.
        seal_files: name to content, in the order in which they are published.
        name: of the metadata.
        progress: of the job that seals; nothing appears once it is stopped.

    Raises:
        CheckpointWriteError: the checkpoint is not sealed; see ``Files.write_in_order``.
    """
    if manifest is None:
        # The sidecar of an older checkpoint would not fit the new metadata.
        files.delete([SIDECAR_FILE])
    content = metadata
    if manifest is not None:
        manifest.notes.setdefault("written_by", _versions())
        content = append_manifest(metadata, manifest)
    files.write_in_order({name: content, **(seal_files or {})}, progress)


@functools.cache
def _versions() -> dict[str, str]:
    return {"ckpt_fast": version(), "torch": str(torch.__version__)}


def report(facts: SaveReport, rank: int, *, is_published: bool = True) -> None:
    """Local. A save of this process is durable: tell all who want to know. None of it can fail the save.

    Args:
        facts: of the save.
        rank: this one.
        is_published: False where nobody will say whether it is; failures before it are still told at exit.
    """
    global _last_report
    _last_report = facts
    if is_published:
        untold.forget()
    metrics.notify(facts, rank)
    is_said = rank == 0 and not facts.is_announced
    logger.log(logging.INFO if is_said else logging.DEBUG, "saved %s: %s", facts.directory, facts)
    logger.debug("%s: %s", facts.directory, facts.details)
