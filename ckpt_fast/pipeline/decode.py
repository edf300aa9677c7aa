# SPDX-License-Identifier: Apache-2.0
"""Decode: bytes of a checkpoint become metadata and objects, without running any code it brings along."""

from __future__ import annotations

import collections
import functools
import importlib
import io
import json
import os
import pathlib
import pickle
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast import settings
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from ckpt_fast.pipeline.commit import METADATA_FILE, SIDECAR_FILE
from ckpt_fast.pipeline.encode import LAYOUT_ATTRIBUTE, SIDECAR_VERSION, file_record
from ckpt_fast.pipeline.garbage import without_collections
from ckpt_fast.pipeline.types import FileRecord

_DCP = "torch.distributed.checkpoint"
# All that a .metadata file of torch DCP, Megatron-Core or ckpt_fast names. They hold data and do nothing.
_ALLOWED = {
    f"{_DCP}.metadata": {
        "Metadata",
        "StorageMeta",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_DCP}.filesystem": {"_StorageInfo"},
    f"{_DCP}.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"PosixPath", "PurePosixPath", "Path"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "Path"},
}
_RETIRED = "megatron.core.dist_checkpointing.strategies.torch"  # before 0.16
# What torch.save's format before zip archives begins with: a pickled magic number.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# Of an entry in a ZIP archive.
_DIRECTORY = 0x10
# The attribute that marks our layout as it stands, last of all, in the pickle.
_OWN_MARK = b"\x8c\x09" + LAYOUT_ATTRIBUTE.encode() + b"\x94"
_OWN_MARK_WITHIN = 128
_REMEDY = (
    "If you trust where the checkpoint comes from, set CKPT_FAST_ALLOW_PICKLE=1: loading may then run code "
    "that the checkpoint names."
)


@without_collections
def read_metadata(directory: str, prefix: str = "") -> Metadata:
    """The parsed ``.metadata`` of a checkpoint.

    Args:
        directory: the checkpoint.
        prefix: "__3" for the metadata that rank 3 wrote when saving without collectives.

    Raises:
        CheckpointNotFoundError: the directory or the file is missing.
        CheckpointCorruptError: the file cannot be parsed, or is not the one its sidecar names.
        UnsafeCheckpointError: it names something other than torch DCP's data classes.
    """
    name = prefix + METADATA_FILE
    path = os.path.join(directory, name)
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError as error:
        missing = f"it has no {name} file"
        if not os.path.isdir(directory):
            missing = "the directory does not exist"
        raise CheckpointNotFoundError(
            f"{directory} is not a complete checkpoint: {missing}. A save that was interrupted leaves such a "
            "directory behind; load an earlier iteration."
        ) from error
    # Only our own .metadata must be the one the sidecar names; a stock writer may have replaced it.
    checked = settings.verify_on_load() and has_own_mark(content)
    if checked and _differs_from_sidecar(directory, name, content):
        raise CheckpointCorruptError(
            f"{path} is damaged: it is not what {SIDECAR_FILE} says was written. Load an earlier iteration."
        )
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointCorruptError(
            f"{path} cannot be parsed ({type(error).__name__}: {error}). The file is damaged; load an "
            "earlier iteration."
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointCorruptError(f"{path} holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata


def has_own_mark(content: bytes) -> bool:
    """Whether ckpt_fast wrote this ``.metadata``; only then does the sidecar beside it belong to it."""
    return _OWN_MARK in content[-_OWN_MARK_WITHIN:]


def _differs_from_sidecar(directory: str, name: str, content: bytes) -> bool:
    named = [file for file in read_sidecar(directory) or () if file.path == name]
    return bool(named) and named != [file_record(name, content)]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return _stand_in(module, name)
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if (module, name) == (_RETIRED, "MCoreMetadata"):
            return _stand_in(f"{_DCP}.metadata", "Metadata")
        if (module, name) == (_RETIRED, "MCoreSavePlan"):
            return _Ignored
        if settings.pickle_allowed():
            return super().find_class(module, name)
        raise UnsafeCheckpointError(
            f"refused to load {module}.{name}, which checkpoint metadata never needs. {_REMEDY}"
        )


def _known(module: str, name: str) -> Any:
    # Python moved pathlib's classes between versions; collections and torch's have stayed.
    if module.startswith("pathlib"):
        return getattr(pathlib, name)
    if module == "collections":
        return getattr(collections, name)
    return getattr(importlib.import_module(module), name)


class _StandIn(type):
    """Takes the place of a class or function while unpickling, and makes what ``real`` makes.

    A pickle may set attributes of anything on its stack. It must not get hold of the real class.
    """

    real: Any

    def __call__(cls, *args: Any) -> Any:
        return cls.real(*args)

    def __setstate__(cls, _state: Any) -> None:
        raise UnsafeCheckpointError(f"refused to change {cls.real!r}, as checkpoint metadata never does")


@functools.cache
def _stand_in(module: str, name: str) -> _StandIn:
    real = _known(module, name)

    def new(_cls: type, *args: Any) -> Any:
        return real.__new__(real, *args)

    return _StandIn(name, (), {"real": real, "__new__": new})


class _Ignored:
    """Takes the place of a class whose data nobody reads any more."""

    def __setstate__(self, _state: Any) -> None: ...


def decode_object(payload: bytes, where: str, verify: bool) -> Any:
    """The value of an object item, as ``torch.load`` gives it with ``weights_only``.

    Args:
        payload: the whole item.
        where: names the item in errors.
        verify: check the archive's CRC-32s first.

    Raises:
        CheckpointCorruptError: a checksum differs or the archive is damaged.
        UnsafeCheckpointError: the value is made of more than tensors and plain data.
    """
    if not payload.startswith((b"PK", _LEGACY_MAGIC)):
        raise CheckpointCorruptError(
            f"{where} is damaged: torch.save did not write it; load an earlier iteration"
        )
    if verify and payload.startswith(b"PK"):
        _require_sound_archive(payload, where)
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=not settings.pickle_allowed())
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f"{where} holds more than tensors and plain data: {error}. {_REMEDY}"
        ) from error
    except Exception as error:
        raise CheckpointCorruptError(
            f"{where} cannot be read ({type(error).__name__}: {error}); load an earlier iteration"
        ) from error


def undo_transforms(payload: bytes, descriptors: Sequence[str], extensions: Any = None) -> bytes:
    """An item as it was before torch DCP's stream transforms (compression) were applied.

    Args:
        payload: the item as it is in the file.
        descriptors: the transforms, the one applied last first.
        extensions: torch DCP's ``ExtensionRegistry`` with the transforms known here; None: torch's own.

    Raises:
        CheckpointMismatchError: a transform is not known here.
        CheckpointCorruptError: a transform cannot make sense of the item.
    """
    if not descriptors:
        return payload
    try:
        extensions = _default_extensions() if extensions is None else extensions
        transforms = extensions.from_descriptor_list(descriptors)
    except (ImportError, ValueError) as error:
        raise CheckpointMismatchError(
            f"the checkpoint was written with the stream transforms {list(descriptors)}, which cannot be "
            f"undone here: {error}"
        ) from error
    stream: Any = io.BytesIO(payload)
    try:
        for transform in transforms:
            stream = transform.transform_from(stream)
        content: bytes = stream.read(-1)
    except Exception as error:
        raise CheckpointCorruptError(
            f"an item cannot be brought back through the stream transforms {list(descriptors)} "
            f"({type(error).__name__}: {error}); load an earlier iteration"
        ) from error
    return content


def _default_extensions() -> Any:
    # Not in torch 2.6, whose checkpoints have no transforms.
    from torch.distributed.checkpoint._extension import ExtensionRegistry

    return ExtensionRegistry()


def _require_sound_archive(payload: bytes, where: str) -> None:
    try:
        archive = zipfile.ZipFile(io.BytesIO(payload))
        damaged = archive.testzip()
        for member in archive.infolist():
            # torch would read nothing of it, and return whatever lies in memory.
            if member.external_attr & _DIRECTORY or (
                member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size
            ):
                raise ValueError(f"the archive's entry for {member.filename} makes no sense")
    except Exception as error:  # zipfile has no common type for what damage makes of a header
        raise CheckpointCorruptError(f"{where} is damaged ({error}); load an earlier iteration") from error
    if damaged is not None:
        raise CheckpointCorruptError(
            f"{where} is damaged: the checksum of {damaged} differs; load an earlier iteration"
        )


def read_sidecar(directory: str) -> list[FileRecord] | None:
    """The sidecar's file list; None for a checkpoint that has no sidecar (written by somebody else).

    Raises:
        CheckpointCorruptError: the sidecar cannot be parsed.
    """
    path = os.path.join(directory, SIDECAR_FILE)
    try:
        with open(path, "rb") as file:
            document = json.load(file)
        if document["version"] > SIDECAR_VERSION:
            return None
        return [
            FileRecord(name, int(entry["nbytes"]), int(entry["crc32"], 16))
            for name, entry in document["files"].items()
        ]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(
            f"{path} cannot be parsed ({error}); load an earlier iteration, or delete this file to load "
            "without checking lengths"
        ) from error
