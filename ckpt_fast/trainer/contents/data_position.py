# SPDX-License-Identifier: Apache-2.0
"""The position in the data that belongs to a checkpoint: is what lies beside it what was saved with it?"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage import replacement
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.storage.small_files import LARGEST_FILE
from ckpt_fast.trainer.places.paths import file_exists, join_paths, read_file

# In the state dict of a local checkpoint, and in the context that a load leaves.
FILES_KEY = "dataloader_state_files"


def files_of(checkpoint: OpenCheckpoint) -> list[FileRecord]:
    """Local. The files of data loaders that a checkpoint vouches for, by names as ``iter_*/FILE``."""
    try:
        manifest = checkpoint.manifest
    except CheckpointError:
        return []  # whoever loads it says so
    return list(manifest.beside.values()) if manifest is not None else []


def require_files(root: str | None, files: Iterable[FileRecord]) -> None:
    """Local. Check that the states of data loaders below ``root`` are those of the checkpoint.

    A directory that is gone as a whole passes: it may have been left behind when the checkpoint was moved.
    Resuming then says that the position is lost.

    Raises:
        CheckpointCorruptError: naming the first that is missing or differs.
    """
    if root is None or not settings.verify_on_load():
        return
    for record in files:
        if places_of(join_paths(root, record.path.partition("/")[0])):
            read_recorded(join_paths(root, record.path), record)


def places_of(directory: str) -> list[str]:
    """Local. Where the states of data loaders of one iteration may be; nowhere if there are none.

    A save that replaces an iteration exchanges first the checkpoint, and then ``directory``, with what lies
    beside it. If it was killed in between, the states of the new checkpoint still lie there.
    """
    if object_storage(directory):
        return [directory] if file_exists(directory) else []
    return replacement.places(directory)


def read_recorded(path: str, record: FileRecord) -> bytes:
    """Local. The state of a data loader that was saved with the checkpoint, by its path and record.

    Raises:
        CheckpointCorruptError: it is missing, or what is there differs.
    """
    directory, name = path.rsplit("/", 1)
    paths = [join_paths(place, name) for place in places_of(directory)]
    contents = {each: read_file(each, LARGEST_FILE) for each in paths if file_exists(each)}
    for content in contents.values():
        if (len(content), zlib.crc32(content)) == record[1:]:
            return content
    if path not in contents:
        raise CheckpointCorruptError(
            f"{path} is missing, the state of a data loader that was saved with the checkpoint. Restore "
            "the file, or remove its directory to start the data from its beginning."
        )
    content = contents[path]
    raise CheckpointCorruptError(
        f"{path} is not the state of the data loader that was saved with the checkpoint: it has "
        f"{len(content)} bytes of CRC-32 {zlib.crc32(content):08x} instead of {record.nbytes} of "
        f"{record.crc32:08x}. It is damaged, or of another save. Load an earlier iteration, or restore "
        "the file."
    )


def record_for(path: str, files: Any) -> FileRecord | None:
    """The entry for the file at ``path`` in ``files``, if there are any."""
    name = "/".join(path.rsplit("/", 2)[-2:])
    return next((record for record in files or () if record.path == name), None)
