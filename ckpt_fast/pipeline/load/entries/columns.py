# SPDX-License-Identifier: Apache-2.0
"""Entries from the table behind the manifest: checked in columns, made into objects only where asked for."""

from __future__ import annotations

import functools
import itertools
from array import array
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ckpt_fast.format.archive import item_nbytes, tensor_archive
from ckpt_fast.format.columns.lists import Ints, stable_order
from ckpt_fast.format.consistency import Region, require_apart
from ckpt_fast.format.manifest import Manifest
from ckpt_fast.format.table import NOTHING, RAW, Numbers, Table
from ckpt_fast.format.types import Extent
from ckpt_fast.pipeline.load.entries.kinds import Item, Piece, SavedTensor
from ckpt_fast.pipeline.load.entries.pickled import LONGEST_FILE, require_inside
from ckpt_fast.pipeline.memory.forms import Described


class _Columns(NamedTuple):
    """What requests are compared with.

    Attributes:
        dtypes: their numbers; -1 stands for an object.
        dtype: int64 [names + 1]: of each tensor; the last is that of a name that is not there.
        first: int64 [names + 1]: where the rows of each name begin in the order of names.
        is_single: bool [names + 1]: whether a name has one row.
        is_zero: bool [lists]: whether all numbers of a list are 0.
    """

    dtypes: dict[torch.dtype | None, int]
    dtype: Ints
    first: Ints
    is_single: npt.NDArray[np.bool_]
    is_zero: npt.NDArray[np.bool_]


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
        self.nbytes = int(_ints(payloads.nbytes).sum())
        self._numbers = {name: number for number, name in enumerate(table.names)}
        self._require_lengths()
        self._require_apart()
        self._order, self._first = self._by_name()
        self._places: dict[int, tuple[Numbers, Ints]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}  # by the number of their list: few, if many tensors

    @property
    def names(self) -> Collection[str]:
        return self._numbers.keys()

    def shape(self, fqn: str) -> tuple[int, ...] | None:
        table, number = self._table, self._numbers[fqn]
        if table.dtypes[number] is None:
            return None
        numbers = table.shapes[number]
        shape = self._shapes.get(numbers)
        if shape is None:
            shape = self._shapes[numbers] = table.lists[numbers]
        return shape

    def dtype(self, fqn: str) -> torch.dtype | None:
        return self._table.dtypes[self._numbers[fqn]]

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
        columns, table, forms = self._columns, self._table, described.forms.numpy()
        # A rank's shards have one of few places and shapes. Number -2 is that of no list here.
        find = functools.lru_cache(maxsize=1024)(lambda numbers: _number(table.lists.find(numbers)))
        number = np.array([self._numbers.get(name, -1) for name in names], np.int64)
        dtype = np.array([columns.dtypes.get(form.dtype, -1) for form in described.table] + [-1], np.int64)
        shape = np.array([find(form.shape) for form in described.table] + [-2], np.int64)
        rows = np.full(len(names), -1, np.int64)
        # Most tensors are in one piece.
        found = (number >= 0) & (dtype[forms] >= 0) & (columns.dtype[number] == dtype[forms])
        single = found & columns.is_single[number]
        rows[single] = self._order[columns.first[number[single]]]
        if offsets is None:
            place = None
        else:
            place = np.array([find(each) for each in offsets], np.int64)
            for each in np.flatnonzero(found & ~single & (place >= 0)).tolist():
                piece = self._row_at(int(number[each]), int(place[each]))
                rows[each] = -1 if piece is None else piece
        at = np.flatnonzero(rows >= 0)
        row = rows[at]
        fits = (table.kinds[row] == RAW) & (table.sizes[row] == shape[forms[at]])
        if place is None:
            fits &= (table.shapes[number[at]] == shape[forms[at]]) & columns.is_zero[table.offsets[row]]
        else:
            fits &= table.offsets[row] == place[at]
        rows[at[~fits]] = -1
        return torch.from_numpy(rows)

    @functools.cached_property
    def _columns(self) -> _Columns:
        dtypes: dict[torch.dtype | None, int] = {None: -1}
        dtype = [dtypes.setdefault(each, len(dtypes)) for each in self._table.dtypes]
        first = np.array(self._first, np.int64)
        lists = self._table.lists
        ends = np.cumsum(lists.lengths)
        others = np.concatenate([[0], np.cumsum(lists.numbers != 0)])
        return _Columns(
            dtypes,
            np.array([*dtype, -1], np.int64),
            first,
            np.append(np.diff(first) == 1, False),
            others[ends] == others[ends - lists.lengths],
        )

    def fqn(self, row: int) -> str:
        """The name of what a payload belongs to."""
        name: str = self._table.names[self._table.name[row]]
        return name

    def piece_count(self, fqn: str) -> int:
        """How many pieces a tensor has; 0 if there is none of this name."""
        number = self._numbers.get(fqn)
        return 0 if number is None else self._first[number + 1] - self._first[number]

    def tensor(self, fqn: str) -> SavedTensor | None:
        number = self._numbers.get(fqn)
        return None if number is None else self._tensor(number, self._rows(number))

    def tensor_within(self, fqn: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> SavedTensor | None:
        """The tensor of this name, if there is one, with only those pieces that have elements in a region."""
        number = self._numbers.get(fqn)
        if number is None or self._table.dtypes[number] is None:
            return None
        rows, lists = self._rows(number), self._table.lists
        dimensions = len(lists[self._table.shapes[number]])
        place, extent = self._table.offsets[rows], self._table.sizes[rows]
        if len(offsets) == dimensions and all(
            (lists.lengths[each] == dimensions).all() for each in (place, extent)
        ):
            begin, size = (lists.matrix(each, dimensions) for each in (place, extent))
            low = np.array(offsets, np.int64)
            high = low + np.array(sizes, np.int64)
            rows = rows[((begin < high) & (low < begin + size)).all(axis=1)]
        return self._tensor(number, rows)

    def _tensor(self, number: int, rows: Ints) -> SavedTensor | None:
        fqn, dtype = self._table.names[number], self._table.dtypes[number]
        if dtype is None:
            return None
        lists = self._table.lists
        shape, pieces = lists[self._table.shapes[number]], []
        for row in rows.tolist():
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
        return Item(self._payload(int(rows[0])), ())

    def _rows(self, number: int) -> Ints:
        return self._order[self._first[number] : self._first[number + 1]]

    def _row_at(self, number: int, place: int | None) -> int | None:
        """The row of a tensor's piece at a place (one of the lists), if there is just one with elements."""
        if place is None:
            return None
        known = self._places.get(number)
        if known is None:
            rows = self._rows(number)
            rows = rows[self._table.lists.products[self._table.sizes[rows]] > 0]
            order = self._table.offsets[rows].argsort(kind="stable")
            known = self._places[number] = self._table.offsets[rows[order]], rows[order]
        places, rows = known
        begin, end = np.searchsorted(places, place), np.searchsorted(places, place, "right")
        return int(rows[begin]) if end - begin == 1 else None

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
        table, offset, nbytes = self._table, _ints(self._payloads.offset), _ints(self._payloads.nbytes)
        if int(offset.max(initial=0)) + int(nbytes.max(initial=0)) > LONGEST_FILE:
            raise ValueError("its payloads are longer than any file")
        itemsize = np.array([0 if dtype is None else dtype.itemsize for dtype in table.dtypes], np.int64)
        numel = table.lists.products[table.sizes]
        wrong = (numel * itemsize[table.name] != nbytes) & (table.kinds == RAW) if len(nbytes) else nbytes > 0
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"{self.fqn(row)} cannot have {self._payloads.nbytes[row]} bytes")

    def _require_apart(self) -> None:
        """No two payloads have a byte in common."""
        file, offset, nbytes = (_ints(column) for column in self._payloads[1:4])
        rows = np.flatnonzero(nbytes > 0)
        rows = rows[stable_order(file[rows])]
        before, after = rows[:-1], rows[1:]
        if not ((file[before] != file[after]) | (offset[before] <= offset[after])).all():
            rows = rows[np.lexsort((offset[rows], file[rows]))]
            before, after = rows[:-1], rows[1:]
        shared = (file[before] == file[after]) & (offset[before] + nbytes[before] > offset[after])
        if shared.any():
            at = int(shared.argmax())
            one, other = int(before[at]), int(after[at])
            path, begin, _ = self._payload(other)
            names = sorted((self.fqn(one), self.fqn(other)))
            raise ValueError(f"{' and '.join(names)} share bytes of {path} at {begin}")

    def _by_name(self) -> tuple[Ints, list[int]]:
        """The rows in the order of the names, and where those of each name begin."""
        rows = np.flatnonzero(self._table.kinds != NOTHING)
        name = self._table.name[rows]
        counts = np.bincount(name, minlength=len(self._table.names))
        if not counts.all():
            # Of a tensor, nothing may have been saved but empty pieces.
            nothing = np.flatnonzero(self._table.kinds == NOTHING)
            nothing = nothing[_ints(self._payloads.nbytes)[nothing] == 0]
            is_empty = np.bincount(self._table.name[nothing], minlength=len(counts)) > 0
            for number in np.flatnonzero(counts == 0).tolist():
                if self._table.dtypes[number] is None or not is_empty[number]:
                    raise ValueError(f"{self._table.names[number]} has no item")
        return rows[stable_order(name)], [0, *np.cumsum(counts).tolist()]


def _number(found: int | None) -> int:
    return -2 if found is None else found


def _ints(column: array[int]) -> npt.NDArray[np.integer[Any]]:
    return np.frombuffer(column, np.uint32 if column.typecode == "I" else np.int64)
