# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: pieces that are wanted just as they were saved, in columns from there to the engine."""

from __future__ import annotations

import bisect
import itertools
from array import array
from collections.abc import Sequence

import torch

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.pipeline.load.checks import block_of, damage_message
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.read import ReadProgram
from ckpt_fast.pipeline.memory.strided import has_storage

# What most destinations are, told by their type alone.
_PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))


class WantedRows:
    """Payloads of a checkpoint that the engine reads straight to where they are wanted.

    Args:
        index: the checkpoint.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._wanted: dict[int, torch.Tensor] = {}  # row to destination
        self._ranges: list[range] = []
        self._first_block = 0

    def __len__(self) -> int:
        return len(self._wanted)

    def take(self, requests: Sequence[TensorRequest]) -> list[TensorRequest]:
        """Take the requests that are for one piece in memory of the same form; returns the others."""
        table = self._index.table
        if table is None:
            return list(requests)
        others: list[TensorRequest] = []
        with torch._C.DisableTorchFunction():
            for request, row in zip(requests, table.raw_rows(requests), strict=True):
                tensor = request.destination
                if (
                    row is not None
                    and row not in self._wanted
                    and type(tensor) in _PLAIN
                    and request.sizes is None
                    and tensor.is_cpu
                    and tensor.layout is torch.strided
                    and tensor.is_contiguous()
                    and not tensor.is_conj()
                    and not tensor.is_neg()
                    and has_storage(tensor)
                ):
                    self._wanted[row] = tensor
                else:
                    others.append(request)
        return others

    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(map(self._manifest.payloads.nbytes.__getitem__, self._wanted)) if self._wanted else 0

    def paths(self) -> set[str]:
        """The files that are read."""
        if not self._wanted:
            return set()
        payloads = self._manifest.payloads
        return {payloads.paths[each] for each in set(map(payloads.file.__getitem__, self._wanted))}

    def schedule(self, program: ReadProgram, verify: bool) -> None:
        """Let a program read them; with ``verify``, compute the checksums of their blocks."""
        if not self._wanted:
            return
        rows = sorted(self._wanted)
        self._ranges = _ranges(rows)
        paths, file, offset, nbytes, _ = self._manifest.payloads
        self._first_block = program.add_columns(
            paths,
            _of(file, self._ranges),
            _of(offset, self._ranges),
            _of(nbytes, self._ranges),
            array("q", [self._wanted[row].data_ptr() for row in rows]),
            self._manifest.block_nbytes if verify else None,
        )

    def compare(self, found: memoryview) -> None:
        """Raise for the first block whose checksum is not what the manifest says.

        Args:
            found: what the program has returned; checksums were wanted.

        Raises:
            CheckpointCorruptError: naming the tensor, file and bytes.
        """
        if not self._ranges:
            return
        crcs, first, at = self._manifest.crcs, self._manifest.first_blocks, self._first_block
        for rows in self._ranges:
            wanted = array("q", crcs[first[rows.start] : first[rows.stop]])
            if found[at : at + len(wanted)] != memoryview(wanted):
                number = next(i for i, crc in enumerate(wanted) if found[at + i] != crc)
                block = first[rows.start] + number
                raise CheckpointCorruptError(self._damage(block, found[at + number], wanted[number]))
            at += len(wanted)

    @property
    def _manifest(self) -> Manifest:
        assert self._index.manifest is not None
        return self._index.manifest

    def _damage(self, block: int, crc: int, wanted: int) -> str:
        assert self._index.table is not None
        first = self._manifest.first_blocks
        row = bisect.bisect_right(first, block) - 1
        paths, file, offset, nbytes, _ = self._manifest.payloads
        payload = Extent(paths[file[row]], offset[row], nbytes[row])
        damaged = block_of(payload, block - first[row], self._manifest.block_nbytes)
        return damage_message(self._index, self._index.table.fqn(row), payload, damaged, crc, wanted)


def _ranges(rows: list[int]) -> list[range]:
    """Ascending numbers as ranges."""
    ends = [at for at in range(1, len(rows)) if rows[at] != rows[at - 1] + 1]
    return [range(rows[a], rows[b - 1] + 1) for a, b in itertools.pairwise([0, *ends, len(rows)])]


def _of(column: array[int], ranges: list[range]) -> array[int]:
    values: array[int] = array("q")
    for rows in ranges:
        values.extend(array("q", column[rows.start : rows.stop]))
    return values
