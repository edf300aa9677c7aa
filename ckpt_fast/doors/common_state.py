# SPDX-License-Identifier: Apache-2.0
"""What of a Megatron-Core checkpoint is not sharded, and whether there is one at all."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast import megatron
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
from ckpt_fast.pipeline import commit
from ckpt_fast.pipeline.decode import decode_object, is_own
from ckpt_fast.pipeline.documents import parse_json
from ckpt_fast.pipeline.files import Files
from ckpt_fast.pipeline.index import CheckpointIndex
from ckpt_fast.pipeline.load import load_objects
from ckpt_fast.pipeline.small_files import LARGEST_TEXT, read_small_file

COMMON_FILE = "common.pt"
# Megatron-Core from 0.19 on keeps the common state in a data file, under this name.
COMMON_STATE_KEY = "common_state/shard_0_1"


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


def load_common_state_dict(checkpoint_dir: str) -> dict[str, Any]:
    """Local. The part of a checkpoint that is not sharded, from ``common.pt`` or, since 0.19, the data files.

    Raises:
        CheckpointNotFoundError: the directory is not a complete torch_dist checkpoint.
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
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
    with megatron.checkpoint_files(checkpoint_dir) as files:
        return _read_common_state(files)


def saved_metadata(checkpoint_dir: str | os.PathLike[str]) -> Metadata:
    """Local. The parsed ``.metadata`` of a checkpoint; errors as of ``CheckpointIndex``."""
    with megatron.checkpoint_files(checkpoint_dir) as files:
        return CheckpointIndex(files.directory, files=files).metadata


def _read_common_state(files: Files) -> dict[str, Any]:
    path = os.path.join(files.directory, COMMON_FILE)
    files.fetch([COMMON_FILE])
    try:
        return _require_dict(decode_object(read_small_file(path), path, verify=True), path)
    except FileNotFoundError:
        index = CheckpointIndex(files.directory, files=files)
        if COMMON_STATE_KEY not in index.metadata.state_dict_metadata:
            raise CheckpointNotFoundError(
                f"{path} is missing; the checkpoint is incomplete. Load an earlier iteration."
            ) from None
        values = load_objects(index, [COMMON_STATE_KEY])[COMMON_STATE_KEY]
        return _require_dict(values[0], f"{COMMON_STATE_KEY} in {files.directory}")


def _holds_iterations(directory: str) -> bool:
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(re.fullmatch(r"iter_\d{7,}", name) for name in names)


def _require_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(f"{where} holds a {type(value).__name__}, not a state dict")
    return dict(value)
