# SPDX-License-Identifier: Apache-2.0
"""The pipeline's vocabulary. Every step speaks only these types."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ckpt_fast.pipeline import metrics


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
    """What ``.metadata`` must know of one item: plain data that travels between ranks.

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
    """What the manifest says of one file."""

    path: str
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class RankRecord:
    """All that one rank has written."""

    items: list[ItemRecord]
    files: list[FileRecord]
    digests: list[BlockDigests] = field(default_factory=list)
    beside: list[FileRecord] = field(default_factory=list)


@dataclass
class SaveReport:
    """One save as its user sees it. Times in seconds, on this rank.

    Attributes:
        directory: the checkpoint.
        nbytes: bytes this rank wrote.
        files: files this rank wrote.
        stall_s: how long training waited.
        written_s: from the call until this rank's bytes were durable.
        seconds: from the call until the checkpoint was published.
        staged_nbytes: bytes copied to host memory; 0 if all were written from where they were.
        host_memory_allocated: bytes of host buffers that were new in this save; later saves use them again.
        steps: seconds spent in each step of the pipeline, by name.
    """

    directory: str
    nbytes: int = 0
    files: int = 0
    stall_s: float = 0.0
    written_s: float = 0.0
    seconds: float = 0.0
    staged_nbytes: int = 0
    host_memory_allocated: int = 0
    steps: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that the block takes to the step's."""
        begin = time.perf_counter()
        try:
            with metrics.range_of(step):
                yield
        finally:
            self.steps[step] = self.steps.get(step, 0.0) + time.perf_counter() - begin

    def count(self, files: Sequence[FileRecord]) -> None:
        """Add files that this rank wrote."""
        self.files += len(files)
        self.nbytes += sum(file.nbytes for file in files)

    @property
    def gb_per_s(self) -> float:
        """This rank's bytes over the time until they were durable, in 10^9 bytes per second."""
        return self.nbytes / self.written_s / 1e9 if self.written_s else 0.0

    @property
    def staged_gb_per_s(self) -> float:
        """How fast bytes were copied to host memory, in 10^9 bytes per second."""
        seconds = self.steps.get("stage", 0.0) + self.steps.get("drain", 0.0)
        return self.staged_nbytes / seconds / 1e9 if seconds else 0.0

    def __str__(self) -> str:
        facts = [f"stall {self.stall_s:.3f} s"]
        if self.staged_nbytes:
            facts.append(f"{readable(self.staged_nbytes)} staged at {self.staged_gb_per_s:.1f} GB/s")
        facts.append(
            f"{readable(self.nbytes)} of this rank durable after {self.written_s:.3f} s at "
            f"{self.gb_per_s:.2f} GB/s"
        )
        if self.host_memory_allocated:
            facts.append(f"{readable(self.host_memory_allocated)} of host buffers allocated for it")
        return ", ".join(facts)


def shard_nbytes(shard: Shard) -> int:
    """Bytes of a shard's values."""
    if isinstance(shard, TensorShard):
        return shard.tensor.numel() * shard.tensor.dtype.itemsize
    return len(shard.payload)


def readable(nbytes: int) -> str:
    """A size for people, in powers of ten."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
