# SPDX-License-Identifier: Apache-2.0
"""What of a Megatron-Core checkpoint is not sharded, and whether there is one at all."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast import megatron, settings
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
from ckpt_fast.pipeline import commit
from ckpt_fast.pipeline.decode import decode_object, is_own
from ckpt_fast.pipeline.documents import parse_json
from ckpt_fast.pipeline.encode import file_record
from ckpt_fast.pipeline.files import Files
from ckpt_fast.pipeline.index import CheckpointIndex
from ckpt_fast.pipeline.load import load_objects
from ckpt_fast.pipeline.manifest import Manifest
from ckpt_fast.pipeline.small_files import LARGEST_TEXT, read_small_file

COMMON_FILE = "common.pt"
# Megatron-Core from 0.19 on keeps the common state in a data file, under this name.
COMMON_STATE_KEY = "common_state/shard_0_1"


class OpenCheckpoint:
    """A checkpoint that is being read: its ``.metadata`` once, when it is first needed.

    Args:
        files: the checkpoint; whoever opened them closes them.
    """

    def __init__(self, files: Files) -> None:
        self.files = files

    @functools.cached_property
    def index(self) -> CheckpointIndex:
        """Errors as of ``require_torch_dist`` and ``CheckpointIndex``."""
        require_torch_dist(self.files)
        return CheckpointIndex(self.files.directory, files=self.files)


@contextlib.contextmanager
def open_checkpoint(checkpoint_dir: str | os.PathLike[str]) -> Iterator[OpenCheckpoint]:
    """Local. The checkpoint in a directory, or in object storage, while the context lasts."""
    with megatron.checkpoint_files(checkpoint_dir) as files:
        yield OpenCheckpoint(files)


def is_sealed(checkpoint_dir: str) -> bool:
    """Local. Whether the directory has the ``metadata.json`` that Megatron-Core writes last.

    Raises:
        CheckpointCorruptError: it has one that cannot be understood.
    """
    path = os.path.join(checkpoint_dir, commit.SEAL_FILE)
    try:
        # Megatron-Core opens whatever is there, and waits for it.
        if megatron.object_storage(checkpoint_dir) is None and _read_seal(path) is None:
            return False
        return bool(megatron.check_is_distributed_checkpoint(checkpoint_dir))
    except (ValueError, TypeError) as error:
        raise CheckpointCorruptError(
            f"{path} cannot be parsed ({error}): the file is damaged. Load an earlier iteration."
        ) from error


def require_torch_dist(files: Files) -> None:
    """Local. Nothing, if the ``metadata.json`` names the one format that is read here, or there is none.

    Raises:
        CheckpointMismatchError: another backend wrote the checkpoint.
        CheckpointCorruptError: it names another one, but ckpt_fast wrote the checkpoint.
    """
    files.fetch([commit.SEAL_FILE])
    try:
        seal = _read_seal(os.path.join(files.directory, commit.SEAL_FILE))
    except ValueError:
        return
    if seal is None:
        return
    backend = seal.get("sharded_backend", "torch_dist")
    if backend != "torch_dist":
        files.fetch([commit.METADATA_FILE])
        if is_own(files.directory):
            raise CheckpointCorruptError(
                f"{files.name}/{commit.SEAL_FILE} is damaged: it names the backend {backend!r}, but the "
                "files are those of 'torch_dist'. Load an earlier iteration, or restore the file."
            )
        raise CheckpointMismatchError(
            f"{files.name} was written with the backend {backend!r}; only 'torch_dist' can be read. "
            "Load it with the Megatron-Core that wrote it, and save it with ckpt_format='torch_dist'."
        )


def _read_seal(path: str) -> dict[str, Any] | None:
    """The content of a ``metadata.json``; None if there is none. ValueError if it cannot be understood."""
    try:
        seal = parse_json(read_small_file(path, LARGEST_TEXT))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(seal, dict):
        raise ValueError("it holds no names")
    return seal


def load_common_state_dict(checkpoint_dir: str, checkpoint: OpenCheckpoint | None = None) -> dict[str, Any]:
    """Local. The part of a checkpoint that is not sharded, from ``common.pt`` or, since 0.19, the data files.

    Args:
        checkpoint_dir: the checkpoint.
        checkpoint: the same, where more is read of it: ``common.pt`` must be of that save then.

    Raises:
        CheckpointNotFoundError: the directory is not a complete torch_dist checkpoint.
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
        CheckpointCorruptError: ``common.pt`` is not the one that the manifest names.
    """
    if not is_sealed(checkpoint_dir):
        if _holds_iterations(checkpoint_dir):
            raise CheckpointNotFoundError(
                f"{checkpoint_dir} is a directory of checkpoints: pass the directory of one iteration in it"
            )
        is_there = os.path.exists(checkpoint_dir) or megatron.object_storage(checkpoint_dir)
        state = "has no metadata.json" if is_there else "does not exist"
        raise CheckpointNotFoundError(
            f"{checkpoint_dir} is not a complete torch_dist checkpoint: it {state}. An interrupted save "
            "leaves such a directory behind; load an earlier iteration."
        )
    if checkpoint is not None:
        return _read_common_state(checkpoint, checkpoint.index.manifest)
    with open_checkpoint(checkpoint_dir) as opened:
        return _read_common_state(opened, None)


def saved_metadata(checkpoint_dir: str | os.PathLike[str]) -> Metadata:
    """Local. The parsed ``.metadata`` of a checkpoint; errors as of ``OpenCheckpoint.index``."""
    with open_checkpoint(checkpoint_dir) as checkpoint:
        return checkpoint.index.metadata


def _read_common_state(checkpoint: OpenCheckpoint, manifest: Manifest | None) -> dict[str, Any]:
    files = checkpoint.files
    path = os.path.join(files.directory, COMMON_FILE)
    files.fetch([COMMON_FILE])
    try:
        content = read_small_file(path)
    except FileNotFoundError:
        if COMMON_STATE_KEY not in checkpoint.index.metadata.state_dict_metadata:
            raise CheckpointNotFoundError(
                f"{path} is missing; the checkpoint is incomplete. Load an earlier iteration."
            ) from None
        values = load_objects(checkpoint.index, [COMMON_STATE_KEY])[COMMON_STATE_KEY]
        return _require_dict(values[0], f"{COMMON_STATE_KEY} in {files.directory}")
    state = _require_dict(decode_object(content, path, verify=True), path)
    if manifest is not None and settings.verify_on_load():
        _require_of_save(content, path, manifest)
    return state


def _require_of_save(content: bytes, path: str, manifest: Manifest) -> None:
    record = manifest.files.get(COMMON_FILE)
    if record is not None and record != file_record(COMMON_FILE, content):
        raise CheckpointCorruptError(
            f"{path} is damaged, or of another save than {manifest.save_id}, whose .metadata is there. Load "
            "an earlier iteration, or restore the file."
        )


def _holds_iterations(directory: str) -> bool:
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(re.fullmatch(r"iter_\d{7,}", name) for name in names)


def _require_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(f"{where} holds a {type(value).__name__}, not a state dict")
    return dict(value)
