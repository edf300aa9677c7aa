# SPDX-License-Identifier: Apache-2.0
"""The states of data loaders, which belong to a checkpoint and lie beside it."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Sequence

from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.storage import replacement
from ckpt_fast.storage.small_files import read_small_file
from ckpt_fast.verification.content import whole_archive
from ckpt_fast.verification.findings import Findings, length_finding
from ckpt_fast.verification.report import State

# Recovery checkpoints have a root of their own in that of the run.
_NON_PERSISTENT = "non_persistent"
POSITIONS = "energon"


def check_positions(found: Findings, indices: Sequence[CheckpointIndex], path: str) -> None:
    """Compare the states of data loaders with the records of the checkpoint, which names them.

    A directory of them that is gone as a whole is noted: it may have been left behind when the checkpoint was
    moved, and a load starts the data from its beginning then.

    Args:
        found: takes the findings.
        indices: of the checkpoint.
        path: of the checkpoint.
    """
    for index in indices:
        records = index.manifest.beside.values() if index.manifest is not None else ()
        lost = [record for record in records if not _check(found, record, path)]
        if len(lost) == len(records):
            found.notes.extend(
                f"{record.path}, the state of a data loader, is not beside it" for record in lost
            )
            continue
        for record in lost:
            found.file(_shown(record, path), State.MISSING, "is missing: the state of a data loader")


def _check(found: Findings, record: FileRecord, path: str) -> bool:
    """A finding about one of them; returns whether there is one under its name."""
    contents = [content for root in _roots(path) for content in _contents(root, record)]
    if not contents:
        return False
    name = _shown(record, path)
    if any((len(content), zlib.crc32(content)) == (record.nbytes, record.crc32) for content in contents):
        found.file(name, State.SOUND)
        return True
    wrong = length_finding(len(contents[0]), record.nbytes)
    if wrong is None:
        state = State.SWAPPED if whole_archive(contents[0]) else State.FLIPPED
        wrong = state, "is not the state of the data loader that was saved with the checkpoint"
    found.file(name, *wrong)
    return True


def _roots(path: str) -> list[str]:
    parent = os.path.dirname(path if "://" in path else os.path.abspath(path))
    above = [os.path.dirname(parent)] if os.path.basename(parent) == _NON_PERSISTENT else []
    return [*above, parent]


def _shown(record: FileRecord, path: str) -> str:
    up = "../.." if len(_roots(path)) > 1 else ".."
    return f"{up}/{POSITIONS}/{record.path}"


def _contents(root: str, record: FileRecord) -> list[bytes]:
    directory, name = f"{root}/{POSITIONS}/{os.path.dirname(record.path)}", os.path.basename(record.path)
    if "://" in directory:
        from ckpt_fast.storage import objects

        with contextlib.suppress(FileNotFoundError):
            return [objects.read(f"{directory}/{name}")]
        return []
    contents = []
    # A save that was killed while it replaced an iteration may have left them next to their place.
    for place in replacement.places(directory):
        with contextlib.suppress(FileNotFoundError):
            contents.append(read_small_file(os.path.join(place, name)))
    return contents
