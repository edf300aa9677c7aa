# SPDX-License-Identifier: Apache-2.0
"""The vocabulary of shards, items and files. Every step of the pipeline speaks these types."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class TensorShard(NamedTuple):
    """A rank's piece of a tensor, to be saved.

    Attributes:
        fqn: name of the whole tensor in the checkpoint.
        tensor: the piece itself, on any device.
        offsets: where the piece starts in the whole tensor, one entry per dimension.
        global_shape: shape of the whole tensor.
        sizes: the piece's extents, where the tensor has its elements in another shape, in the same row-major
            order: a strided view may divide dimensions that have no view of their own.
    """

    fqn: str
    tensor: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]
    sizes: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The piece's extent in every dimension."""
        return tuple(self.tensor.shape) if self.sizes is None else self.sizes


class ObjectShard(NamedTuple):
    """An opaque value, to be saved as the bytes given."""

    fqn: str
    payload: bytes


Shard = TensorShard | ObjectShard


class TensorRequest(NamedTuple):
    """A region of a saved tensor, wanted in ``destination`` (any device; its shape is the region's).

    With ``sizes``, these are the region's shape, as in a TensorShard.
    """

    fqn: str
    destination: torch.Tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...] | None = None


class Extent(NamedTuple):
    """A byte range of a file; ``path`` is relative to the checkpoint directory."""

    path: str
    offset: int
    nbytes: int


class Runs(NamedTuple):
    """Byte ranges of one length in one file, and where in memory each belongs."""

    offsets: array[int]
    addresses: array[int]
    nbytes: int


class ItemRecord(NamedTuple):
    """The data that ``.metadata`` needs for one item: plain data, sent between ranks.

    ``dtype`` is None for an object. ``sizes`` are the piece's extents, ``offsets`` its place.
    """

    fqn: str
    extent: Extent
    dtype: torch.dtype | None
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    global_shape: tuple[int, ...]


class BlockDigests(NamedTuple):
    """Checksums of payloads in data files, in columns of one entry for each payload.

    Attributes:
        paths: the files.
        file: which of them the payload is in.
        offset, nbytes: where.
        crcs: CRC-32s, 32 bits each, little-endian: of each block (``manifest.BLOCK_NBYTES``) of the
            first payload, then of the second, and so on.
    """

    paths: list[str]
    file: array[int]
    offset: array[int]
    nbytes: array[int]
    crcs: bytes


class FileRecord(NamedTuple):
    """The manifest entry of one file."""

    path: str
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class RankRecord:
    """All that one rank has written.

    Attributes:
        items: in the order of the digests; left out where ``is_known``.
        files, digests: see there.
        beside: files that lie beside the checkpoint.
        program: the token of the save program that was executed; "" if there was none.
        is_known: whether the coordinator has had the items of the program before.
        objects: which of the items are objects, where these are left out.
    """

    items: list[ItemRecord]
    files: list[FileRecord]
    digests: list[BlockDigests] = field(default_factory=list)
    beside: list[FileRecord] = field(default_factory=list)
    program: str = ""
    is_known: bool = False
    objects: Sequence[int] = ()

    @property
    def object_nbytes(self) -> list[int]:
        """The lengths of the objects, in the order of the items."""
        if not self.digests:
            return [item.extent.nbytes for item in self.items if item.dtype is None]
        objects = self.objects
        if not self.is_known:
            objects = [number for number, item in enumerate(self.items) if item.dtype is None]
        nbytes = list(itertools.chain.from_iterable(digests.nbytes for digests in self.digests))
        return [nbytes[number] for number in objects]


def shard_nbytes(shard: Shard) -> int:
    """Bytes of a shard's values."""
    if isinstance(shard, TensorShard):
        return shard.tensor.numel() * shard.tensor.dtype.itemsize
    return len(shard.payload)


def readable(nbytes: int) -> str:
    """A size for people, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
