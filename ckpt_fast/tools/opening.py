# SPDX-License-Identifier: Apache-2.0
"""A checkpoint opened to be looked at: whoever wrote it, wherever it is."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Any, Literal

from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.documents import parse_json, parse_yaml
from ckpt_fast.format.names import COMMON_FILE, COMMON_STATE_KEY, METADATA_FILE, SEAL_FILE
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.load.load import load_objects
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage.files import Directory, Files
from ckpt_fast.storage.small_files import LARGEST_TEXT

Format = Literal["torch_dist", "fsdp_dtensor", "dcp", "local"]

_OBJECT_STORAGE = re.compile(r"msc:/")
_ITERATION = re.compile(r"(?:iter|step|checkpoint|global_step)[_-]?0*(\d+)")
_CONFIG_FILE = "run_config.yaml"


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[OpenCheckpoint]:
    """A checkpoint, open for reading until the block ends. Local.

    Args:
        path: the checkpoint, or a directory of checkpoints with trackers: the one that they name. Also
            ``msc://...``.

    Raises:
        CheckpointNotFoundError: there is none.
        CheckpointCorruptError: it is damaged.
        CheckpointError: it cannot be read.
    """
    place = checkpoint_at(os.fspath(path))
    with OpenCheckpoint(files_at(place), (SEAL_FILE, COMMON_FILE, _CONFIG_FILE)) as checkpoint:
        try:
            _ = checkpoint.manifest
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{place} cannot be read ({error.strerror or error})") from error
        yield checkpoint


def files_at(path: str) -> Files:
    """The files of a checkpoint; the caller closes them.

    Raises:
        CheckpointNotFoundError: a path that is no directory.
        UnavailableError: object storage, and multi-storage-client is not installed.
    """
    if in_object_storage(path):
        from ckpt_fast.storage.objects.client import checkpoint_files

        return checkpoint_files(path)
    if not os.path.isdir(path):
        problem = "is no directory" if os.path.lexists(path) else "does not exist"
        raise CheckpointNotFoundError(f"{path} {problem}; a checkpoint is a directory with {METADATA_FILE}")
    return Directory(path)


def in_object_storage(path: str) -> bool:
    """Whether a path is one of multi-storage-client's, which is enabled then: the user has asked for it.

    Raises:
        UnavailableError: multi-storage-client is not installed.
    """
    if not _OBJECT_STORAGE.match(path):
        return False
    from ckpt_fast.storage.objects.client import enable_object_storage

    enable_object_storage()
    return True


def checkpoint_at(path: str) -> str:
    """The path of a checkpoint: of the selected one, if it is a directory of checkpoints with trackers.

    Raises:
        CheckpointNotFoundError: it has checkpoints, but none is selected.
    """
    if in_object_storage(path):
        from ckpt_fast.storage import objects

        if objects.kind_of(os.path.join(path, METADATA_FILE)) is not None:
            return path
    elif not _may_hold_checkpoints(path):
        return path
    from ckpt_fast.trainer.places.catalog import NOTHING, iterations_in, published
    from ckpt_fast.trainer.places.paths import get_checkpoint_name

    newest = published(path)
    if newest.iteration == NOTHING and not newest.is_release:
        if not iterations_in(path):
            return path
        raise CheckpointNotFoundError(
            f"{path} is a directory of checkpoints, and none in it is selected: name one of them"
        )
    return get_checkpoint_name(path, newest.iteration, newest.is_release)


def _may_hold_checkpoints(path: str) -> bool:
    if not os.path.isdir(path) or os.path.exists(os.path.join(path, METADATA_FILE)):
        return False
    return any(name.startswith(("iter_", "latest")) for name in os.listdir(path))


def format_of(checkpoint: OpenCheckpoint) -> Format:
    """The format of a checkpoint that is open, as far as its small files tell."""
    if checkpoint.holds(SEAL_FILE):
        return "torch_dist"
    notes = checkpoint.manifest.notes if checkpoint.manifest is not None else {}
    if {"iteration", "rank"} <= notes.keys():
        return "local"
    section = run_config(checkpoint).get("checkpoint")
    if isinstance(section, dict) and section.get("ckpt_format") == "fsdp_dtensor":
        return "fsdp_dtensor"
    return "dcp"


def run_config(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """What ``run_config.yaml`` of the checkpoint says; {} if there is none, or it makes no sense."""
    with contextlib.suppress(Exception):  # damage is for ``verify`` to find
        config = parse_yaml(checkpoint.read(_CONFIG_FILE, LARGEST_TEXT))
        return config if isinstance(config, dict) else {}
    return {}


def seal_of(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """What ``metadata.json`` says; {} if there is none.

    Raises:
        CheckpointCorruptError: it makes no sense.
    """
    try:
        seal = parse_json(checkpoint.read(SEAL_FILE, LARGEST_TEXT))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointCorruptError(f"{checkpoint.name}/{SEAL_FILE} cannot be parsed ({error})") from error
    return seal if isinstance(seal, dict) else {}


def common_state(checkpoint: OpenCheckpoint) -> dict[str, Any] | None:
    """What a torch_dist checkpoint has besides tensors and sharded objects; None in other formats.

    Raises:
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
    """
    try:
        content = checkpoint.read(COMMON_FILE)
    except FileNotFoundError:
        if COMMON_STATE_KEY not in checkpoint.index.names:
            return None
        state = load_objects(checkpoint.index, [COMMON_STATE_KEY])[COMMON_STATE_KEY]
        state = state[0] if isinstance(state, list) and len(state) == 1 else state
    else:
        state = decode_object(content, os.path.join(checkpoint.directory, COMMON_FILE), verify=True)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"the common state of {checkpoint.name} is no state dict")
    return dict(state)


def iteration_of(checkpoint: OpenCheckpoint) -> int | None:
    """The training step that a checkpoint is of, as its notes or its name say; None if they do not."""
    notes = checkpoint.manifest.notes if checkpoint.manifest is not None else {}
    if isinstance(notes.get("iteration"), int):
        return int(notes["iteration"])
    match = _ITERATION.match(os.path.basename(checkpoint.name.rstrip("/")))
    return int(match[1]) if match else None
