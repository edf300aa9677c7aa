# SPDX-License-Identifier: Apache-2.0
"""The unsharded part of a Megatron-Core checkpoint, and whether there is a checkpoint at all."""

from __future__ import annotations

import argparse
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from ckpt_fast import settings
from ckpt_fast.doors.megatron.stock_common import warn_of_refusal
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from ckpt_fast.format.documents import parse_json
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.names import COMMON_FILE, COMMON_STATE_KEY, SEAL_FILE
from ckpt_fast.pipeline.load.decode import decode_object
from ckpt_fast.pipeline.load.load import load_objects
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.save.objects import object_bytes, require_loadable
from ckpt_fast.storage import objects
from ckpt_fast.storage.objects.client import checkpoint_files, object_storage
from ckpt_fast.storage.small_files import LARGEST_TEXT, read_small_file

# The common state, in errors.
_NAME = "the common state"
_NEEDED_IN_SEAL = {"sharded_backend", "sharded_backend_version"}


def open_checkpoint(checkpoint_dir: str | os.PathLike[str], wanted: Collection[str] = ()) -> OpenCheckpoint:
    """Local. A checkpoint of Megatron-Core, to be read and closed.

    Args:
        checkpoint_dir: a path or URL.
        wanted: small files that will be decoded besides those of Megatron-Core.
    """
    files = checkpoint_files(checkpoint_dir)
    return OpenCheckpoint(files, (SEAL_FILE, COMMON_FILE, *wanted))


def is_sealed(checkpoint_dir: str) -> bool:
    """Local. Whether the directory has the ``metadata.json`` that Megatron-Core writes last.

    Raises:
        CheckpointCorruptError: it has one that cannot be understood.
        StorageError: object storage does not let anyone tell.
    """
    path = os.path.join(checkpoint_dir, SEAL_FILE)

    def read() -> bytes:
        if object_storage(checkpoint_dir) is None:
            return read_small_file(path, LARGEST_TEXT)
        return objects.read(path)

    return _sound_seal(read, path) is not None


def has_seal(checkpoint: OpenCheckpoint) -> bool:
    """Local. ``is_sealed`` of a checkpoint that is open."""
    return _seal_of(checkpoint) is not None


def require_torch_dist(checkpoint: OpenCheckpoint) -> None:
    """Local. Nothing, if the ``metadata.json`` names the one format that is read here, or there is none.

    Raises:
        CheckpointMismatchError: another backend wrote the checkpoint.
        CheckpointCorruptError: it names another one, but ckpt_fast wrote the checkpoint.
    """
    try:
        seal = _parse_seal(lambda: checkpoint.read(SEAL_FILE, LARGEST_TEXT))
    except ValueError:
        return
    if seal is None:
        return
    backend = seal.get("sharded_backend", "torch_dist")
    if backend != "torch_dist":
        if checkpoint.is_own:
            raise CheckpointCorruptError(
                f"{checkpoint.name}/{SEAL_FILE} is damaged: it names the backend {backend!r}, but the "
                "files are those of 'torch_dist'. Load an earlier iteration, or restore the file."
            )
        raise CheckpointMismatchError(
            f"{checkpoint.name} was written with the backend {backend!r}; only 'torch_dist' can be read. "
            "Load it with the Megatron-Core that wrote it, and save it with ckpt_format='torch_dist'."
        )


def _seal_of(checkpoint: OpenCheckpoint) -> dict[str, Any] | None:
    path = os.path.join(checkpoint.name, SEAL_FILE)
    return _sound_seal(lambda: checkpoint.read(SEAL_FILE, LARGEST_TEXT), path)


def _sound_seal(read: Callable[[], bytes], path: str) -> dict[str, Any] | None:
    """The content of a ``metadata.json``; None if there is none.

    Raises:
        CheckpointCorruptError: it cannot be understood.
    """
    try:
        seal = _parse_seal(read)
        # Megatron-Core does without the others.
        missing = set() if seal is None else _NEEDED_IN_SEAL - seal.keys()
        if missing:
            raise ValueError(f"it does not name {' and '.join(sorted(missing))}")
    except ValueError as error:
        raise CheckpointCorruptError(
            f"{path} cannot be parsed ({error}): the file is damaged. Load an earlier iteration."
        ) from error
    return seal


def _parse_seal(read: Callable[[], bytes]) -> dict[str, Any] | None:
    try:
        seal = parse_json(read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(seal, dict):
        raise ValueError("it holds no names")
    return seal


def load_common_state_dict(checkpoint_dir: str) -> dict[str, Any]:
    """Local. The part of a checkpoint that is not sharded, from ``common.pt`` or, since 0.19, the data files.

    Args:
        checkpoint_dir: the checkpoint.

    Raises:
        CheckpointNotFoundError: the directory is not a complete torch_dist checkpoint.
        CheckpointCorruptError, UnsafeCheckpointError: see ``decode_object``.
        CheckpointCorruptError: ``common.pt`` is not the one that the manifest names.
    """
    with open_checkpoint(checkpoint_dir) as checkpoint:
        return read_common_state(checkpoint)


def common_bytes(state: Any) -> bytes:
    """Local. The content of ``common.pt``.

    Raises:
        UnsafeCheckpointError: a part of the state could not be loaded again.
    """
    plain = plain_numbers(state)
    content = object_bytes(plain, _NAME)
    warn_of_refusal(plain, content, _NAME)
    return content


def common_bytes_of(content: bytes) -> bytes:
    """Local. ``common_bytes`` of what Megatron-Core has written; where a load would refuse that and a warning
    is all that is wanted, it stays as it is."""
    require_loadable(content, _NAME)
    try:
        state = decode_object(content, COMMON_FILE, verify=False)
    except UnsafeCheckpointError:
        return content
    return common_bytes(state)


def plain_numbers(state: Any) -> Any:
    """The state with Python's numbers in place of NumPy's scalars, which Megatron-Core does not load."""
    if type(state) in (dict, OrderedDict):
        return type(state)((key, plain_numbers(value)) for key, value in state.items())
    if type(state) in (list, tuple):
        return type(state)(map(plain_numbers, state))
    if type(state) is argparse.Namespace:
        return argparse.Namespace(**plain_numbers(vars(state)))
    if isinstance(state, np.generic):
        plain = state.item()
        return plain if type(plain) in (bool, int, float, complex, str, bytes) else state
    return state


def read_common_state(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    """Local. ``load_common_state_dict`` of a checkpoint that is open."""
    if not has_seal(checkpoint):
        directory = checkpoint.name
        if _holds_iterations(directory):
            raise CheckpointNotFoundError(
                f"{directory} is a directory of checkpoints: pass the directory of one iteration in it"
            )
        is_there = os.path.exists(directory) or object_storage(directory)
        state = "has no metadata.json" if is_there else "does not exist"
        raise CheckpointNotFoundError(
            f"{directory} is not a complete torch_dist checkpoint: it {state}. An interrupted save "
            "leaves such a directory behind; load an earlier iteration."
        )
    path = os.path.join(checkpoint.directory, COMMON_FILE)
    try:
        content = checkpoint.take(COMMON_FILE)
    except FileNotFoundError:
        if COMMON_STATE_KEY not in checkpoint.index.names:
            raise CheckpointNotFoundError(
                f"{path} is missing; the checkpoint is incomplete. Load an earlier iteration."
            ) from None
        values = load_objects(checkpoint.index, [COMMON_STATE_KEY])[COMMON_STATE_KEY]
        return _require_dict(values[0], f"{COMMON_STATE_KEY} in {checkpoint.directory}")
    if settings.verify_on_load():
        _require_of_save(content, path, checkpoint)
    return _require_dict(decode_object(content, path, verify=True), path)


def require_common_of_save(checkpoint: OpenCheckpoint) -> None:
    """Local. Nothing, if the ``common.pt`` that Megatron-Core reads is the one that the manifest names.

    Megatron-Core before 0.19 replaces it before the rest is saved, and that may come to nothing.

    Raises:
        CheckpointCorruptError: it is another one.
    """
    path = os.path.join(checkpoint.directory, COMMON_FILE)
    try:
        content = checkpoint.take(COMMON_FILE)
    except FileNotFoundError:  # it may be in the data files
        return
    _require_of_save(content, path, checkpoint)


def _require_of_save(content: bytes, path: str, checkpoint: OpenCheckpoint) -> None:
    try:
        manifest = checkpoint.manifest
    except CheckpointNotFoundError:
        return
    record = manifest.files.get(COMMON_FILE) if manifest is not None else None
    if record is not None and record != file_record(COMMON_FILE, content):
        raise CheckpointCorruptError(
            f"{path} is damaged, or of another save than the .metadata that is there. Load an earlier "
            "iteration, or restore the file."
        )


def _holds_iterations(directory: str) -> bool:
    names = os.listdir(directory) if os.path.isdir(directory) else []
    return any(re.fullmatch(r"iter_\d{7,}", name) for name in names)


def _require_dict(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CheckpointCorruptError(f"{where} holds a {type(value).__name__}, not a state dict")
    return dict(value)
