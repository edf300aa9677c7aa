# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's table of contents: its pieces, and where their raw bytes are."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import Metadata

from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.archive import (
    LOCAL_HEADER_NBYTES,
    find_raw_member,
    is_contiguous_tensor,
    item_nbytes,
    local_header_nbytes,
    tensor_archive,
)
from ckpt_fast.format.names import LAYOUT, LAYOUT_ATTRIBUTE, METADATA_FILE, SIDECAR_FILE
from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.decode import Contents, read_contents
from ckpt_fast.pipeline.load.entries.columns import TableEntries
from ckpt_fast.pipeline.load.entries.kinds import ByPlace, Entries, Item, Piece, SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import PickledEntries
from ckpt_fast.pipeline.load.read import ByteArena, ReadProgram
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.storage.files import Directory, Files
from ckpt_fast.storage.versions import FileVersions

_FOREIGN_TAIL_NBYTES = 1024
# All pieces of a tensor become objects if there are no more.
_FEW_PIECES = 64


class RawData(NamedTuple):
    """The location of a payload's bytes, and their expected CRC-32s.

    Attributes:
        extent: the bytes.
        block_nbytes: so many of them have a checksum; the last may be of fewer.
        crcs: the checksums; None if it is one, and stands in the file.
        crc_extent: there.
    """

    extent: Extent
    block_nbytes: int
    crcs: Sequence[int] | None
    crc_extent: Extent | None = None


class CheckpointIndex:
    """The parsed ``.metadata`` of one checkpoint directory.

    Attributes:
        table: the entries in columns, where the save has written a table.

    Args:
        directory: the checkpoint, in messages; and where its files are, unless ``files`` says so.
        contents: its ``.metadata``, where it has been read already.
        extensions: torch DCP's registry of the stream transforms that items may need; None: torch's own.
        files: of the checkpoint, if they are not simply in ``directory``; with ``contents``.
        versions: what the files were like before ``contents`` was read.

    Raises:
        CheckpointNotFoundError, CheckpointCorruptError, UnsafeCheckpointError: see ``read_dcp_metadata``.
        CheckpointCorruptError: what the metadata says of items contradicts what it says of tensors, or items
            share bytes of a file.
        CheckpointMismatchError: the directory is a URL.
    """

    @without_collections
    def __init__(
        self,
        directory: str,
        contents: Contents | None = None,
        extensions: Any = None,
        files: Files | None = None,
        versions: FileVersions | None = None,
    ) -> None:
        if files is None and "://" in os.fspath(directory):
            raise CheckpointMismatchError(
                f"cannot load from {directory}: this is a URL, and is read through multi-storage-client only "
                "(msc://), with ckpt_format='torch_dist' or 'fsdp_dtensor', or FastStorageReader. Install "
                "and enable it, or copy the checkpoint to a path."
            )
        self.directory = directory
        self.files = files if files is not None else Directory(directory)
        self.versions = versions if versions is not None else FileVersions(directory)
        self.extensions = extensions
        if contents is None:
            self.files.fetch((METADATA_FILE, SIDECAR_FILE))
            self.versions.note([METADATA_FILE])
            contents = read_contents(directory)
        self._contents = contents
        self.manifest = contents.manifest
        self.identity = contents.identity
        self._tensors: dict[str, SavedTensor] = {}
        self._pieces_at: dict[str, ByPlace[Piece]] = {}
        self.table: TableEntries | None = None
        with self._contradictions_are_damage():
            if self.manifest is not None:
                _ = self.manifest.first_blocks
            if self.manifest is not None and self.manifest.table is not None:
                self.table = TableEntries(self.manifest, self.manifest.table)
            self._entries: Entries = self.table or PickledEntries(self.metadata)

    @property
    def metadata(self) -> Metadata:
        """torch DCP's metadata: unpickled at the first use."""
        return self._contents.metadata

    @property
    def names(self) -> Collection[str]:
        """Of all tensors and objects."""
        return self._entries.names

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return self._entries.nbytes

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        """The shape of a saved tensor; None for an object.

        Raises:
            KeyError: there is neither.
            CheckpointCorruptError: what the metadata says of it makes no sense.
        """
        if self.table is not None:  # it was found to make sense as a whole
            return self.table.shape(fqn)
        if fqn not in self._entries.names:
            raise KeyError(fqn)
        with self._contradictions_are_damage():
            return self._entries.shape(fqn)

    def dtype(self, fqn: str) -> torch.dtype | None:
        """The dtype of a saved tensor; None for an object. KeyError: there is neither."""
        return self._entries.dtype(fqn)

    def tensor_shape(self, fqn: str) -> tuple[int, ...]:
        """The shape of a saved tensor.

        Raises:
            CheckpointMismatchError: there is none of this name.
        """
        try:
            shape = self.shape(fqn)
        except KeyError:
            shape = None
        if shape is None:
            raise CheckpointMismatchError(missing_keys_message(self.directory, [fqn], self.names))
        return shape

    @property
    def _own_layout(self) -> bool:
        return self.table is not None or getattr(self.metadata, LAYOUT_ATTRIBUTE, None) == LAYOUT

    def tensor(self, fqn: str) -> SavedTensor:
        """The saved tensor of this name.

        Raises:
            CheckpointMismatchError: there is none.
            CheckpointCorruptError: what the metadata says of it makes no sense.
        """
        tensor = self._tensors.get(fqn)
        if tensor is None:
            with self._contradictions_are_damage():
                tensor = self._entries.tensor(fqn)
            if tensor is None:
                raise CheckpointMismatchError(missing_keys_message(self.directory, [fqn], self.names))
            self._tensors[fqn] = tensor
        return tensor

    def piece(self, fqn: str, offsets: tuple[int, ...]) -> tuple[SavedTensor, Piece]:
        """The saved tensor and its piece that starts at ``offsets``; errors as of ``tensor``."""
        tensor, piece = self._tensor_and_piece(fqn, offsets)
        if piece is None:
            raise CheckpointCorruptError(
                f"{self.directory} has no piece of {fqn} at {offsets}; load an earlier iteration"
            )
        return tensor, piece

    def tensor_within(
        self, fqn: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> tuple[SavedTensor, Piece | None]:
        """The saved tensor, and its piece that is just this region, if there is one; errors as of ``tensor``.

        Of a tensor in many pieces there may be only those that have elements in the region.
        """
        if self.table is None or self.table.piece_count(fqn) <= _FEW_PIECES or 0 in sizes:
            tensor, piece = self._tensor_and_piece(fqn, offsets)
            return tensor, piece if piece is not None and piece.sizes == sizes else None
        with self._contradictions_are_damage():
            found = self.table.tensor_within(fqn, offsets, sizes)
        if found is None:
            return self.tensor(fqn), None
        exact = [piece for piece in found.pieces if piece.offsets == offsets and piece.sizes == sizes]
        return found, exact[0] if exact else None

    def _tensor_and_piece(self, fqn: str, offsets: tuple[int, ...]) -> tuple[SavedTensor, Piece | None]:
        tensor = self.tensor(fqn)
        if len(tensor.pieces) == 1:
            (piece,) = tensor.pieces
            return tensor, piece if piece.offsets == offsets else None
        if fqn not in self._pieces_at:
            self._pieces_at[fqn] = ByPlace(
                (piece.offsets, math.prod(piece.sizes), piece) for piece in tensor.pieces
            )
        return tensor, self._pieces_at[fqn].get(offsets)

    def object_extent(self, fqn: str) -> Extent:
        """The item of a saved object.

        Raises:
            CheckpointMismatchError: there is none of this name.
        """
        return self._object(fqn).extent

    def object_transforms(self, fqn: str) -> tuple[str, ...]:
        """The stream transforms that were applied to a saved object; errors as of ``object_extent``."""
        return self._object(fqn).transforms

    def _object(self, fqn: str) -> Item:
        with self._contradictions_are_damage():
            item = self._entries.object(fqn)
        if item is None:
            raise CheckpointMismatchError(missing_keys_message(self.directory, [fqn], self.names))
        return item

    @contextmanager
    def _contradictions_are_damage(self) -> Iterator[None]:
        try:
            yield
        except (AttributeError, KeyError, TypeError, ValueError, struct.error) as error:
            what = f"nothing is known of {error}" if isinstance(error, KeyError) else error
            raise CheckpointCorruptError(
                f"{self.directory}/.metadata makes no sense ({what}); load an earlier iteration"
            ) from error

    def locate(self, wanted: Iterable[tuple[torch.dtype, Piece]]) -> dict[Extent, RawData | None]:
        """The location of each piece's raw data; None for items that only ``torch.load`` can read.

        Our own layout is computed; archives of other writers are looked into, all in two batches of reads.
        """
        located: dict[Extent, RawData | None] = {}
        foreign: list[tuple[torch.dtype, Piece]] = []
        for dtype, piece in wanted:
            located[piece.item] = None
            if piece.transforms or self.payload_of(piece.item) is not None:
                continue
            if self._own_layout:
                located[piece.item] = self._own_raw_data(dtype, piece)
            if located[piece.item] is None:
                foreign.append((dtype, piece))
        located.update(self._look_into(foreign))
        return located

    def _own_raw_data(self, dtype: torch.dtype, piece: Piece) -> RawData | None:
        nbytes = math.prod(piece.sizes) * dtype.itemsize
        try:
            archive = tensor_archive(dtype, piece.sizes)
        except TypeError:
            return None
        if item_nbytes(archive, nbytes) != piece.item.nbytes:
            return None
        path, offset, _ = piece.item
        raw_offset = offset + len(archive.head)
        if self.manifest is not None:
            return self.checked(Extent(path, raw_offset, nbytes))
        crc_offset = raw_offset + nbytes + archive.crc_offsets[0]
        return RawData(Extent(path, raw_offset, nbytes), nbytes, None, Extent(path, crc_offset, 4))

    def payload_of(self, item: Extent) -> RawData | None:
        """The item itself, if the manifest has checksums of it as a whole: it is no archive of our layout."""
        if self.manifest is None or self.manifest.payload(item.path, item.offset) is None:
            return None
        return self.checked(item)

    def checked(self, payload: Extent) -> RawData:
        """A payload with its checksums in the manifest, which there is.

        Raises:
            CheckpointCorruptError: it is not one that the save wrote.
        """
        assert self.manifest is not None
        known = self.manifest.payload(payload.path, payload.offset)
        if known is None or known.nbytes != payload.nbytes:
            raise CheckpointCorruptError(
                f"{self.directory}/.metadata contradicts itself: its manifest has no {payload.nbytes} bytes "
                f"at {payload.offset} of {payload.path}. Load an earlier iteration."
            )
        return RawData(payload, self.manifest.block_nbytes, known.crcs)

    def _look_into(self, wanted: list[tuple[torch.dtype, Piece]]) -> dict[Extent, RawData | None]:
        program = ReadProgram(self.files)
        arena = ByteArena(program)
        tails = [arena.add(_last_bytes(piece.item)) for _, piece in wanted]
        program.run()
        members = {}
        for (dtype, piece), handle in zip(wanted, tails, strict=True):
            member = find_raw_member(arena.content(handle), max(0, piece.item.nbytes - _FOREIGN_TAIL_NBYTES))
            if member is not None and is_contiguous_tensor(member, dtype, piece.sizes):
                members[piece.item] = member
        program = ReadProgram(self.files)
        arena = ByteArena(program)
        headers = {
            item: arena.add(Extent(item.path, item.offset + member.local_offset, LOCAL_HEADER_NBYTES))
            for item, member in members.items()
        }
        program.run()
        located: dict[Extent, RawData | None] = {}
        for item, handle in headers.items():
            member = members[item]
            header_nbytes = local_header_nbytes(arena.content(handle))
            if header_nbytes is not None:
                offset = item.offset + member.local_offset + header_nbytes
                extent = Extent(item.path, offset, member.nbytes)
                located[item] = RawData(extent, member.nbytes, [member.crc32])
        return located


def missing_keys_message(directory: str, keys: list[str], names: Iterable[str], remedy: str = "") -> str:
    """Text of the error for names that a checkpoint, which has others, does not have."""
    shown = ", ".join(sorted(keys)[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    last = keys[0].rsplit(".", 1)[-1]
    similar = sorted(key for key in names if key.rsplit(".", 1)[-1] == last)[:3]
    hint = f" It has, for example, {', '.join(similar)}." if similar else ""
    remedy = remedy or (
        "Load it into the model it was saved from, or choose a dist_ckpt_strictness that tolerates missing "
        "keys."
    )
    return f"the checkpoint {directory} has no {shown}.{hint} {remedy}"


def _last_bytes(item: Extent) -> Extent:
    nbytes = min(item.nbytes, _FOREIGN_TAIL_NBYTES)
    return Extent(item.path, item.offset + item.nbytes - nbytes, nbytes)
