# SPDX-License-Identifier: Apache-2.0
"""What our coordinator gets from many ranks, and does with it, phase by phase."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.columns.records import encode_record, join_records
from ckpt_fast.format.manifest import Manifest, append_manifest, new_save_id, without_pickle
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import BlockDigests, Extent, FileRecord, ItemRecord, RankRecord, TensorRequest
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.load.rows import WantedRows
from ckpt_fast.pipeline.save.sealed import SealedMetadata
from ckpt_fast.storage.files import Directory

# Of every rank's shard of every tensor.
ROWS, WIDTH = 8, 16


def name(number: int) -> str:
    """Return the name of a tensor."""
    return f"decoder.layers.{number}.mlp.linear_fc1.weight"


def record(rank: int, ranks: int, count: int, *, is_known: bool = False) -> RankRecord:
    """Return what a rank has written: its shard of each of ``count`` tensors, in one file."""
    path = f"__{rank}_0.distcp"
    archive = tensor_archive(torch.float32, (ROWS, WIDTH))
    nbytes = 4 * ROWS * WIDTH
    pitch = -(-item_nbytes(archive, nbytes) // 64) * 64
    place, sizes, shape = (rank * ROWS, 0), (ROWS, WIDTH), (ranks * ROWS, WIDTH)
    items = [
        ItemRecord(
            name(n), Extent(path, n * pitch, item_nbytes(archive, nbytes)), torch.float32, place, sizes, shape
        )
        for n in range(0 if is_known else count)
    ]
    digests = BlockDigests(
        [path],
        array("I", [0]) * count,
        array("q", range(len(archive.head), len(archive.head) + count * pitch, pitch)),
        array("q", [nbytes]) * count,
        os.urandom(4 * count),
    )
    file = FileRecord(path, count * pitch, rank)
    return RankRecord(items, [file], [digests], [], f"{rank:032x}", is_known)


def messages(ranks: int, count: int, *, is_known: bool = False) -> list[bytes]:
    """Return what every rank sends once it has written; ``is_known``: if it did so before."""
    return [encode_record(record(rank, ranks, count, is_known=is_known)) for rank in range(ranks)]


@dataclass
class Coordinator:
    """The work of one save on the coordinator.

    Attributes:
        seconds: of CPU time, by phase; the least of all runs.
        sealed: of a first save, for later ones.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    sealed: SealedMetadata | None = None

    def save(self, received: Sequence[bytes]) -> bytes:
        """Return the ``.metadata``. The records of a later save have no items."""
        with self._phase("join"):
            world = join_records(received)
        if world.items is not None:
            with self._phase("check and write"):
                self.sealed = SealedMetadata(world.items, world.programs, None)
        assert self.sealed is not None
        with self._phase("frame"):
            contents = self.sealed.encode(world)
            manifest = Manifest(new_save_id(), world.files, [contents.digests], encoded_table=contents.table)
            return append_manifest(contents.pickled, manifest)

    @contextmanager
    def _phase(self, phase: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.seconds[phase] = min(time.process_time() - begin, self.seconds.get(phase, float("inf")))


def load(directory: Path, rank: int, ranks: int, count: int, handed: bytes = b"") -> None:
    """Find what a rank needs to know of its shards, as a load does before it reads them.

    Args:
        directory: has a ``.metadata``.
        rank, ranks, count: whose shards, of how many tensors.
        handed: by the rank that has read it; empty: it is read.
    """
    with OpenCheckpoint(Directory(os.fspath(directory))) as opened:
        opened.accept(handed)
        rows = WantedRows(opened.index)
        shard = torch.empty(ROWS, WIDTH)
        left = rows.take([TensorRequest(name(n), shard, (rank * ROWS, 0)) for n in range(count)])
        assert not left and len(rows) == count and rows.nbytes() and len(rows.paths()) == 1


def handed_over(directory: Path) -> bytes:
    """Return what the rank that reads ``.metadata`` broadcasts."""
    return without_pickle((directory / METADATA_FILE).read_bytes())
