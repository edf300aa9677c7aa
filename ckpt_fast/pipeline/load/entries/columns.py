# SPDX-License-Identifier: Apache-2.0
"""Entries from the table behind the manifest: checked in columns, made into objects only where asked for."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.consistency import Region, require_apart
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.table import NOTHING, RAW, Table
from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.entries.kinds import ByPlace, Item, Piece, SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import LONGEST_FILE, require_inside
from ckpt_fast.pipeline.memory.forms import Described


class _Columns(NamedTuple):
    """A table as tensors. Each column of what can be missing ends with an entry for number -1.

    Attributes:
        dtypes, lists: numbers of dtypes and lists.
        is_zero: bool [lists]: whether all its numbers are 0.
        dtype, shape: for each name, that of the tensor; -1 for an object.
        is_single: bool [names]: whether it has one row.
        order, first: the rows in the order of the names, and where those of each name begin.
        kind, offset, size: for each row.
    """

    dtypes: dict[torch.dtype | None, int]
    lists: dict[tuple[int, ...], int]
    is_zero: torch.Tensor
    dtype: torch.Tensor
    shape: torch.Tensor
    is_single: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor
    kind: torch.Tensor
    offset: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, table: Table, order: array[int], first: array[int]) -> _Columns:
        dtypes: dict[torch.dtype | None, int] = {None: -1}
        dtype = [dtypes.setdefault(each, len(dtypes)) for each in table.dtypes]
        begin = _tensor(first)
        return cls(
            dtypes,
            {each: number for number, each in enumerate(table.lists)},
            torch.tensor([not any(each) for each in table.lists] + [False]),
            torch.tensor([*dtype, -1]),
            _tensor(table.shapes, -1),
            torch.cat([begin.diff() == 1, torch.tensor([False])]),
            _tensor(order),
            begin,
            _tensor(array("B", table.kinds), NOTHING),
            _tensor(table.offsets, -1),
            _tensor(table.sizes, -1),
        )


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
        self._columns = _Columns.of(table, self._order, self._first)
        self._pieces: dict[int, ByPlace[int]] = {}

    @property
    def names(self) -> Collection[str]:
        return self._numbers.keys()

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        table, number = self._table, self._numbers[fqn]
        return None if table.dtypes[number] is None else table.lists[table.shapes[number]]

    def rows_of(
        self, names: Sequence[str], described: Described, offsets: Sequence[tuple[int, ...]] | None
    ) -> torch.Tensor:
        """For each tensor, the row of the payload that has just its region's elements; -1 if there is none.

        Args:
            names: of the whole tensors.
            described: the tensors.
            offsets: where each region begins; None if each is the whole tensor.

        Returns:
            int64 [tensors].
        """
        columns, table = self._columns, self._table
        number = torch.tensor([self._numbers.get(name, -1) for name in names], dtype=torch.int64)
        # Other dtypes and shapes than any here are nobody's.
        dtype = torch.tensor([columns.dtypes.get(form.dtype, -1) for form in described.table] + [-1])
        shape = torch.tensor([columns.lists.get(form.shape, -1) for form in described.table] + [-1])
        forms = described.forms
        rows = torch.full_like(number, -1)
        # Most tensors are in one piece.
        found = (number >= 0) & (dtype[forms] >= 0) & (columns.dtype[number] == dtype[forms])
        single = found & columns.is_single[number]
        rows[single] = columns.order[columns.first[number[single]]]
        if offsets is not None:
            for at in (found & ~single).nonzero().flatten().tolist():
                row = self._row_at(int(number[at]), offsets[at])
                rows[at] = -1 if row is None else row
        fits = (rows >= 0) & (columns.kind[rows] == RAW) & (columns.size[rows] == shape[forms])
        if offsets is None:
            fits &= (columns.shape[number] == shape[forms]) & columns.is_zero[columns.offset[rows]]
        rows[~fits] = -1
        if offsets is not None:
            lists, begins = table.lists, table.offsets
            for at in fits.nonzero().flatten().tolist():
                if lists[begins[rows[at]]] != offsets[at]:
                    rows[at] = -1
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
        wrong = (numel * itemsize[_tensor(table.name)] != nbytes) & (_tensor(array("B", table.kinds)) == RAW)
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
        rows = (_tensor(array("B", self._table.kinds)) != NOTHING).nonzero().flatten()
        name = _tensor(self._table.name)[rows]
        order = rows[name.argsort(stable=True)]
        counts = torch.bincount(name, minlength=count) if count else torch.zeros(0, dtype=torch.int64)
        if not bool((counts > 0).all()):
            raise ValueError(f"{self._table.names[int((counts == 0).nonzero()[0])]} has no item")
        first = array("q", [0])
        first.extend(counts.cumsum(0).tolist())
        return array("q", order.tolist()), first


def _tensor(column: array[int], *more: int) -> torch.Tensor:
    """int64."""
    values = torch.zeros(len(column) + len(more), dtype=torch.int64)
    if column:
        kinds = {"B": torch.uint8, "I": torch.int32, "q": torch.int64}
        values[: len(column)] = torch.frombuffer(column, dtype=kinds[column.typecode])
    for number, value in enumerate(more, len(column)):
        values[number] = value
    return values
