# SPDX-License-Identifier: Apache-2.0
"""Encode: plans become bytes. The write program of the data files, and somebody else's metadata."""

from __future__ import annotations

import copy
import copyreg
import ctypes
import io
import itertools
import pickle
from array import array
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_fast.format.names import LAYOUT, LAYOUT_ATTRIBUTE
from ckpt_fast.pipeline.memory.garbage import without_collections
from ckpt_fast.pipeline.save.plan import FilePlan
from ckpt_fast.pipeline.save.stage import Staged


class WriteProgram:
    """The columns that ``native.write_files`` takes: pieces, patches and digests of a rank's files.

    Owns the constant bytes (heads, tails, ready-made items); the raw data belongs to ``Staged.owners``.
    """

    @without_collections
    def __init__(self, files: Sequence[FilePlan], staged: Staged) -> None:
        self.paths = [file.path for file in files]
        self.file_nbytes = array("q", [file.nbytes for file in files])
        self.piece_file, self.piece_offset = array("q"), array("q")
        self.piece_nbytes, self.piece_address, self.piece_digest = array("q"), array("q"), array("q")
        self.patch_file, self.patch_offset, self.patch_digest = array("q"), array("q"), array("q")
        # Where the bytes of each digest are, in the order of the digests.
        self.payload_file, self.payload_offset, self.payload_nbytes = array("I"), array("q"), array("q")
        self._keep: dict[int, Any] = {}  # by address
        self._constants: dict[bytes, int] = {}
        batches: dict[int, int] = {}
        positions = itertools.count()
        for number, file in enumerate(files):
            for item in file.items:
                self._add_item(number, item, staged, next(positions), batches)
        # Of bytes that go through a ring: the batch that each piece comes with, or -1.
        self.piece_batch: array[int] | None = None
        if staged.ring is not None:
            self.piece_batch = array("q", (batches.get(n, -1) for n in range(len(self.piece_file))))

    def _add_item(self, file: int, item: Any, staged: Staged, position: int, batches: dict[int, int]) -> None:
        if item.archive is None:
            digest = self._new_digest(file, item.offset, len(item.payload))
            self._add_constant(file, item.offset, item.payload, digest)
            return
        head, tail, crc_offsets = item.archive
        raw_offset = item.offset + len(head)
        digest = self._new_digest(file, raw_offset, item.raw_nbytes)
        self._add_constant(file, item.offset, head)
        if position in staged.runs:
            self._add_runs(file, raw_offset, *staged.runs[position], digest)
        elif position in staged.parts:
            assert staged.buffer is not None
            base = staged.buffer.memory.data_ptr()
            for part in staged.parts[position]:
                batches[len(self.piece_file)] = part.batch
                self._add_piece(file, raw_offset + part.begin, part.nbytes, base + part.offset, digest)
        elif item.raw_nbytes:
            self._add_piece(file, raw_offset, item.raw_nbytes, staged.addresses[position], digest)
        tail_offset = raw_offset + item.raw_nbytes
        self._add_constant(file, tail_offset, tail)
        for crc_offset in crc_offsets:
            self.patch_file.append(file)
            self.patch_offset.append(tail_offset + crc_offset)
            self.patch_digest.append(digest)

    def columns(self) -> dict[str, Any]:
        """The columns by the names that ``native.write_files`` has for them."""
        return {
            "file_nbytes": self.file_nbytes,
            "piece_file": self.piece_file,
            "piece_offset": self.piece_offset,
            "piece_nbytes": self.piece_nbytes,
            "piece_address": self.piece_address,
            "piece_digest": self.piece_digest,
            "patch_file": self.patch_file,
            "patch_offset": self.patch_offset,
            "patch_digest": self.patch_digest,
            "digest_count": self.digest_count,
            "piece_batch": self.piece_batch,
        }

    def keep(self, memory: Any) -> None:
        """Keep ctypes memory alive as long as this program."""
        self._keep = {**self._keep, ctypes.addressof(memory): memory}

    def without(self, pieces: Container[int]) -> WriteProgram:
        """The same columns, without the constant bytes that only these pieces need."""
        program = copy.copy(self)
        needed = {address for piece, address in enumerate(self.piece_address) if piece not in pieces}
        program._keep = {address: memory for address, memory in self._keep.items() if address in needed}
        program._constants = {}
        return program

    @property
    def digest_count(self) -> int:
        """The number of digests: one for each item's payload."""
        return len(self.payload_file)

    def _new_digest(self, file: int, offset: int, nbytes: int) -> int:
        self.payload_file.append(file)
        self.payload_offset.append(offset)
        self.payload_nbytes.append(nbytes)
        return len(self.payload_file) - 1

    def _add_piece(self, file: int, offset: int, nbytes: int, address: int, digest: int) -> None:
        self.piece_file.append(file)
        self.piece_offset.append(offset)
        self.piece_nbytes.append(nbytes)
        self.piece_address.append(address)
        self.piece_digest.append(digest)

    def _add_runs(self, file: int, offset: int, addresses: array[int], nbytes: int, digest: int) -> None:
        count = len(addresses)
        self.piece_file.extend(array("q", [file]) * count)
        self.piece_offset.extend(range(offset, offset + count * nbytes, nbytes))
        self.piece_nbytes.extend(array("q", [nbytes]) * count)
        self.piece_address.extend(addresses)
        self.piece_digest.extend(array("q", [digest]) * count)

    def _add_constant(self, file: int, offset: int, content: bytes, digest: int = -1) -> None:
        address = self._constants.get(content)
        if address is None:
            memory = (ctypes.c_char * len(content)).from_buffer_copy(content)
            address = self._constants[content] = ctypes.addressof(memory)
            self._keep[address] = memory
        self._add_piece(file, offset, len(content), address, digest)


@without_collections
def pickle_metadata(metadata: Metadata, own_layout: bool = True) -> bytes:
    """``metadata`` as it stands in ``.metadata``.

    Args:
        metadata: its ``version`` is set.
        own_layout: mark it as describing archives of our layout; False for somebody else's data files.
    """
    if own_layout:
        setattr(metadata, LAYOUT_ATTRIBUTE, LAYOUT)
    metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=4)
    pickler.dispatch_table = {**copyreg.dispatch_table, TensorProperties: _reduce_properties}
    pickler.dump(metadata)
    return buffer.getvalue()


class _SharedParts:
    """One object for equal parts of the metadata: a pickle holds each once, so it is shorter and read sooner.

    Most tensors of a checkpoint have one of few shapes, and a rank's pieces few places.
    """

    def __init__(self) -> None:
        self._sizes: dict[tuple[int, ...], torch.Size] = {}
        self._chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], ChunkStorageMetadata] = {}
        self._properties: dict[tuple[Any, ...], TensorProperties] = {}

    def size(self, values: tuple[int, ...]) -> torch.Size:
        size = self._sizes.get(values)
        if size is None:
            size = self._sizes[values] = torch.Size(values)
        return size

    def chunk(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
        chunk = self._chunks.get((offsets, sizes))
        if chunk is None:
            chunk = ChunkStorageMetadata(self.size(offsets), self.size(sizes))
            self._chunks[offsets, sizes] = chunk
        return chunk

    def properties(self, properties: TensorProperties) -> TensorProperties:
        p = properties
        fields = (p.dtype, p.layout, p.requires_grad, p.memory_format, p.pin_memory)
        kept = self._properties.get(fields)
        if kept is None:
            # Without the strides, which torch notes from 2.15 on and our files do not have.
            kept = self._properties[fields] = TensorProperties(*fields)
        return kept


def share_parts(metadata: Metadata) -> None:
    """Let equal parts of the metadata of somebody else's plan be one object each."""
    shared = _SharedParts()
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.properties = shared.properties(entry.properties)
            entry.size = shared.size(tuple(entry.size))
            entry.chunks = [shared.chunk(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks]


def _reduce_properties(properties: TensorProperties) -> tuple[Any, ...]:
    """Five fields: torch up to 2.14 reads exactly these, later versions accept them."""
    state = properties.__getstate__()[:5]  # type: ignore[no-untyped-call]
    return copyreg.__newobj__, (TensorProperties,), state  # type: ignore[attr-defined]
