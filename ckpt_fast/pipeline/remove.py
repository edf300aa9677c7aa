# SPDX-License-Identifier: Apache-2.0
"""Remove: take tensors and objects out of a checkpoint, in steps that a crash may end anywhere."""

from __future__ import annotations

import logging
import os
from typing import TypeVar

from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast.errors import CheckpointWriteError
from ckpt_fast.format.names import LAYOUT_ATTRIBUTE, METADATA_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.load.decode import read_contents
from ckpt_fast.pipeline.save.encode import pickle_metadata
from ckpt_fast.pipeline.save.seal import seal
from ckpt_fast.storage.files import Files

T = TypeVar("T")
logger = logging.getLogger(__name__)


def remove_named(files: Files, prefix: str) -> list[str]:
    """Local. Remove all tensors and objects whose name begins with ``prefix``.

    Their bytes leave the disk with the data files in which nothing else is. Nothing happens, but for a
    warning, if there is no such name.

    Args:
        files: the checkpoint.
        prefix: beginning of the names.

    Returns:
        The names removed.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: see ``read_contents``.
        CheckpointWriteError: the checkpoint is as before, or without the tensors but with their files.
    """
    files.fetch((METADATA_FILE, SIDECAR_FILE))
    contents = read_contents(files.directory)
    metadata, manifest = contents.metadata, contents.manifest
    names = [name for name in metadata.state_dict_metadata if name.startswith(prefix)]
    if not names:
        logger.warning("%s has nothing whose name begins with %r: nothing is removed", files.name, prefix)
        return []
    before = _files_of(metadata)
    metadata.state_dict_metadata = _others(metadata.state_dict_metadata, prefix)
    if metadata.planner_data is not None:
        metadata.planner_data = _others(metadata.planner_data, prefix)
    metadata.storage_data = {
        index: info for index, info in metadata.storage_data.items() if not index.fqn.startswith(prefix)
    }
    # Plans of the save that wrote it, where its writer keeps them, would bring the tensors back.
    metadata.__dict__.pop("all_local_plans", None)
    # A name with a folder in it may belong to someone else.
    unused = {name for name in before - _files_of(metadata) if name == os.path.basename(name)}
    own = hasattr(metadata, LAYOUT_ATTRIBUTE)
    left = manifest.without(unused) if manifest is not None else None
    seal(files, pickle_metadata(metadata, own_layout=own), left)
    _delete(files, unused)
    return names


def _delete(files: Files, names: set[str]) -> None:
    try:
        files.delete(sorted(names))
    except OSError as error:
        raise CheckpointWriteError(
            f"the tensors are removed from {files.name}, but not the files that had them "
            f"({error.filename}: {error.strerror or error}); delete {', '.join(sorted(names))} by hand",
            error.errno,
            error.filename,
        ) from error


def _files_of(metadata: Metadata) -> set[str]:
    return {info.relative_path for info in (metadata.storage_data or {}).values()}


def _others(by_name: dict[str, T], prefix: str) -> dict[str, T]:
    return {name: value for name, value in by_name.items() if not name.startswith(prefix)}
