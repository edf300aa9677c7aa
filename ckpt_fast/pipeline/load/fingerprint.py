# SPDX-License-Identifier: Apache-2.0
"""Telling two versions of a small file apart: do all ranks see the same one?"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.pipeline.load.opened import OpenCheckpoint


class Fingerprint(NamedTuple):
    """A fingerprint of a file's content: just enough to recognise it."""

    crc32: int
    nbytes: int


def fingerprints(checkpoint: OpenCheckpoint, names: Sequence[str]) -> dict[str, Fingerprint | None]:
    """Local. Name to fingerprint of files of a checkpoint, as it is open; None for one that is not there.

    The directory is listed first: a network file system then looks for names that it remembers as absent.
    """
    try:
        os.listdir(checkpoint.directory)
    except OSError:
        return dict.fromkeys(names)
    return {name: _fingerprint(checkpoint, name) for name in names}


def _fingerprint(checkpoint: OpenCheckpoint, name: str) -> Fingerprint | None:
    seen = checkpoint.seen_by_all() if name == METADATA_FILE else None
    if seen is not None:
        return Fingerprint(*seen)
    try:
        content = checkpoint.read(name)
    except (OSError, CheckpointCorruptError):
        return None
    return Fingerprint(zlib.crc32(content), len(content))
