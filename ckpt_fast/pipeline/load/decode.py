# SPDX-License-Identifier: Apache-2.0
"""Decode: bytes of a checkpoint become metadata and objects, without running any code it brings along."""

from __future__ import annotations

import functools
import io
import os
import pickle
import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast import settings
from ckpt_fast.errors import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    UnsafeCheckpointError,
)
from ckpt_fast.format.consistency import require_described
from ckpt_fast.format.documents import parse_json
from ckpt_fast.format.inert.kinds import RefusedPickleError
from ckpt_fast.format.inert.saved import read_saved
from ckpt_fast.format.manifest import Manifest, file_record, has_manifest, split_manifest
from ckpt_fast.format.metadata_pickle import REMEDY, unpickle_metadata
from ckpt_fast.format.names import LAYOUT_ATTRIBUTE, METADATA_FILE, SIDECAR_FILE
from ckpt_fast.format.torch_archive import open_archive, require_sound
from ckpt_fast.format.types import FileRecord
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.storage.small_files import read_small_file

_SIDECAR_VERSION = 1
# What torch.save's format before zip archives begins with: a pickled magic number.
_LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
# The attribute that marks our layout as it stands, last of all, in the pickle.
_OWN_MARK = b"\x8c\x09" + LAYOUT_ATTRIBUTE.encode() + b"\x94"
_OWN_MARK_WITHIN = 128


class Sections(NamedTuple):
    """``.metadata`` cut in its parts, the table of contents not yet parsed; see ``Contents`` for the rest.

    ``pickled`` is None where only another rank has read it.
    """

    pickled: bytes | None
    manifest: Manifest | None
    identity: str


class Contents:
    """The description of a checkpoint in its ``.metadata``.

    Args:
        unpickle: makes torch DCP's table of contents.
        manifest: of the save; None if somebody else, or an older version, wrote the checkpoint.
        identity: tells saves apart: the id of the save, or what its ``.metadata`` is like.

    Attributes:
        manifest, identity: as given.
    """

    def __init__(self, unpickle: Callable[[], Metadata], manifest: Manifest | None, identity: str) -> None:
        self._unpickle: Callable[[], Metadata] | None = unpickle
        self.manifest = manifest
        self.identity = identity

    @classmethod
    def of(cls, metadata: Metadata) -> Contents:
        """Metadata that somebody else has read; no manifest is known to belong to it."""
        return cls(lambda: metadata, None, "")

    @cached_property
    def metadata(self) -> Metadata:
        """torch DCP's table of contents, unpickled at the first use; errors as of ``read_contents``."""
        assert self._unpickle is not None
        metadata, self._unpickle = self._unpickle(), None
        return metadata


def read_dcp_metadata(directory: str, prefix: str = "") -> Metadata:
    """``read_contents`` for those who want the metadata alone."""
    return read_contents(directory, prefix).metadata


def read_contents(directory: str, prefix: str = "") -> Contents:
    """The parsed ``.metadata`` of a checkpoint, from one reading of the file.

    Args:
        directory: the checkpoint.
        prefix: "__3" for the metadata that rank 3 wrote when saving without collectives.

    Raises:
        CheckpointNotFoundError: the directory or the file is missing.
        CheckpointCorruptError: the file is not as it was written, or cannot be parsed.
        UnsafeCheckpointError: it names something other than torch DCP's data classes.
    """
    name = prefix + METADATA_FILE
    return parse_contents(_read_sections(directory, name), os.path.join(directory, name))


def parse_contents(sections: Sections, path: str) -> Contents:
    """``read_contents`` of what ``cut_metadata`` has made of the file at ``path``.

    The pickle is read at once only if there is no table, which says the same.
    """
    pickled, manifest, identity = sections
    if pickled is None:
        return Contents(functools.partial(_unpickled_later, path, identity), manifest, identity)
    contents = Contents(functools.partial(_unpickled, pickled, path), manifest, identity)
    if manifest is None or not manifest.encoded_table:
        _ = contents.metadata
    return contents


def _unpickled_later(path: str, identity: str) -> Metadata:
    sections = _read_sections(*os.path.split(path))
    if sections.identity != identity or sections.pickled is None:
        raise CheckpointCorruptError(
            f"{path} was replaced while it was being read, so that the values may be of two saves. Load "
            "again, from a directory that nobody saves to."
        )
    return _unpickled(sections.pickled, path)


@without_collections
def _unpickled(pickled: bytes, path: str) -> Metadata:
    try:
        metadata, end = unpickle_metadata(pickled)
        if not hasattr(metadata, LAYOUT_ATTRIBUTE):  # ours has a checksum
            require_described(metadata)
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path}: {error}") from error
    except Exception as error:
        raise CheckpointCorruptError(
            f"{path} cannot be parsed ({type(error).__name__}: {error}). The file is damaged; load an "
            "earlier iteration."
        ) from error
    if end != len(pickled) and hasattr(metadata, LAYOUT_ATTRIBUTE):
        raise CheckpointCorruptError(
            f"{path} is damaged: what stands behind the table of contents is no manifest. Load an earlier "
            "iteration."
        )
    return metadata


def _read_sections(directory: str, name: str) -> Sections:
    try:
        content = read_small_file(os.path.join(directory, name))
    except FileNotFoundError as error:
        raise missing_metadata(directory, name) from error
    return cut_metadata(content, directory, name)


def missing_metadata(directory: str, name: str = METADATA_FILE) -> CheckpointNotFoundError:
    """The error for a directory that has no file of this name."""
    if os.path.isfile(directory):
        return CheckpointNotFoundError(
            f"{directory} is a file, and a checkpoint is a directory with a {name} file in it"
        )
    missing = f"it has no {name} file" if os.path.isdir(directory) else "the directory does not exist"
    return CheckpointNotFoundError(
        f"{directory} is not a complete checkpoint: {missing}. A save that was interrupted leaves such a "
        "directory behind; load an earlier iteration."
    )


def cut_metadata(content: bytes, directory: str, name: str = METADATA_FILE) -> Sections:
    """The parts of a ``.metadata`` file, as far as its CRC-32, or the sidecar, says sound.

    Args:
        content: of the file.
        directory: the checkpoint, whose sidecar is checked if there is no manifest.
        name: of the file.

    Raises:
        CheckpointCorruptError: the file is not as it was written.
    """
    path = os.path.join(directory, name)
    try:
        pickled, manifest = split_manifest(content)
    except ValueError as error:
        raise CheckpointCorruptError(f"{path} is damaged: {error}. Load an earlier iteration.") from error
    if manifest is not None:
        return Sections(pickled, manifest, manifest.save_id)
    # Only our own .metadata must be the one the sidecar names; a stock writer may have replaced it.
    checked = settings.verify_on_load() and has_own_mark(content)
    if checked and _differs_from_sidecar(directory, name, content):
        raise CheckpointCorruptError(
            f"{path} is damaged: it is not what {SIDECAR_FILE} says was written. Load an earlier iteration."
        )
    return Sections(pickled, None, f"{len(content)} bytes of CRC-32 {zlib.crc32(content):08x}")


def is_own(content: bytes) -> bool:
    """Whether ckpt_fast, of whatever version, wrote this ``.metadata``."""
    return has_manifest(content) or has_own_mark(content)


def has_own_mark(content: bytes) -> bool:
    """Whether an older ckpt_fast wrote this ``.metadata``; only then does the sidecar belong to it."""
    return _OWN_MARK in content[-_OWN_MARK_WITHIN:]


def _differs_from_sidecar(directory: str, name: str, content: bytes) -> bool:
    named = [file for file in read_sidecar(directory) or () if file.path == name]
    return bool(named) and named != [file_record(name, content)]


def decode_object(payload: bytes, where: str, verify: bool, device: str | None = "cpu") -> Any:
    """The value of an object item; see ``format/inert`` for what it may be made of.

    Args:
        payload: the whole item.
        where: names the item in errors.
        verify: check the archive's CRC-32s first.
        device: for tensors in it; None: each goes to the device that it was on.

    Raises:
        CheckpointCorruptError: a checksum differs or the archive is damaged.
        UnsafeCheckpointError: the value is made of more than the classes that are known or allowed.
    """
    if not payload.startswith((b"PK", _LEGACY_MAGIC)):
        raise CheckpointCorruptError(
            f"{where} is damaged: torch.save did not write it; load an earlier iteration"
        )
    try:
        if payload.startswith(b"PK"):
            archive = open_archive(payload)
            if verify:
                require_sound(archive)
    except Exception as error:
        raise CheckpointCorruptError(f"{where} is damaged ({error}); load an earlier iteration") from error
    try:
        if settings.pickle_allowed():
            return torch.load(io.BytesIO(payload), map_location=device, weights_only=False)
        return read_saved(payload, device)
    except RefusedPickleError as error:
        raise UnsafeCheckpointError(
            f"{where} holds more than tensors and plain data: {error}. If it is a class that you trust, "
            f"import its module and call ckpt_fast.allow_class with it. {REMEDY}"
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


def read_sidecar(directory: str) -> list[FileRecord] | None:
    """The file list of the sidecar, which versions before the manifest wrote; None if there is none.

    Raises:
        CheckpointCorruptError: the sidecar cannot be parsed.
    """
    path = os.path.join(directory, SIDECAR_FILE)
    try:
        document = parse_json(read_small_file(path))
        if document["version"] > _SIDECAR_VERSION:
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
