# SPDX-License-Identifier: Apache-2.0
"""Entries from the table behind the manifest: checked in columns, made into objects only where asked for."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Collection, Iterable

import torch

from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.consistency import Region, require_apart
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.table import NOTHING, RAW, Table
from ckpt_fast.format.types import Extent, TensorRequest
from ckpt_fast.pipeline.load.entries.kinds import ByPlace, Item, Piece, SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import LONGEST_FILE, require_inside


class TableEntries:
    """The entries of a table; see ``Entries``.

    Args:
        manifest: the table's.
        table: with a row for each payload of the manifest.

    Raises:
        ValueError: the two contradict each other, or items share bytes of a file.
    """

    def __init__(self, manifest: Manifest, table: Table) -> None:
        self._table = table
        self.manifest = manifest
        self._payloads = payloads = manifest.payloads
        if len(table.kinds) != len(payloads.file):
            raise ValueError(f"its table has {len(table.kinds)} rows for {len(payloads.file)} payloads")
        for path in payloads.paths:
            require_inside(path)
        self.nbytes = sum(payloads.nbytes)
        self._numbers = {name: number for number, name in enumerate(table.names)}
        self._require_lengths()
        self._require_apart()
        self._order, self._first = self._by_name()
        self._pieces: dict[int, ByPlace[int]] = {}

    @property
    def names(self) -> Collection[str]:
        return self._numbers.keys()

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        table, number = self._table, self._numbers[fqn]
        return None if table.dtypes[number] is None else table.lists[table.shapes[number]]

    def raw_rows(self, requests: Iterable[TensorRequest]) -> list[int | None]:
        """For each request, the row of the payload that has just its region's elements, if there is one.

        Args:
            requests: of no other shape than their destinations.
        """
        table, numbers, order, first = self._table, self._numbers, self._order, self._first
        lists, dtypes, kinds, begins, sizes = (
            table.lists,
            table.dtypes,
            table.kinds,
            table.offsets,
            table.sizes,
        )
        rows: list[int | None] = []
        # At every load, tensor by tensor.
        for fqn, tensor, offsets, _ in requests:
            number, row = numbers.get(fqn), None
            if number is not None and dtypes[number] is tensor.dtype:
                at = first[number]
                row = order[at] if first[number + 1] - at == 1 else self._row_at(number, offsets)
                if row is not None and not (
                    kinds[row] == RAW and lists[sizes[row]] == tensor.shape and lists[begins[row]] == offsets
                ):
                    row = None
            rows.append(row)
        return rows

    def fqn(self, row: int) -> str:
        """The name of what a payload belongs to."""
        return self._table.names[self._table.name[row]]

    def tensor(self, fqn: str) -> SavedTensor | None:
        number = self._numbers.get(fqn)
        dtype = None if number is None else self._table.dtypes[number]
        if number is None or dtype is None:
            return None
        lists = self._table.lists
        shape, pieces = lists[self._table.shapes[number]], []
        for row in self._rows(number):
            offsets, sizes = lists[self._table.offsets[row]], lists[self._table.sizes[row]]
            if not len(offsets) == len(sizes) == len(shape):
                raise ValueError(f"a piece of {fqn} has another number of dimensions")
            pieces.append(Piece(offsets, sizes, self._item(row, dtype, sizes), ()))
        regions = [Region(piece.offsets, piece.sizes) for piece in pieces]
        if any(one == other for one, other in itertools.pairwise(sorted(regions))):
            raise ValueError(f"{fqn} has the same piece twice")
        try:
            require_apart(shape, regions)
        except ValueError as error:
            raise ValueError(f"{fqn}: {error}") from None
        return SavedTensor(fqn, dtype, shape, pieces)

    def object(self, fqn: str) -> Item | None:
        number = self._numbers.get(fqn)
        if number is None or self._table.dtypes[number] is not None:
            return None
        rows = self._rows(number)
        if len(rows) != 1:
            raise ValueError(f"{fqn} has {len(rows)} items")
        return Item(self._payload(rows[0]), ())

    def _rows(self, number: int) -> array[int]:
        return self._order[self._first[number] : self._first[number + 1]]

    def _row_at(self, number: int, offsets: tuple[int, ...]) -> int | None:
        pieces = self._pieces.get(number)
        if pieces is None:
            lists, begins, sizes = self._table.lists, self._table.offsets, self._table.sizes
            pieces = self._pieces[number] = ByPlace(
                (lists[begins[row]], math.prod(lists[sizes[row]]), row) for row in self._rows(number)
            )
        return pieces.get(offsets)

    def _payload(self, row: int) -> Extent:
        paths, file, offset, nbytes, _ = self._payloads
        return Extent(paths[file[row]], offset[row], nbytes[row])

    def _item(self, row: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> Extent:
        payload = self._payload(row)
        if self._table.kinds[row] != RAW:
            return payload
        archive = tensor_archive(dtype, sizes)
        begin = payload.offset - len(archive.head)
        if begin < 0:
            raise ValueError(f"there is no room for {self.fqn(row)} at {payload.offset} of {payload.path}")
        return Extent(payload.path, begin, item_nbytes(archive, payload.nbytes))

    def _require_lengths(self) -> None:
        """Each payload that is the elements of a piece is just as long as these."""
        table, nbytes = self._table, _tensor(self._payloads.nbytes)
        if max(self._payloads.offset, default=0) + max(self._payloads.nbytes, default=0) > LONGEST_FILE:
            raise ValueError("its payloads are longer than any file")
        if not len(nbytes):
            return
        numel = torch.tensor([math.prod(each) for each in table.lists])[_tensor(table.sizes)]
        itemsize = torch.tensor([dtype.itemsize if dtype is not None else 0 for dtype in table.dtypes])
        wrong = (numel * itemsize[_tensor(table.name)] != nbytes) & (_kinds(table) == RAW)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"{self.fqn(row)} cannot have {self._payloads.nbytes[row]} bytes")

    def _require_apart(self) -> None:
        """No two payloads have a byte in common."""
        file, offset, nbytes = map(_tensor, self._payloads[1:4])
        rows = (nbytes > 0).nonzero().flatten()
        rows = rows[offset[rows].argsort(stable=True)]
        rows = rows[file[rows].argsort(stable=True)]
        before, after = rows[:-1], rows[1:]
        shared = (file[before] == file[after]) & (offset[before] + nbytes[before] > offset[after])
        if shared.any():
            one, other = (int(each[shared][0]) for each in (before, after))
            path, begin, _ = self._payload(other)
            names = sorted((self.fqn(one), self.fqn(other)))
            raise ValueError(f"{' and '.join(names)} share bytes of {path} at {begin}")

    def _by_name(self) -> tuple[array[int], array[int]]:
        """The rows in the order of the names, and where those of each name begin."""
        count = len(self._table.names)
        rows = (_kinds(self._table) != NOTHING).nonzero().flatten()
        name = _tensor(self._table.name)[rows]
        order = rows[name.argsort(stable=True)]
        counts = torch.bincount(name, minlength=count) if count else torch.zeros(0, dtype=torch.int64)
        if not bool((counts > 0).all()):
            raise ValueError(f"{self._table.names[int((counts == 0).nonzero()[0])]} has no item")
        first = array("q", [0])
        first.extend(counts.cumsum(0).tolist())
        return array("q", order.tolist()), first


def _tensor(column: array[int]) -> torch.Tensor:
    """int64."""
    if not len(column):
        return torch.zeros(0, dtype=torch.int64)
    kind = torch.int32 if column.typecode == "I" else torch.int64
    return torch.frombuffer(column, dtype=kind).to(torch.int64)


def _kinds(table: Table) -> torch.Tensor:
    return torch.tensor(list(table.kinds), dtype=torch.int64)
