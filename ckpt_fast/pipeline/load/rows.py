# SPDX-License-Identifier: Apache-2.0
"""Rows of the table: pieces that are wanted just as they were saved, in columns from there to the engine."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence

import torch

from ckpt_fast.errors import CheckpointCorruptError
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.pipeline.load.checks import block_of, damage_message
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.read import ReadProgram
from ckpt_fast.pipeline.memory.forms import Form, describe
from ckpt_fast.pipeline.memory.strided import column


class WantedRows:
    """Payloads of a checkpoint that the engine reads straight to where they are wanted.

    Args:
        index: the checkpoint.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self._index = index
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._addresses = torch.zeros(0, dtype=torch.int64)
        self._owners: list[object] = []  # of the memory at the addresses
        self._ranges: list[range] = []
        self._first_block = 0

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, requests: Sequence[TensorRequest]) -> list[TensorRequest]:
        """Take the requests that are for one piece in memory of the same form; returns the others."""
        simple = [request for request in requests if request.sizes is None]
        others = self._take(
            [request.fqn for request in simple],
            [request.destination for request in simple],
            [request.offsets for request in simple],
        )
        return [simple[number] for number in others] + [each for each in requests if each.sizes is not None]

    def take_whole(self, names: Sequence[str], values: list[object]) -> list[int]:
        """``take`` of whole tensors.

        Args:
            names: of tensors or objects.
            values: the destinations, and anything else.

        Returns:
            The numbers of the others.
        """
        return self._take(names, values, None)

    def _take(
        self, names: Sequence[str], values: list[object], offsets: Sequence[tuple[int, ...]] | None
    ) -> list[int]:
        table = self._index.table
        if table is None or not names:
            return list(range(len(names)))
        described = describe(values)
        rows = table.rows_of(names, described, offsets)
        rows[~torch.tensor([*map(_is_plain_memory, described.table), False])[described.forms]] = -1
        # What is wanted twice is read once, and copied.
        numbers = (rows >= 0).nonzero().flatten()
        numbers = numbers[rows[numbers].argsort(stable=True)]
        found = rows[numbers]
        is_first = torch.cat([torch.ones(len(found[:1]), dtype=torch.bool), found.diff() != 0])
        numbers = numbers[is_first & ~torch.isin(found, self._rows)]
        taken = rows[numbers]
        order = torch.cat([self._rows, taken]).argsort()
        self._rows = torch.cat([self._rows, taken])[order]
        self._addresses = torch.cat([self._addresses, described.addresses[numbers]])[order]
        self._owners.append(values)
        is_left = torch.ones(len(names), dtype=torch.bool)
        is_left[numbers] = False
        others: list[int] = is_left.nonzero().flatten().tolist()
        return others

    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(_of(self._manifest.payloads.nbytes, self._rows)) if len(self) else 0

    def paths(self) -> set[str]:
        """The files that are read."""
        if not len(self):
            return set()
        payloads = self._manifest.payloads
        return {payloads.paths[each] for each in set(_of(payloads.file, self._rows))}

    def schedule(self, program: ReadProgram, verify: bool) -> None:
        """Let a program read them; with ``verify``, compute the checksums of their blocks."""
        if not len(self):
            return
        self._ranges = _ranges(self._rows)
        paths, file, offset, nbytes, _ = self._manifest.payloads
        self._first_block = program.add_columns(
            paths,
            _of(file, self._rows),
            _of(offset, self._rows),
            _of(nbytes, self._rows),
            column(self._addresses),
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


def _is_plain_memory(form: Form) -> bool:
    """Whether bytes that are read into it are its values."""
    return (
        form.is_cpu and form.has_storage and form.is_contiguous and not form.is_lazy and not form.is_quantized
    )


def _ranges(rows: torch.Tensor) -> list[range]:
    """Ascending numbers, at least one, as ranges."""
    last = torch.cat([rows.diff() != 1, torch.tensor([True])])
    first = last.roll(1)
    return list(map(range, rows[first].tolist(), (rows[last] + 1).tolist()))


def _of(values: array[int], rows: torch.Tensor) -> array[int]:
    kind = torch.int32 if values.typecode == "I" else torch.int64
    return column(torch.frombuffer(values, dtype=kind)[rows].to(torch.int64))
