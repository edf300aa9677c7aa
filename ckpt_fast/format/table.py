# SPDX-License-Identifier: Apache-2.0
"""The table: what ``.metadata`` says of each payload, in columns that a reader need not unpickle.

It follows the columns of the manifest and has a row for each payload. docs/format.md draws the layout.
"""

from __future__ import annotations

import math
import struct
import zlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ckpt_fast.format.types import ItemRecord

_VERSION = 1
# Version; CRC-32 of the pickle; payloads, names, lists, numbers in them; bytes of dtypes, of names.
_HEAD = struct.Struct("<8I")
_PICKLE_CRC_AT = 4
_LARGEST = 1 << 56
# No kind of tensor has more; to multiply endless lists would take forever.
_MOST_DIMENSIONS = 64

# What a payload is.
NOTHING, RAW, ITEM = 0, 1, 2


class Table(NamedTuple):
    """The table of contents of a checkpoint.

    Attributes:
        names: of tensors and objects.
        dtypes: of the tensors; None for an object. One for each name, as are ``shapes``.
        shapes: index into ``lists`` of the shape of the whole tensor.
        kinds: for each payload: ``RAW``: the elements of one piece of a tensor, inside an item of our layout;
            ``ITEM``: a whole item, of an object or a piece that torch stored; ``NOTHING``: an empty piece
            that is not in the table of contents. One for each payload, as are the following.
        name: index into ``names``.
        offsets, sizes: index into ``lists`` of where the piece begins in the tensor, and of its extents.
        lists: offsets and sizes.
    """

    names: list[str]
    dtypes: list[torch.dtype | None]
    shapes: array[int]
    kinds: bytes
    name: array[int]
    offsets: array[int]
    sizes: array[int]
    lists: list[tuple[int, ...]]


class TableBuilder:
    """A table, built payload by payload."""

    def __init__(self) -> None:
        self._names: dict[str, int] = {}
        self._dtypes: dict[torch.dtype | None, int] = {None: 0}
        self._lists: dict[tuple[int, ...], int] = {}
        self._dtype, self._shape = array("I"), array("I")
        self._kinds = bytearray()
        self._name, self._offsets, self._sizes = array("I"), array("I"), array("I")

    def add(self, record: ItemRecord, *, is_left_out: bool) -> None:
        """The next payload.

        Args:
            record: what it is.
            is_left_out: whether ``.metadata`` does not mention it.
        """
        lists = self._lists
        name = self._names.setdefault(record.fqn, len(self._names))
        if name == len(self._dtype):
            self._dtype.append(self._dtypes.setdefault(record.dtype, len(self._dtypes)))
            self._shape.append(lists.setdefault(record.global_shape, len(lists)))
        self._kinds.append(NOTHING if is_left_out else ITEM if record.dtype is None else RAW)
        self._name.append(name)
        self._offsets.append(lists.setdefault(record.offsets, len(lists)))
        self._sizes.append(lists.setdefault(record.sizes, len(lists)))

    def encode(self, are_items: Sequence[bool]) -> bytes | None:
        """The table, of no pickle yet; None if names or shapes cannot be stored.

        Args:
            are_items: for each payload, whether it is a whole item.
        """
        if any("\0" in name for name in self._names) or len(are_items) != len(self._kinds):
            return None
        if any(len(each) > _MOST_DIMENSIONS for each in self._lists):
            return None
        kinds = bytes(
            ITEM if kind == RAW and is_item else kind
            for kind, is_item in zip(self._kinds, are_items, strict=True)
        )
        dtypes = "\0".join("" if each is None else str(each).removeprefix("torch.") for each in self._dtypes)
        names = "\0".join(self._names).encode("utf-8", "surrogatepass")
        numbers = [number for each in self._lists for number in each]
        columns = [self._dtype, self._shape, self._name, self._offsets, self._sizes]
        columns += [array("I", map(len, self._lists)), array("q", numbers)]
        counts = (len(kinds), len(self._names), len(self._lists), len(numbers))
        return b"".join(
            [
                _HEAD.pack(_VERSION, 0, *counts, len(dtypes), len(names)),
                *(column.tobytes() for column in columns),
                kinds,
                dtypes.encode(),
                names,
            ]
        )


def bound_to(table: bytes, pickled: bytes) -> bytes:
    """An encoded table as that of this pickle."""
    crc = struct.pack("<I", zlib.crc32(pickled))
    return table[:_PICKLE_CRC_AT] + crc + table[_PICKLE_CRC_AT + 4 :]


def is_bound_to(table: bytes, pickled: bytes) -> bool:
    """Whether an encoded table is that of this pickle: another program may have replaced it."""
    return len(table) >= _HEAD.size and table == bound_to(table, pickled)


def decode_table(content: bytes) -> Table | None:
    """A table as ``TableBuilder`` encodes it; None if it is of a later version.

    Raises:
        ValueError: it contradicts itself.
        struct.error: it is cut short.
    """
    version, _, rows, name_count, list_count, number_count, dtype_nbytes, name_nbytes = _HEAD.unpack_from(
        content
    )
    if version != _VERSION:
        return None
    counts = (name_count, name_count, rows, rows, rows, list_count, number_count)
    at = _HEAD.size
    columns: list[array[int]] = []
    for code, count in zip("IIIIIIq", counts, strict=True):
        column = array(code)
        end = at + count * column.itemsize
        column.frombytes(content[at:end])
        columns.append(column)
        at = end
    dtype, shape, name, offsets, sizes, lengths, numbers = columns
    ends = [at + rows, at + rows + dtype_nbytes, at + rows + dtype_nbytes + name_nbytes]
    if ends[-1] != len(content):
        raise ValueError("its table is cut short")
    kinds = content[at : ends[0]]
    dtypes = [_dtype(text) for text in content[ends[0] : ends[1]].decode().split("\0")]
    names = content[ends[1] : ends[2]].decode("utf-8", "surrogatepass").split("\0") if name_count else []
    for what, column, count in (
        ("name", name, name_count),
        ("dtype", dtype, len(dtypes)),
        *(("list", each, list_count) for each in (shape, offsets, sizes)),
        ("kind", array("B", kinds), ITEM + 1),
    ):
        if column and max(column) >= count:
            raise ValueError(f"its table has no {what} {max(column)}")
    if len(names) != name_count or len(set(names)) != name_count:
        raise ValueError(f"its table has {len(set(names))} names instead of {name_count}")
    if sum(lengths) != number_count or min(numbers, default=0) < 0:
        raise ValueError("its table makes no sense")
    if max(lengths, default=0) > _MOST_DIMENSIONS:
        raise ValueError(f"its table has a tensor of {max(lengths)} dimensions")
    lists, begin = [], 0
    for length in lengths:
        lists.append(tuple(numbers[begin : begin + length]))
        begin += length
    if any(math.prod(each) > _LARGEST for each in lists):
        raise ValueError("its table has a tensor that no memory holds")
    return Table(names, [dtypes[each] for each in dtype], shape, kinds, name, offsets, sizes, lists)


def _dtype(text: str) -> torch.dtype | None:
    if not text:
        return None
    # Looked up without getattr, for which torch imports modules.
    dtype = vars(torch).get(text)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"its table names the dtype {text}, which this version of torch does not have")
    return dtype
